"""ToMe on models of other libraries: torchvision's ViT-B/16, and transformers' ViT in the shape of ViT-S.

    python benchmarks/speed/bench_towers.py --results-file benchmarks/speed/towers_cpu.csv

One thread, processor time, the unpatched and the patched model in turn; medians, and quartiles of the ratio. On "sdpa",
both sides attend through `scaled_dot_product_attention`, as transformers does by itself. torchvision's unpatched model
attends in a kernel of its own in eval mode ("fast path" of `nn.MultiheadAttention`); with that switched off it goes the
same way as the patched one. Weights are random: counts and times do not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.runs import Run
from tokenzoo.evaluation.throughput import bench

GOAL = 0.95  # of the ratio of multiply-adds


def vit_b_16() -> nn.Module:
    from torchvision.models import vit_b_16

    return vit_b_16()


def hf_vit_s() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTModel(ViTConfig(**shape, attn_implementation="sdpa"), add_pooling_layer=False)


# model -> how to build it, images per step, and on which attention paths to time it: torch's fast path or not
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[bool, ...]]] = {
    "torchvision vit_b_16": (vit_b_16, 4, (False, True)),
    "transformers ViT-S": (hf_vit_s, 8, (False,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=None, help="images per step; 4 for ViT-B, 8 for ViT-S")
    parser.add_argument("--results-file", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.models for row in measured(name, args.r, args.rounds, args.batch_size)]
    if args.results_file:
        with open(args.results_file, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def measured(name: str, r: int, rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Two rows per attention path: unpatched and patched."""
    build, batch, paths = MODELS[name]
    torch.manual_seed(0)
    model, found = build().eval(), []
    options = {"batch_size": batch_size or batch, "rounds": rounds, "latency": False, "input_size": (3, 224, 224)}
    for fast in paths:
        torch.backends.mha.set_fastpath_enabled(fast)
        path = "fast path" if fast else "sdpa"
        results = bench(model, [Run("tome", {"r": r})], **options)
        for speed in results:
            row = {k: v for k, v in speed.row().items() if k not in ("recipe", "step_times_ms", "latency_times_ms")}
            command = f"python {' '.join(sys.argv)}"
            found.append({"model": name, "unpatched_attention": path, **row, **environment("cpu"), "command": command})
        own, ratio = results[1], results[1].row()
        print(
            f"{name}, unpatched on {path}: {own.speedup:.3f} times as fast (quartiles {ratio['speedup_q1']:.3f} to "
            f"{ratio['speedup_q3']:.3f}), {own.gmac_ratio:.3f} times fewer multiply-adds, quotient "
            f"{own.speedup_per_gmac_ratio:.3f}" + ("" if fast else f" (goal {GOAL})"),
            flush=True,
        )
    torch.backends.mha.set_fastpath_enabled(True)
    return found


if __name__ == "__main__":
    main()
