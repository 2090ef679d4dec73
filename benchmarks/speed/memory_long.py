"""Peak memory of one forward pass at 4097 tokens: ViT-S/16 at 1024 x 1024, unpatched and under methods as configured.

    python benchmarks/speed/memory_long.py --results-file benchmarks/speed/memory_long.csv

Each side runs in a process of its own on one thread; the C library returns freed memory at once, so that what is
measured is what is alive, beyond model and image. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import timm
import torch

import tokenzoo
from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.resident import growth
from tokenzoo.evaluation.results import write_results

ROOT = Path(__file__).parents[2]
METHODS = (
    "tome", "evit", "pitome", "tofu", "ppt", "diffrate", "turbo", "dpcknn", "kmedoids", "radial", "gtp", "flowcut",
    "vggt", "soft_transform", "fourier", "dct",
)  # fmt: skip
SPARSE = ("gtp", {"sparsity": 0.5})  # a whole map per block, by definition
COLUMNS = ("model", "img_size", "tokens_in", "tokens_out", "method", "options", "peak_mib", "share_of_unpatched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img-size", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--results-file", type=Path, default=None)
    parser.add_argument("--side", default=None, help="measure one side only, in this process: a recipe as JSON")
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(peak(args.model, args.img_size, json.loads(args.side))))
        return
    sides = [("unpatched", {}), *((name, _given(name)) for name in args.methods)]
    if "gtp" in args.methods:
        sides.append((SPARSE[0], {**_given("gtp"), **SPARSE[1]}))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows: list[dict] = []
    for method, options in sides:
        side = json.dumps({} if method == "unpatched" else {"method": method, **options})
        words = [sys.executable, __file__, "--model", args.model, "--img-size", str(args.img_size), "--side", side]
        found = json.loads(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)
        base = rows[0]["peak_mib"] if rows else found["peak_mib"]
        rows.append({
            "model": args.model, "img_size": args.img_size, "method": method, "options": json.dumps(options), **found,
            "share_of_unpatched": round(found["peak_mib"] / base, 3),
        })  # fmt: skip
        print(f"{method:<16} {side[:60]:<60} {found['peak_mib']:8.1f} MiB  {found['peak_mib'] / base:.2f}", flush=True)
    if args.results_file is not None:
        command = f"python benchmarks/speed/memory_long.py --results-file {args.results_file}"
        write_results(args.results_file, rows, COLUMNS, environment("cpu") | {"command": command})


def _given(method: str) -> dict:
    """Options of the method's configuration for DeiT-S, without counts that are those of its 197 tokens."""
    import yaml

    file = ROOT / "configs" / method / "deit_small_patch16_224.yaml"
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {k: v for k, v in options.items() if k not in ("method", "tokens", "prune", "merge")}


@torch.no_grad()
def peak(name: str, img_size: int, recipe: dict) -> dict:
    """MiB beyond model and image, and tokens in front of the first block and behind the last one."""
    torch.set_num_threads(1)
    model = timm.create_model(name, img_size=img_size).eval()
    tokens_in = tokens_out = model.pos_embed.shape[1]
    if recipe:
        tokenzoo.patch_model(model, recipe)
        tokens_out = tokenzoo.report(model).tokens_out
    image = torch.randn(1, 3, img_size, img_size)
    found = growth(lambda: model(image))
    return {"tokens_in": tokens_in, "tokens_out": tokens_out, "peak_mib": round(found, 1)}


if __name__ == "__main__":
    main()
