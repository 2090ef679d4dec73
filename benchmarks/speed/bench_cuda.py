"""What reduction is worth on a CUDA device: ViT-S, -B and -L in bfloat16, in one run that keeps to its time.

    python benchmarks/speed/bench_cuda.py --minutes 8 --results-file cuda.csv
    python benchmarks/speed/bench_cuda.py --small --minutes 1 --results-file small.csv    # any machine, tiny models

Every row sets one method against the unpatched model: the same model, image size, batch and mode, both timed in turn.
Modes: "eager", "graph" (a captured CUDA graph), "compiled" (torch.compile, inductor). Settings are those of
`configs/<method>/<model>.yaml`; for a model without such a file, the method's defaults. A method that adds log sizes to
its attention logits takes another kernel than plain attention; so the unpatched model is timed twice, as it comes and
without the flash and cuDNN kernels, and `speedup_same_path` is against the latter for such methods. `peak_mib` is what
a pass holds beyond model and images. Last come memory at 16385 tokens, and the Triton scan beside that of mamba_ssm
where that is installed.

The list is worked through from its most important end: ViT-L at 384 px first, batch 64 before batch 1, the methods that
are used most first. When the minutes are over, what was not reached is named in `<results file>.json`, which also holds
the environment. A compilation is begun only if one as long as the longest so far would still fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenzoo.apply.patch import patch_model
from tokenzoo.core.registry import list_methods
from tokenzoo.cost.report import report
from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.memory import free_memory
from tokenzoo.evaluation.runs import Run, shared_copy
from tokenzoo.evaluation.timing import clock_for, interleave, room_for_graphs

ROOT = Path(__file__).parents[2]
MODELS = {
    ("L", 384): "vit_large_patch16_384", ("B", 224): "vit_base_patch16_224", ("S", 224): "vit_small_patch16_224",
    ("L", 518): "vit_large_patch14_dinov2", ("B", 384): "vit_base_patch16_384", ("S", 518): "vit_small_patch14_dinov2",
    ("L", 224): "vit_large_patch16_224", ("S", 384): "vit_small_patch16_384", ("B", 518): "vit_base_patch14_dinov2",
}  # fmt: skip
FIRST = ("tome", "evit", "pitome", "topk", "mctf", "tofu", "turbo", "ats")  # methods that come before all others
LONG = ("vit_small_patch16_224", 2048)  # 16385 tokens
TINY = {"img_size": 64, "depth": 2, "num_classes": 10}
SMALL = "vit_tiny_patch16_224"
COLUMNS = (
    "section", "model", "img_size", "batch", "mode", "method", "setting", "ms", "ms_q1", "ms_q3", "unpatched_ms",
    "speedup", "speedup_q1", "speedup_q3", "speedup_same_path", "gmac_ratio", "speedup_per_gmac_ratio", "peak_mib",
    "unpatched_peak_mib", "tokens_out", "rounds", "note",
)  # fmt: skip
OTHER_PATH = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    section: str  # "speed", "memory" or "scan"
    model: str
    img_size: int
    batch: int
    mode: str
    method: str

    def __str__(self) -> str:
        return f"{self.section}: {self.model} at {self.img_size}, batch {self.batch}, {self.mode}, {self.method}"


@dataclass
class Bench:
    """What one run has at hand.

    Attributes:
        device: where models run.
        small: tiny models.
        rounds: how often each side of a row is timed.
        models: unpatched models that were built, the last one only: large ones would fill the device.
    """

    device: torch.device
    small: bool
    rounds: int
    models: dict[str, nn.Module] = field(default_factory=dict)

    def model(self, name: str, size: int) -> nn.Module:
        key = f"{name} {size}"
        if key not in self.models:
            self.models.clear()
            free_memory(self.device)
            torch.manual_seed(0)
            options = TINY if self.small else {"img_size": size}
            self.models[key] = timm.create_model(name, **options).eval().to(self.device, torch.bfloat16)
        return self.models[key]

    def images(self, batch: int, size: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, size, size, generator=g).to(self.device, torch.bfloat16)


def tasks(small: bool) -> Iterator[Task]:
    """Everything there is to measure, the most important first."""
    methods = ["tome", "evit", "ats"] if small else ordered_methods()
    models = {("Ti", 64): SMALL} if small else MODELS
    batches = (2, 1) if small else (64, 1)
    (_, first), name = next(iter(models.items()))
    few = methods[: 2 if small else len(FIRST)]
    # what the goals are about: the first model in every mode, methods most used
    for batch, mode in ((batches[0], "eager"), (batches[1], "eager"), (batches[1], "graph"), (batches[0], "compiled")):
        yield from (Task("speed", name, first, batch, mode, m) for m in few[: 2 if mode == "compiled" else len(few)])
    long, size = (name, first) if small else LONG
    yield from (Task("memory", long, size, 1, "eager", m) for m in few)
    yield Task("scan", "selective_scan", 64 if small else 384, batches[0], "eager", "triton")
    yield from (Task("speed", name, first, batches[0], "eager", m) for m in methods[len(few) :])
    yield from (Task("speed", name, first, batches[1], "eager", m) for m in methods[len(few) :])
    for (_, size), other in list(models.items())[1:]:
        for batch in batches:
            yield from (Task("speed", other, size, batch, "eager", m) for m in few)
    yield from (Task("speed", name, first, batch, "compiled", m) for batch in batches for m in few)
    for (_, size), other in list(models.items())[1:]:
        yield from (Task("speed", other, size, batches[1], "graph", m) for m in few)
        yield from (Task("speed", other, size, batches[0], "compiled", m) for m in few[:2])
    yield from (Task("memory", long, LONG[1] if not small else first, 1, "eager", m) for m in methods[len(few) :])


def ordered_methods() -> list[str]:
    """Methods that serve attention and have a setting for ViTs, those in `FIRST` in front."""
    have = {file.parent.name for file in (ROOT / "configs").glob("*/deit_small_patch16_224.yaml")}
    return [*FIRST, *(m for m in list_methods() if m in have and m not in FIRST)]


def setting(method: str, model: str) -> Any:
    """What `patch_model` takes: the file of that model, else the method's defaults."""
    file = ROOT / "configs" / method / f"{model}.yaml"
    if model == SMALL:  # of 17 tokens, 8 can merge
        return {"method": method, "clip": True} if method == "tome" else method
    return str(file) if file.is_file() else method


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU where there is no CUDA device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results-file", type=Path, required=True, help="file.csv; file.json is written beside it")
    args = parser.parse_args(argv)
    if args.results_file.suffix != ".csv":
        parser.error(f"--results-file {args.results_file}: give a name that ends in .csv")
    if not torch.cuda.is_available() and not args.small:
        parser.error("no CUDA device is here; --small runs the same with tiny models on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = f"python {' '.join(sys.argv if argv is None else ['benchmarks/speed/bench_cuda.py', *argv])}"
    record = environment(device) | {"command": command, "minutes": args.minutes, "cuda": torch.version.cuda}
    run(Bench(device, args.small, args.rounds), list(tasks(args.small)), 60 * args.minutes, args.results_file, record)


def run(bench: Bench, todo: list[Task], seconds: float, path: Path, record: dict[str, Any]) -> None:
    """Works the list off until the time is over; results are on disk after every row."""
    start, rows, left = time.monotonic(), [], []
    longest: dict[str, float] = {"compiled": 0.0 if bench.small else 45.0}  # seconds of one row of a mode
    seen: set[Task] = set()
    with torch.inference_mode(), room_for_graphs(512):
        for task in todo:
            if task in seen:
                continue
            seen.add(task)
            began = time.monotonic()
            if began - start + longest.get(task.mode, 0.0) > seconds:
                left.append(str(task))
                continue
            found = measured(bench, task)
            longest[task.mode] = max(longest.get(task.mode, 0.0), time.monotonic() - began)
            rows += [dict.fromkeys(COLUMNS, "") | vars(task) | row for row in found]
            for row in rows[-len(found) :]:
                said = f"{row['ms']} ms, speed-up {row['speedup']}, {row['peak_mib']} MiB {row['note']}"
                print(f"{task}: {said}", flush=True)
            write(path, rows, record | {"seconds": round(time.monotonic() - start, 1), "not_reached": []})
    write(path, rows, record | {"seconds": round(time.monotonic() - start, 1), "not_reached": left})
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s; {len(left)} were not reached, see {path.stem}.json")


def write(path: Path, rows: list[dict[str, Any]], record: dict[str, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measured(bench: Bench, task: Task) -> list[dict[str, Any]]:
    """Rows of one task; what cannot be done is a row with a note that says why."""
    try:
        if task.section == "scan":
            return scans(bench, task)
        return [memory(bench, task) if task.section == "memory" else speed(bench, task)]
    except Exception as error:  # one method that fails must not cost the others their minutes
        free_memory(bench.device)
        return [{"note": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}]


def patched(bench: Bench, task: Task) -> tuple[nn.Module, nn.Module, Run]:
    """The unpatched model and a copy under the method, on shared weights."""
    base = bench.model(task.model, task.img_size)
    own, given = shared_copy(base).eval(), Run(setting(task.method, task.model))
    patch_model(own, given.recipe(), flops=given.flops)
    return base, own, given


def speed(bench: Bench, task: Task) -> dict[str, Any]:
    """Both sides in turn, the unpatched one on either attention path."""
    base, own, given = patched(bench, task)
    size = TINY["img_size"] if bench.small else task.img_size
    images = bench.images(task.batch, size)
    dynamic = any(method.data_dependent for method in given.recipe().methods)
    biased = any(block.tokenzoo.proportional for block in own.blocks)
    sides = [(base, nullcontext), (base, partial(sdpa_kernel, list(OTHER_PATH))), (own, nullcontext)]
    calls = [ready(bench, task.mode, model, images, context, dynamic and model is own) for model, context in sides]
    peaks = [peak(bench, call) for call in calls]
    clock, _ = clock_for(bench.device)
    repeats = enough(calls[0], clock)
    steps = [partial(repeated, call, repeats) for call in calls]
    base_times, other_times, times = interleave(steps, bench.rounds, clock)
    ratios = [b / t for b, t in zip(base_times, times)]
    same = [b / t for b, t in zip(other_times if biased else base_times, times)]
    costs, unpatched = report(own, (size, size)), report(base, (size, size)).total
    gmac_ratio = None if costs.data_dependent else unpatched / costs.total
    ms = [1e3 * t / repeats for t in times]
    low, middle, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
    ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4) if len(ms) > 1 else (ratios[0],) * 3
    return {
        "setting": setting_text(task), "ms": f"{middle:.3f}", "ms_q1": f"{low:.3f}", "ms_q3": f"{high:.3f}",
        "unpatched_ms": f"{1e3 * statistics.median(base_times) / repeats:.3f}", "speedup": f"{ratio:.3f}",
        "speedup_q1": f"{ratio_low:.3f}", "speedup_q3": f"{ratio_high:.3f}",
        "speedup_same_path": f"{statistics.median(same):.3f}",
        "gmac_ratio": "" if gmac_ratio is None else f"{gmac_ratio:.3f}",
        "speedup_per_gmac_ratio": "" if gmac_ratio is None else f"{statistics.median(same) / gmac_ratio:.3f}",
        "peak_mib": peaks[2], "unpatched_peak_mib": peaks[0],
        "tokens_out": own.forward_tokens(images[:1]).length, "rounds": bench.rounds,
        "note": "counts follow the image: no ratio of multiply-adds" if gmac_ratio is None else "",
    }  # fmt: skip


def setting_text(task: Task) -> str:
    given = setting(task.method, task.model)
    return str(Path(given).relative_to(ROOT)) if isinstance(given, str) and given != task.method else "defaults"


def ready(
    bench: Bench, mode: str, model: nn.Module, images: Tensor, path: Callable[[], AbstractContextManager], dynamic: bool
) -> Callable[[], Any]:
    """A warmed-up call of a model in one of the modes."""
    call: Callable[[Tensor], Tensor] = model
    if mode == "compiled":
        backend = "eager" if bench.small else "inductor"
        call = torch.compile(model, backend=backend, dynamic=None if dynamic else False, fullgraph=not dynamic)

    def step() -> Tensor:
        with path():
            return call(images)

    for _ in range(3):
        step()
    if mode != "graph":
        return step
    if bench.device.type != "cuda":
        raise RuntimeError("CUDA graphs need a CUDA device")
    if dynamic:
        raise RuntimeError("the host looks at counts in every pass, which a CUDA graph cannot hold")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def repeated(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def enough(call: Callable[[], Any], clock: Callable[[], float]) -> int:
    """Calls per timing that take about 30 ms, so that the clock's own cost does not show."""
    start = clock()
    call()
    return max(1, min(50, round(0.03 / max(clock() - start, 1e-6))))


def peak(bench: Bench, call: Callable[[], Any]) -> str:
    """MiB that a pass holds beyond what stands already; empty on the CPU."""
    if bench.device.type != "cuda":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def memory(bench: Bench, task: Task) -> dict[str, Any]:
    """Peak memory of one image of many tokens, under the method and unpatched."""
    base, own, _ = patched(bench, task)
    images = bench.images(1, TINY["img_size"] if bench.small else task.img_size)
    found = []
    for model in (base, own):
        model(images)
        free_memory(bench.device)
        found.append(peak(bench, partial(model, images)))
    note = "" if bench.device.type == "cuda" else "peak memory is read on CUDA devices only"
    tokens = own.forward_tokens(images).length
    return {
        "setting": setting_text(task), "peak_mib": found[1], "unpatched_peak_mib": found[0], "tokens_out": tokens,
        "note": note,
    }  # fmt: skip


def scans(bench: Bench, task: Task) -> list[dict[str, Any]]:
    """The selective scan of one Vim layer in each form that runs here; `unpatched_ms` is that of mamba_ssm."""
    from tokenzoo.layers import selective_scan

    cuda = bench.device.type == "cuda"
    batch, channels, length = (2, 8, 33) if bench.small else (16, 2 * task.img_size, 1025)
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(bench.device)  # noqa: E731
    u, delta, z = (rand(batch, length, channels).transpose(1, 2) for _ in range(3))
    B, C = (rand(batch, 2, 16, length) for _ in range(2))
    A = -torch.arange(1.0, 17, device=bench.device).repeat(channels, 1)
    D, bias = torch.ones(channels, device=bench.device), torch.full((channels,), -4.6, device=bench.device)
    calls: dict[str, Callable[[], Any]] = {}
    for form in ("triton", "chunked") if cuda else ("blocked", "loop"):
        calls[form] = partial(selective_scan, u, delta, A, B, C, D, z, bias, True, backend=form)
    note = ""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        dense = [x.contiguous() for x in (u, delta)]
        calls["mamba_ssm"] = partial(selective_scan_fn, *dense, A, B, C, D, z.contiguous(), bias, True)
    except ImportError:
        note = "mamba_ssm is not installed"
    for call in calls.values():
        repeated(call, 3)
    clock, _ = clock_for(bench.device)
    repeats = enough(next(iter(calls.values())), clock)
    times = dict(zip(calls, interleave([partial(repeated, c, repeats) for c in calls.values()], bench.rounds, clock)))
    rows = []
    for form, found in times.items():
        beside = times.get("mamba_ssm")
        ratios = [] if beside is None else [b / t for b, t in zip(beside, found)]
        rows.append({
            "method": form, "setting": f"channels {channels}, length {length}, 2 groups, 16 states, float32",
            "ms": f"{1e3 * statistics.median(found) / repeats:.3f}", "batch": batch,
            "unpatched_ms": "" if beside is None else f"{1e3 * statistics.median(beside) / repeats:.3f}",
            "speedup": f"{statistics.median(ratios):.3f}" if ratios else "", "rounds": bench.rounds, "note": note,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
