"""The measured parts of the throughput model in docs/scaling.md, on one thread of this machine.

    python benchmarks/training/measure_scaling.py --results-file benchmarks/training/scaling_cpu.csv

Steps and decoding: processor time, so that other work on the machine hardly counts; all variants in turn, median and
quartiles. Checkpoints: wall time and size of a file with model, average, and optimizer, read back and checked as in a
run. Random weights and random pictures.
"""

from __future__ import annotations

import argparse
import io
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.results import write_results
from tokenzoo.training.augment import training_transform
from tokenzoo.training.build import build
from tokenzoo.training.checkpoints import Checkpoints, Place
from tokenzoo.training.losses import TrainStep
from tokenzoo.training.optim import build_optimizer
from tokenzoo.training.options import parse_options

MODEL = "deit_small_patch16_224"
STEPS = {
    "unpatched": [],
    "tome r=13": ["--method", "tome", "--method-kwargs", "r=13"],
    "evit": ["--method", "evit"],
    "mctf r=16, consistency": ["--method", "mctf", "--method-kwargs", "r=16", "--consistency", "3"],
}
COLUMNS = ("what", "unit", "median", "q1", "q3", "setting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--checkpoint-models", nargs="*", default=[MODEL, "deit_base_patch16_224"])
    parser.add_argument("--results-file", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*decoding(args.rounds), *steps(args.rounds, args.batch_size)]
    for model in args.checkpoint_models:
        rows += checkpoints(model, args.rounds)
    for row in rows:
        print("  ".join(str(row[column]) for column in COLUMNS), flush=True)
    if args.results_file is not None:
        command = f"python benchmarks/training/measure_scaling.py {shlex.join(sys.argv[1:])}"
        record = environment("cpu") | {"command": command}
        write_results(args.results_file, rows, COLUMNS, record)


def _row(what: str, unit: str, values: list[float], setting: str) -> dict[str, str]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"what": what, "unit": unit, "setting": setting} | {
        name: f"{value:.4g}" for name, value in (("median", middle), ("q1", low), ("q3", high))
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _options(model: str, *more: str) -> argparse.Namespace:
    return parse_options(["--model", model, "--device", "cpu", "--data-dir", ".", "--output", ".", *more])


def decoding(rounds: int) -> list[dict[str, str]]:
    """A JPEG of ImageNet's usual size to an augmented image of 224 pixels."""
    generator = torch.Generator().manual_seed(0)
    files = [_jpeg(500, 375, 110_000, generator) for _ in range(16)]
    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    deit = training_transform(config, _options(MODEL, "--aa", "rand-m9-mstd0.5-inc1"))
    plain = training_transform(config, _options(MODEL, "--color-jitter", "0"))
    size = sum(map(len, files)) / len(files)
    rows = []
    for name, transform in (("decoding, DeiT's augmentation", deit), ("decoding, random crop and flip", plain)):

        def read(transform: Callable = transform) -> None:
            for content in files:
                with Image.open(io.BytesIO(content)) as image:
                    transform(image.convert("RGB"))

        read()
        speeds = [len(files) / _seconds(read) for _ in range(rounds)]
        rows.append(_row(name, "images/s", speeds, f"500 x 375 JPEG, {size / 1e3:.0f} kB, to 224 pixels, one core"))
    return rows


def _jpeg(width: int, height: int, size: int, generator: torch.Generator) -> bytes:
    """Clouds, noisy enough for a file of about the size."""
    clouds = torch.rand(1, 3, 12, 16, generator=generator)
    clouds = torch.nn.functional.interpolate(clouds, size=(height, width), mode="bicubic")[0] * 200
    noise = torch.randn(3, height, width, generator=generator)
    content = b""
    for strength in range(0, 60):
        stream = io.BytesIO()
        pixels = (clouds + strength * noise).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=90)
        content = stream.getvalue()
        if len(content) >= size:
            break
    return content


def steps(rounds: int, batch_size: int) -> list[dict[str, str]]:
    """Forward, backward and update of a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, generator=generator)
    target = torch.arange(batch_size)
    variants = {}
    for name, words in STEPS.items():
        args = _options(MODEL, *words)
        model = build(args, 1000, torch.device("cpu")).model
        variants[name] = (TrainStep(model, None, args).train(), build_optimizer(model, args, 1e-5))

    def update(step: TrainStep, optimizer: torch.optim.Optimizer) -> None:
        step(images, target)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for variant in variants.values():
        update(*variant)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(_seconds(lambda variant=variant: update(*variant)))
    setting = f"{MODEL}, batch {batch_size}, float32, one thread"
    rows = [
        _row(f"training step, {name}", "images/s", [batch_size / t for t in seconds], setting)
        for name, seconds in times.items()
    ]
    rows += [
        _row(f"share of the unpatched step's time, {name}", "1", [t / u for t, u in zip(seconds, times["unpatched"])],
             setting)
        for name, seconds in times.items() if name != "unpatched"
    ]  # fmt: skip
    return rows


def checkpoints(name: str, rounds: int) -> list[dict[str, str]]:
    """Size and times of a checkpoint."""
    from timm.utils import ModelEmaV3

    args = _options(name)
    model = build(args, 1000, torch.device("cpu")).model
    optimizer = build_optimizer(model, args, 1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    average = ModelEmaV3(model).module
    state = {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
    written, read = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(Path(folder))
        for number in range(rounds):
            start = time.perf_counter()
            path = store.save(Place(number, 0), state)
            written.append(time.perf_counter() - start)
        for _ in range(rounds):
            start = time.perf_counter()
            if store.load() is None:
                raise RuntimeError(f"{path} cannot be read back")
            read.append(time.perf_counter() - start)
        size = path.stat().st_size
    count = sum(p.numel() for p in model.parameters())
    setting = f"{name}, {count / 1e6:.2f} M parameters, model, average and AdamW"
    return [
        _row("checkpoint, size", "bytes a parameter", [size / count], setting),
        _row("checkpoint, size", "MB", [size / 1e6], setting),
        _row("checkpoint, write, sync and read back", "s", written, setting),
        _row("checkpoint, check and load", "s", read, setting),
    ]


if __name__ == "__main__":
    main()
