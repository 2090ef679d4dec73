"""Super token attention in a plain ViT at high resolution: speed at 512 pixels, peak memory at 1024.

    python benchmarks/speed/bench_sta.py --results-file benchmarks/speed/sta_vit_small.csv

Speed: one thread, processor time, both sides in turn on fused attention; median and quartiles of the ratio. Memory: a
process a side, the C library returns freed memory at once, so that what is measured is what is alive (Linux only).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time

import timm
import torch

import tokenzoo
from tokenzoo.evaluation.resident import growth

SIDES = {"unpatched": None, "first half": {"cell": 4}, "all blocks": {"cell": 4, "layers": tuple(range(12))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--speed-size", type=int, default=512)
    parser.add_argument("--memory-size", type=int, default=1024)
    parser.add_argument("--results-file", default=None)
    parser.add_argument("--side", choices=SIDES, default=None, help="measure the memory of one side, in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side is not None:
        print(f"{peak(args.model, args.memory_size, args.side):.1f}")
        return
    rows = speed(args.model, args.speed_size, args.rounds)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for row in rows:
        words = [sys.executable, __file__, "--model", args.model, "--memory-size", str(args.memory_size)]
        found = subprocess.run([*words, "--side", row["side"]], env=env, capture_output=True, text=True, check=True)
        row["memory_size"], row["peak_mib"] = args.memory_size, float(found.stdout)
        print(row, flush=True)
    if args.results_file:
        with open(args.results_file, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def build(name: str, size: int, side: str) -> torch.nn.Module:
    """The model of one side."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).eval()
    return model if SIDES[side] is None else tokenzoo.patch_model(model, "sta", **SIDES[side])


@torch.no_grad()
def speed(name: str, size: int, rounds: int) -> list[dict[str, object]]:
    """One row a side."""
    models = {side: build(name, size, side) for side in SIDES}
    image = torch.randn(1, 3, size, size)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(rounds + 1):
        for side, model in models.items():
            start = time.process_time()
            model(image)
            if round_:  # the first round warms up
                seconds[side].append(time.process_time() - start)
    rows = []
    for side, model in models.items():
        ratios = [base / own for base, own in zip(seconds["unpatched"], seconds[side])]
        low, middle, high = statistics.quantiles(ratios, n=4) if side != "unpatched" else (1.0, 1.0, 1.0)
        report = tokenzoo.report(model)
        rows.append({
            "model": name, "side": side, "method": "" if SIDES[side] is None else "sta", "img_size": size,
            "gmacs": round(report.total / 1e9, 3), "seconds": round(statistics.median(seconds[side]), 4),
            "speedup": round(middle, 3), "speedup_q1": round(low, 3), "speedup_q3": round(high, 3),
            "attn_impl": report.attn_impl, "torch": torch.__version__, "timm": timm.__version__, "threads": 1,
        })  # fmt: skip
    return rows


@torch.no_grad()
def peak(name: str, size: int, side: str) -> float:
    """MiB beyond model and image."""
    model, image = build(name, size, side), torch.randn(1, 3, size, size)
    model(image[..., :size, :size])  # kernels, tables and the libraries' own buffers are there afterwards
    return growth(lambda: model(image))


if __name__ == "__main__":
    main()
