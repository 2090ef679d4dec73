"""Peak memory of one forward pass at 2048 x 1024 pixels: unpatched against clustering and reconstruction.

    python benchmarks/segmentation/memory_dense.py --encoder vit_small_patch16_224

Each side runs in a process of its own on one thread; the C library returns freed memory at once, so that what is
measured is what is alive. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

import tokenzoo
from tokenzoo.dense import create_segmenter
from tokenzoo.evaluation.resident import growth

SIDES = ("unpatched", "norm", "maps")  # where the reconstruction acts
GRID = (45, 90)  # of 64 x 128 patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224")
    parser.add_argument("--side", choices=SIDES, default=None, help="measure one side only, in this process")
    args = parser.parse_args()
    if args.side is not None:
        print(f"{peak(args.encoder, args.side):.1f}")
        return
    base = None
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for side in SIDES:
        words = [sys.executable, __file__, "--encoder", args.encoder, "--side", side]
        found = float(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)
        base = base or found
        print(f"{side:<10} {found:8.1f} MiB  {found / base - 1:+.1%}", flush=True)


@torch.no_grad()
def peak(encoder: str, side: str) -> float:
    """MiB beyond model and image."""
    torch.set_num_threads(1)
    model = create_segmenter(encoder, 19, "linear", img_size=(1024, 2048)).eval()
    if side != "unpatched":
        cluster = {"method": "cluster", "layers": 3, "grid": GRID}
        tokenzoo.patch_model(model, [cluster, {"method": "reconstruct", "layers": side}])
    image = torch.randn(1, 3, 1024, 2048)
    return growth(lambda: model(image))


if __name__ == "__main__":
    main()
