"""ToMe at 60 % of the multiply-adds alone, with torch.compile, with bfloat16, with int8, and with all of them.

    python benchmarks/speed/stacking.py --results-file benchmarks/speed/stacking_cpu.csv

For each of the other means, and for all together: the unpatched model and ToMe under it take turns with the plain
unpatched float32 model, one thread, processor time. `gain` is what ToMe is worth under these means, `kept` its share of
what it is worth alone: (gain - 1) / (gain alone - 1); `of_product` is the joint gain over the plain model as a share of
the product of both single gains, 1 where each keeps all of its own. int8 is
torchao's dynamic quantisation of activations with int8 weights of every linear layer; `all` is bfloat16, int8 and
torch.compile. torchao's int8 product is written for compiled graphs; uncompiled it is measured as well. Weights are
random: times do not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenzoo
from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.timing import clock_for, interleave, room_for_graphs

MEANS: dict[str, tuple[bool, bool, bool]] = {  # compiled, bfloat16, int8
    "alone": (False, False, False),
    "torch.compile": (True, False, False),
    "bf16": (False, True, False),
    "int8": (False, False, True),
    "bf16 + torch.compile": (True, True, False),
    "int8 + torch.compile": (True, False, True),
    "all": (True, True, True),
}
COLUMNS = (
    "model", "batch", "means", "unpatched_ms", "unpatched_q1", "unpatched_q3", "tome_ms", "tome_q1", "tome_q3",
    "means_gain", "gain", "gain_q1", "gain_q3", "kept", "both", "of_product", "gmac_ratio", "rounds", "note",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--means", nargs="*", choices=MEANS, default=list(MEANS))
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--depth", type=int, default=None, help="blocks, to try the script out")
    parser.add_argument("--results-file", default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = environment("cpu") | {"command": f"python {' '.join(sys.argv)}", "torchao": version_of_torchao()}
    rows: list[dict[str, Any]] = []
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name, **({} if args.depth is None else {"depth": args.depth})).eval()
        reduced = tokenzoo.patch_model(copy.deepcopy(model), "tome", flops=args.flops)
        ratio = tokenzoo.report(model).total / tokenzoo.report(reduced).total
        alone: float | None = None
        for means in args.means:
            row = measured(model, reduced, means, args.batch_size, args.rounds)
            alone = row["gain"] if means == "alone" else alone
            kept = "" if alone is None or row["gain"] == "" else f"{(row['gain'] - 1) / (alone - 1):.2f}"
            product = "" if alone is None else f"{row['both'] / (alone * row['means_gain']):.2f}"
            rows.append({"model": name, "batch": args.batch_size, "means": means, "gmac_ratio": f"{ratio:.3f}", **row,
                         "kept": kept, "of_product": product})  # fmt: skip
            print(
                f"{name:<24} {means:<22} unpatched {row['unpatched_ms']} ms, ToMe {row['tome_ms']} ms: gain "
                f"{row['gain']}, kept {kept}, both {row['both']}, {product} of the product {row['note']}", flush=True
            )  # fmt: skip
            if args.results_file:
                with open(args.results_file, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, [*COLUMNS, *record])
                    writer.writeheader()
                    writer.writerows({**r, **record} for r in rows)


def version_of_torchao() -> str:
    from importlib.metadata import version

    return version("torchao")


def measured(model: nn.Module, reduced: nn.Module, means: str, batch: int, rounds: int) -> dict[str, Any]:
    """The plain model, and both models under the means, in turn."""
    compiled, half, int8 = MEANS[means]
    dtype = torch.bfloat16 if half else torch.float32
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    clock, _ = clock_for(images.device)
    torch._dynamo.reset()
    with torch.inference_mode(), room_for_graphs(16):
        sides = [prepared(each, dtype, int8) for each in (model, reduced)]
        given = images.to(dtype)
        calls = [torch.compile(side, dynamic=False, fullgraph=True) if compiled else side for side in sides]
        steps: list[Callable[[], Tensor]] = [partial(model, images), *(partial(call, given) for call in calls)]
        for step in steps:
            for _ in range(2):
                step()
        plain, unpatched, tome = interleave(steps, rounds, clock)
    gains = [b / t for b, t in zip(unpatched, tome)]
    return {
        **quartiles("unpatched", unpatched), **quartiles("tome", tome),
        "means_gain": round(statistics.median(p / b for p, b in zip(plain, unpatched)), 3),
        "gain": round(statistics.median(gains), 3),
        "gain_q1": round(statistics.quantiles(gains, n=4)[0], 3),
        "gain_q3": round(statistics.quantiles(gains, n=4)[2], 3),
        "both": round(statistics.median(p / t for p, t in zip(plain, tome)), 3), "rounds": rounds, "note": "",
    }  # fmt: skip


def prepared(model: nn.Module, dtype: torch.dtype, int8: bool) -> nn.Module:
    """A copy of the model in a number format, its linear layers in int8 if wanted."""
    own = copy.deepcopy(model).to(dtype)
    if int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(own, Int8DynamicActivationInt8WeightConfig())
    return own


def quartiles(name: str, times: Sequence[float]) -> dict[str, float]:
    low, middle, high = (round(1e3 * t, 2) for t in statistics.quantiles(times, n=4))
    return {f"{name}_ms": middle, f"{name}_q1": low, f"{name}_q3": high}


if __name__ == "__main__":
    main()
