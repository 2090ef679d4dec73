"""Time of one image: the unpatched model and every published setting, in eager mode or compiled.

    python benchmarks/speed/bench_latency.py --results-file benchmarks/speed/latency_deit_small.csv
    python benchmarks/speed/bench_latency.py --torchcompile --results-file benchmarks/speed/latency_compiled.csv
    python benchmarks/speed/bench_latency.py --model deit_base_patch16_224 --results-file ...

Settings are those of `configs/<method>/<settings>.yaml`, for every method that has such a file. All models take turns,
each once a round; compiled ones in pairs of the unpatched model and one method. One thread by default, processor time.
Weights and images are random: methods whose counts follow the image (ats, algm, flowcut) remove less of them than of
photographs, which the column of multiply-adds shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.results import write_results
from tokenzoo.evaluation.runs import Precision, Run
from tokenzoo.evaluation.throughput import bench

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "model", "method", "method_kwargs", "compiled", "precision", "ms", "ms_q1", "ms_q3", "share_of_unpatched",
    "share_q1", "share_q3", "gmacs", "gmac_share", "tokens_out", "rounds", "clock",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--settings", default="deit_small_patch16_224", help="name of the files in configs/<method>/")
    parser.add_argument("--methods", nargs="*", default=None, help="all that have such a file by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--img-size", type=int, default=None)
    parser.add_argument("--torchcompile", nargs="?", const="inductor", default=None, metavar="BACKEND")
    parser.add_argument("--results-file", default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model, **({"img_size": args.img_size} if args.img_size else {})).eval()
    runs = [Run(file) for file in files(args.settings, args.methods)]
    record = environment("cpu", None) | {"command": f"python {' '.join(sys.argv if argv is None else argv)}"}
    groups = [[run] for run in runs] if args.torchcompile else [runs]
    rows: list[dict[str, Any]] = []
    for group in groups:
        torch._dynamo.reset()
        found = measured(args.model, model, group, args.rounds, args.batch_size, args.torchcompile)
        rows += found if not rows else found[1:]
        for row in found[0 if group is groups[0] else 1 :]:
            print(
                f"{row['method']:<16} {row['ms']:9.2f} ms   {row['share_of_unpatched']:.3f} of unpatched "
                f"({row['share_q1']:.3f} to {row['share_q3']:.3f}), multiply-adds {row['gmac_share']:.3f}", flush=True
            )  # fmt: skip
        if args.results_file:
            write_results(args.results_file, rows, COLUMNS, record)


def files(settings: str, methods: Sequence[str] | None) -> list[str]:
    """Recipes of that name, one per method."""
    found = sorted(file for file in (ROOT / "configs").glob(f"*/{settings}.yaml"))
    return [str(file) for file in found if methods is None or file.parent.name in methods]


def measured(
    name: str, model: nn.Module, runs: Sequence[Run], rounds: int, batch_size: int, compiler: str | None,
    precision: Precision | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per run, the unpatched model first."""
    size = tuple(model.patch_embed.img_size)
    found = bench(
        model, runs, batch_size=batch_size, rounds=rounds, latency=False, input_size=(3, *size), compiler=compiler,
        precision=precision,
    )  # fmt: skip
    out = []
    for speed in found:
        row = speed.row()
        share = sorted(1 / ratio for ratio in (row["speedup_q3"], row["speedup"], row["speedup_q1"]))
        out.append({
            "model": name, "method": row["method"], "method_kwargs": row["method_kwargs"], "compiled": row["compiled"],
            "precision": row["precision"], "ms": row["infer_step_time"], "ms_q1": row["infer_step_time_q1"],
            "ms_q3": row["infer_step_time_q3"], "share_q1": round(share[0], 4),
            "share_of_unpatched": round(share[1], 4), "share_q3": round(share[2], 4), "gmacs": row["infer_gmacs"],
            "gmac_share": round(1 / row["gmac_ratio"], 4),
            "tokens_out": row["tokens_out"], "rounds": row["rounds"], "clock": row["clock"],
        })  # fmt: skip
    return out


if __name__ == "__main__":
    main()
