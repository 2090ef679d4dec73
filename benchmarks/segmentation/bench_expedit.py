"""Clustering in a Segmenter of the published size: multiply-adds of the published settings, and time of one of them.

    python benchmarks/segmentation/bench_expedit.py --rounds 3 \
        --output benchmarks/segmentation/expedit_segmenter_large.csv

Weights are random: counts and times do not depend on them. Both sides run on the same attention path, interleaved, one
image at a time on one thread, in processor time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

import tokenzoo
from tokenzoo.dense import create_segmenter

# crop, then (index of the block, grid, published GFLOPs); the base first
SETTINGS = {
    (640, 150): [(None, None, 659.0), (15, (28, 28), 529.8), (9, (28, 28), 443.8), (7, (20, 20), 309.4)],
    (768, 19): [(None, None, 995.6), (17, (32, 32), 840.9), (11, (32, 32), 691.0), (9, (24, 24), 529.6)],
    (480, 60): [(None, None, 338.7), (13, (20, 20), 251.2), (11, (15, 15), 201.3), (7, (15, 15), 161.0)],
}
COLUMNS = ("crop", "classes", "after_block", "grid", "published_gmacs", "gmacs", "share", "seconds", "time_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed forward passes of each side")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for (crop, classes), settings in SETTINGS.items():
        with torch.device("meta"):
            model = create_segmenter(
                "vit_large_patch16_384", classes, "mask", {"dynamic_img_size": False},
                {"depth": 1 if crop == 768 else 2}, img_size=crop,
            ).eval()  # fmt: skip
        base = None
        for block, grid, published in settings:
            gmacs = count(model, block, grid)
            base = base or gmacs
            rows.append(dict(zip(COLUMNS, (crop, classes, block, grid, published, round(gmacs, 1), gmacs / base))))
    chosen = [row for row in rows if row["crop"] == 640 and row["after_block"] in (None, 9)]
    for row, seconds in zip(chosen, timed(chosen, args.rounds)):
        row["seconds"] = round(seconds, 2)
        row["time_share"] = row["seconds"] / chosen[0]["seconds"]
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    if args.output is not None:
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)


def recipe(block: int, grid: tuple[int, int]) -> list[dict]:
    return [
        {"method": "cluster", "layers": block, "grid": grid},
        {"method": "reconstruct", "layers": "maps", "norm": "l2"},
    ]


def count(model: torch.nn.Module, block: int | None, grid: tuple[int, int] | None) -> float:
    """Billions of multiply-adds of encoder and decoder together."""
    if block is not None:
        tokenzoo.patch_model(model, recipe(block, grid))
    report = tokenzoo.report(model)
    total = report.total + model.head_macs(report.tokens_out - 1, model.encoder.patch_embed.grid_size)
    if block is not None:
        tokenzoo.unpatch_model(model)
    return total / 1e9


@torch.no_grad()
def timed(rows: list[dict], rounds: int) -> list[float]:
    """Median processor time of a forward pass for every row, interleaved."""
    torch.manual_seed(0)
    model = create_segmenter("vit_large_patch16_384", 150, "mask", img_size=640).eval()
    image = torch.randn(1, 3, 640, 640)
    seconds: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):
        for row, found in zip(rows, seconds):
            if row["after_block"] is not None:
                tokenzoo.patch_model(model, recipe(row["after_block"], row["grid"]))
            start = time.process_time()
            model(image)
            if turn:  # the first turn warms up
                found.append(time.process_time() - start)
            if tokenzoo.is_patched(model):
                tokenzoo.unpatch_model(model)
    return [statistics.median(found) for found in seconds]


if __name__ == "__main__":
    main()
