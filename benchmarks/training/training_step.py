"""Time and peak memory of a training step with every method at 60 % of the multiply-adds, against the unpatched model.

    python benchmarks/training/training_step.py --results-file benchmarks/training/training_step_cpu.csv

Time: forward, backward and update on one thread, processor time, all sides in turn, median and quartiles of the ratio.
Memory: a process of its own a side; what the step adds to model and optimizer at its peak. The C library returns freed
memory at once, so that what is measured is what is alive (Linux only). Random weights and random images.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tokenzoo
from tokenzoo.evaluation import environment, write_results
from tokenzoo.evaluation.resident import growth
from tokenzoo.training.build import build
from tokenzoo.training.losses import TrainStep
from tokenzoo.training.optim import build_optimizer
from tokenzoo.training.options import parse_options

COLUMNS = ("method", "gmacs", "gmac_ratio", "time_ratio", "time_ratio_q1", "time_ratio_q3", "step_seconds",
           "peak_mib", "memory_ratio", "model", "batch_size")  # fmt: skip


class Step:
    """A model with its losses and its optimizer, ready for updates."""

    def __init__(self, args: argparse.Namespace, method: str) -> None:
        words = ["--model", args.model, "--device", "cpu", "--data-dir", ".", "--output", "."]
        words += [] if method == "unpatched" else ["--method", method, "--flops", str(args.flops)]
        given = parse_options(words)
        self.model = build(given, 1000, torch.device("cpu")).model
        self.step = TrainStep(self.model, None, given).train()
        self.optimizer = build_optimizer(self.model, given, 1e-5)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(args.batch_size, 3, 224, 224, generator=generator)
        self.target = torch.arange(args.batch_size)

    def __call__(self) -> None:
        self.step(self.images, self.target)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--methods", nargs="*", default=None, help="by default all that reach the budget")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", default=None, help="measure the memory of one side, in this process")
    parser.add_argument("--results-file", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of is not None:
        print(f"{peak(args):.1f}")
        return
    steps = {"unpatched": Step(args, "unpatched")}
    for name in tokenzoo.list_methods() if args.methods is None else args.methods:
        try:
            steps[name] = Step(args, name)
        except (ValueError, TypeError) as error:
            print(f"left out: {name}: {error}", flush=True)
    rows = measured(args, steps)
    for row in rows:
        print("  ".join(str(row[column]) for column in COLUMNS), flush=True)
    if args.results_file is not None:
        command = f"python benchmarks/training/training_step.py {shlex.join(sys.argv[1:])}"
        record = environment("cpu") | {"command": command}
        write_results(args.results_file, rows, COLUMNS, record)


def measured(args: argparse.Namespace, steps: dict[str, Step]) -> list[dict[str, Any]]:
    """One row a side, the unpatched model first."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    memory = {name: memory_of(args, name) for name in steps}
    rows, base = [], steps["unpatched"].model
    for name, step in steps.items():
        total, whole = tokenzoo.report(step.model).total, tokenzoo.report(base).total
        q1, middle, q3 = statistics.quantiles([t / u for t, u in zip(times[name], times["unpatched"])], n=4)
        rows.append({
            "method": name, "gmacs": round(total / 1e9, 3), "gmac_ratio": round(total / whole, 3),
            "time_ratio": round(middle, 3), "time_ratio_q1": round(q1, 3), "time_ratio_q3": round(q3, 3),
            "step_seconds": round(statistics.median(times[name]), 3), "peak_mib": memory[name],
            "memory_ratio": round(memory[name] / memory["unpatched"], 3), "model": args.model,
            "batch_size": args.batch_size,
        })  # fmt: skip
    return rows


def memory_of(args: argparse.Namespace, name: str) -> float:
    """MiB of one side, measured in a process of its own."""
    words = ["--model", args.model, "--flops", str(args.flops), "--batch-size", str(args.batch_size)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *words, "--memory-of", name], env=env, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def peak(args: argparse.Namespace) -> float:
    """MiB that a step adds to the model, its gradients gone and the state of its optimizer there."""
    step = Step(args, args.memory_of)
    step()
    return growth(step)


if __name__ == "__main__":
    main()
