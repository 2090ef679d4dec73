"""Times and memory of every form of the selective scan on the CPU, one thread.

    python benchmarks/speed/bench_scan.py --output benchmarks/speed/scan_cpu.csv
    python benchmarks/speed/bench_scan.py --model vim_tiny_patch16_224     # the whole model as well

Shapes are those of one Vim-T layer, both directions in one call: batch 4, 2 x 384 channels in two groups, 16 states.
Forms are timed in turn, so that a busy machine slows all of them. Times are CPU times of the process. Memory is the
growth of a process's largest resident size over a training step of 8 scans in a row, one process a form (Linux only).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenzoo.layers import selective_scan
from tokenzoo.layers.scan import blocked as scan_blocked
from tokenzoo.layers.scan import blocked_backward as scan_blocked_backward
from tokenzoo.layers.scan.call import ScanCall

LENGTHS = (197, 400, 785, 1569, 3137)
FORMS = ("blocked", "loop", "chunked", "reference")
STEPS = ("blocked", "inputs only", "loop")  # forms whose training step is measured
GROWTH = {"blocked": LENGTHS}  # the others are slow: one length
FIELDS = ("measure", "form", "batch", "channels", "length", "states", "threads", "value", "unit", "spread", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=768, help="of both directions together")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-length", type=int, default=785)
    parser.add_argument("--model", default=None, help="a Vim to time as a whole, with and without its scan")
    parser.add_argument("--output", default=None, help="CSV to write")
    parser.add_argument("--step", choices=STEPS, default=None, help="measure the memory of one form in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step is not None:
        print(f"{peak_of_step(args, args.step):.1f}")
        return
    rows = []

    def note(measure: str, form: str, length: int, value: float, unit: str, spread: float | str = "") -> None:
        shape = (args.batch, args.channels, length, args.states, torch.get_num_threads())
        rows.append(dict(zip(FIELDS, (measure, form, *shape, f"{value:.2f}", unit, spread, torch.__version__))))
        print(f"{measure:<22} {form:<12} L {length:<5} {value:9.2f} {unit}", flush=True)

    for length in LENGTHS:
        forms = [form for form in FORMS if length in GROWTH.get(form, LENGTHS[:1])]
        calls = {form: forward_of(form, arguments(args, length)) for form in forms}
        for form, times in timed(calls, args.repeats).items():
            note("inference", form, length, statistics.median(times), "ms", f"{max(times) - min(times):.2f}")
            if form == "blocked":
                note("inference per token", form, length, 1e3 * min(times) / length / args.batch, "us")
    steps = {form: (lambda form=form: training_step(form, arguments(args, LENGTHS[0]), 1)) for form in STEPS}
    for form, times in timed(steps, args.repeats).items():
        note("training step", form, LENGTHS[0], statistics.median(times), "ms", f"{max(times) - min(times):.2f}")
    for form in STEPS:
        note("training memory", form, args.memory_length, step_in_process(form), "MiB")
    if args.model is not None:
        for form, times in timed(whole_model(args.model, args.batch), args.repeats).items():
            note(args.model, form, LENGTHS[0], statistics.median(times), "ms", f"{max(times) - min(times):.2f}")
    print(f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    if args.output is not None:
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def arguments(args: argparse.Namespace, length: int) -> dict[str, Tensor]:
    """Channels last in memory, as a mixer's linear layers give them."""
    torch.manual_seed(0)
    streams = {name: torch.randn(args.batch, length, args.channels).transpose(1, 2) for name in ("u", "delta", "z")}
    small = {name: torch.randn(args.batch, length, 2, args.states).permute(0, 2, 3, 1) for name in ("B", "C")}
    rates = -torch.arange(1.0, args.states + 1).repeat(args.channels, 1)
    bias = torch.full((args.channels,), -4.6)  # steps of about 0.01, as at initialisation
    return {**streams, **small, "A": rates, "D": torch.ones(args.channels), "delta_bias": bias}


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each call, all of them in turn after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor
) -> Tensor:
    """The way published plain-PyTorch scans go: channels first, all decays and inputs at once, then a loop."""
    dt = F.softplus(delta + delta_bias[:, None])
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    decays = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    inputs = torch.einsum("bdl,bdnl,bdl->bdln", dt, B, u)
    h, rows = torch.zeros_like(decays[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + inputs[:, :, t]
        rows.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    y = torch.stack(rows, dim=2) + u * D[:, None]
    return y if z is None else y * F.silu(z)


def forward_of(form: str, values: dict[str, Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> Tensor:
        if form == "reference":
            return reference(**values)
        return selective_scan(**values, delta_softplus=True, backend=form)

    return call


class InputsOnly(torch.autograd.Function):
    """A scan that saves nothing but its inputs: the states that the gradient starts from are found again."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias):
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias)
        return scan_blocked.forward(ScanCall(u, delta, A, B, C, D, z, bias, None, None, True), keep=False)[0]

    @staticmethod
    def backward(ctx, grad):
        call = ScanCall(*ctx.saved_tensors, None, None, True)
        kept = scan_blocked.forward(call, keep=True)[2]
        return scan_blocked_backward.backward(call, kept, grad, None)[:8]


def training_step(form: str, values: dict[str, Tensor], scans: int) -> None:
    """Some scans in a row, each fed by the one before, and the gradients of everything."""
    names = ("delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [{n: values[n].clone().requires_grad_() for n in names} for _ in range(scans)]
    u = values["u"].clone().requires_grad_()
    for leaf in leaves:
        if form == "inputs only":
            u = InputsOnly.apply(u, *leaf.values())
        else:
            u = selective_scan(u, **leaf, delta_softplus=True, backend=form)
    u.mean().backward()


def peak_of_step(args: argparse.Namespace, form: str) -> float:
    """MiB that a training step adds to the largest resident size of this process."""
    values = arguments(args, args.memory_length)
    training_step(form, {n: x[..., :40] if x.dim() > 2 else x for n, x in values.items()}, 1)  # loads what it needs
    # a high-water mark of its own: the kernel resets it on request
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    training_step(form, values, 8)
    return status("VmHWM") - before


def status(name: str) -> float:
    """A size of this process in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def step_in_process(form: str) -> float:
    """The memory of a form's step in a new process, whose C library returns freed memory at once."""
    words = [sys.executable, __file__, *sys.argv[1:], "--step", form]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)


def whole_model(name: str, batch: int) -> dict[str, Callable[[], object]]:
    """A Vim with our scan, with the published form of it, and without: the mixer's scan is replaced while it runs."""
    import timm

    import tokenzoo  # noqa: F401  (registers the model)
    from tokenzoo.models.vim import mixer as vim_mixer

    model, own = timm.create_model(name).eval(), vim_mixer.selective_scan
    images = torch.randn(batch, *model.pretrained_cfg["input_size"])

    def loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, **_):
        return reference(u, delta, A, B, C, D, z, delta_bias)

    def run(scan: Callable) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> None:
            vim_mixer.selective_scan = scan
            try:
                model(images)
            finally:
                vim_mixer.selective_scan = own

        return call

    return {"blocked": run(own), "reference": run(loop), "without scan": run(lambda u, *_, **__: u)}


if __name__ == "__main__":
    main()
