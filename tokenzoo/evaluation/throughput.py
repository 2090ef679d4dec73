"""Speed of several runs, measured round robin so that drift of the machine hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..adapters.registry import around_of
from ..apply.expected import expected_share
from ..apply.patch import recipe
from .runs import Candidate, Precision, Run, forward_counted, image_size, param_count, prepare
from .timing import Spread, clock_for, compiled, interleave, room_for_graphs, warm_up


@dataclass(frozen=True)
class Speed:
    """What one run took.

    Attributes:
        method: names of the methods, "unpatched" without one.
        method_kwargs: options as given.
        label: both in one short text.
        recipe: what `tokenzoo.patch_model` takes to get this run again, solved strengths included; None if unpatched.
        step_times: seconds of one batch, a value a round.
        latency_times: seconds of one image, a value a round; empty if not measured.
        speedups: unpatched time over this run's time, within each round.
        latency_speedups: the same for one image.
        batch_size: images per step.
        input_size: channels, height, width.
        gmacs: 1e9 multiply-adds an image (mean over the images given where they depend on these and can be followed one
            by one, else of a random one).
        gmac_ratio: the unpatched model's over this run's.
        tokens_out: mean tokens that reach the head on the images used; None if unknown.
        attn_impl: "fused" or "unfused"; "" for an unpatched backbone that is not served.
        param_count: millions.
        compiled: backend of torch.compile, "" for eager.
        precision: number formats in words.
        clock: what times are.
        peak_memory_mb: most memory allocated on the device during one batch (MiB, weights included); None on CPU.
    """

    method: str
    method_kwargs: dict[str, Any]
    label: str
    recipe: dict[str, Any] | None
    step_times: list[float]
    latency_times: list[float]
    speedups: list[float]
    latency_speedups: list[float]
    batch_size: int
    input_size: tuple[int, int, int]
    gmacs: float
    gmac_ratio: float
    tokens_out: float | None
    attn_impl: str
    param_count: float
    compiled: str
    precision: str
    clock: str
    peak_memory_mb: float | None

    @property
    def speedup(self) -> float:
        """Median over the rounds of unpatched time / own time."""
        return Spread.of(self.speedups).median

    @property
    def speedup_per_gmac_ratio(self) -> float:
        """1 where every multiply-add saved is time saved."""
        return self.speedup / self.gmac_ratio

    def row(self) -> dict[str, Any]:
        """Flat values under timm's column names; times in milliseconds."""
        step, ratio = Spread.of(self.step_times), Spread.of(self.speedups)
        latency = Spread.of(self.latency_times) if self.latency_times else None
        latency_ratio = Spread.of(self.latency_speedups) if self.latency_speedups else None
        height, width = self.input_size[1:]
        return {
            "method": self.method,
            "method_kwargs": self.method_kwargs,
            "infer_samples_per_sec": round(self.batch_size / step.median, 2),
            "infer_step_time": _ms(step.median),
            "infer_step_time_q1": _ms(step.q1),
            "infer_step_time_q3": _ms(step.q3),
            "infer_batch_size": self.batch_size,
            "infer_img_size": height if height == width else f"{height}x{width}",
            "infer_gmacs": round(self.gmacs, 4),
            "param_count": self.param_count,
            "tokens_out": _rounded(self.tokens_out, 2),
            "attn_impl": self.attn_impl,
            "latency_b1_ms": latency and _ms(latency.median),
            "latency_b1_q1_ms": latency and _ms(latency.q1),
            "latency_b1_q3_ms": latency and _ms(latency.q3),
            "latency_speedup": latency_ratio and round(latency_ratio.median, 4),
            "speedup": round(ratio.median, 4),
            "speedup_q1": round(ratio.q1, 4),
            "speedup_q3": round(ratio.q3, 4),
            "gmac_ratio": round(self.gmac_ratio, 4),
            "speedup_per_gmac_ratio": round(self.speedup_per_gmac_ratio, 4),
            "peak_memory_mb": _rounded(self.peak_memory_mb, 1),
            "rounds": len(self.step_times),
            "compiled": self.compiled,
            "precision": self.precision,
            "clock": self.clock,
            "recipe": self.recipe,
            "step_times_ms": [_ms(t) for t in self.step_times],
            "latency_times_ms": [_ms(t) for t in self.latency_times],
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def bench(
    model: nn.Module,
    runs: Sequence[Run],
    *,
    batch_size: int = 8,
    rounds: int = 20,
    warmup: int = 3,
    latency: bool = True,
    input_size: tuple[int, int, int] | None = None,
    precision: Precision | None = None,
    compiler: str | None = None,
    seed: int = 0,
    images: Tensor | None = None,
    progress: bool | None = False,
    clock: Callable[[], float] | None = None,
) -> list[Speed]:
    """Throughput and batch-1 latency of the unpatched model and of every run, on random images or on those given.

    The model is not changed. When memory runs out during warm-up the batch is halved for all runs.

    Args:
        model: unpatched, on the device to use.
        runs: what to compare with it.
        batch_size: images per step.
        rounds: steps of each run that are timed.
        warmup: steps of each run before that; compilation falls into them.
        latency: also time one image.
        input_size: channels, height, width; the model's own by default.
        precision: number formats, the model's own by default.
        compiler: backend of torch.compile, None for eager.
        seed: of the random images.
        images: to measure on, normalised [M, C, H, W]: every round takes the next batch of them, all runs the same.
            Where counts follow the image, random ones say little.
        progress: bar on stderr; None shows it on a terminal only.
        clock: replaces the clock that fits the device.

    Returns:
        One result a run, the unpatched model first.

    Raises:
        ValueError: counts below one, not even one image fits, a run that cannot be reached, a patched model, images of
            another shape or too few for one batch.
        TypeError: a model that is not served.
    """
    from tqdm import tqdm

    for name, value in (("batch size", batch_size), ("rounds", rounds), ("warm-up", warmup)):
        if value < 1:
            raise ValueError(f"bench: {name} is {value}; give at least 1")
    precision = (precision or Precision()).of(model)
    size = _size(model, input_size, images, batch_size)
    device = next(model.parameters()).device
    candidates = prepare(model, runs, size, precision.dtype)
    own = images is not None
    if images is None:
        images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(seed))
    images = images.to(device, precision.dtype)
    own_clock, clock_name = clock_for(device)
    total = rounds * len(candidates) * (1 + latency)
    with torch.inference_mode(), precision.autocast(device), room_for_graphs(2 * len(candidates)):
        if own:
            candidates = [_on_images(c, candidates[0], images) for c in candidates]
        calls = [compiled(c, compiler) for c in candidates]
        fits = len(warm_up(candidates, calls, images[:batch_size], warmup))
        batches = images[: len(images) // fits * fits].split(fits)  # all of one size
        _meet(calls, batches[1 : warmup + 1])
        memory = [_peak_memory(call, batches[0]) for call in calls]
        tokens = [_tokens_out(c, batches) for c in candidates]
        with tqdm(total=total, unit="step", disable=None if progress is None else not progress) as bar:
            given = (rounds, clock or own_clock, bar.update)
            measured = [_timed(calls, batches, *given)]
            if latency:
                singles = images.split(1) if own else [images[:1]]
                warm_up(candidates, calls, singles[0], warmup)
                _meet(calls, singles[1 : warmup + 1])
                measured.append(_timed(calls, singles, *given))
    base = candidates[0].gmacs
    return [
        Speed(
            method=c.run.name,
            method_kwargs=c.run.settings(),
            label=c.run.label,
            recipe=recipe(c.model) if is_patched(c.model) else None,
            step_times=measured[0][i],
            latency_times=measured[1][i] if latency else [],
            speedups=_ratios(measured[0], i),
            latency_speedups=_ratios(measured[1], i) if latency else [],
            batch_size=len(batches[0]),
            input_size=size,
            gmacs=c.gmacs,
            gmac_ratio=base / c.gmacs,
            tokens_out=tokens[i],
            attn_impl=c.attn_impl,
            param_count=param_count(c.model),
            compiled=compiler or "",
            precision=str(precision),
            clock="given" if clock else clock_name,
            peak_memory_mb=memory[i],
        )
        for i, c in enumerate(candidates)
    ]


def _peak_memory(call: Callable[[Tensor], Tensor], images: Tensor) -> float | None:
    if images.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(images.device)
    call(images)
    return torch.cuda.max_memory_allocated(images.device) / 2**20


def _size(
    model: nn.Module, input_size: tuple[int, int, int] | None, images: Tensor | None, batch_size: int
) -> tuple[int, int, int]:
    """Channels, height and width of what is measured.

    Raises:
        ValueError: images of another shape, or too few for one batch.
    """
    size = input_size or image_size(model)
    if images is None:
        return size
    if images.dim() != 4 or (input_size is not None and tuple(images.shape[1:]) != size):
        wanted = "channels, height, width" if input_size is None else ", ".join(map(str, size))
        raise ValueError(f"bench: images of shape {tuple(images.shape)}; give normalised ones [M, {wanted}]")
    if len(images) < batch_size:
        raise ValueError(f"bench: {len(images)} images, but a batch is {batch_size}; give more, or a smaller batch")
    return tuple(images.shape[1:])


def _on_images(candidate: Candidate, plain: Candidate, images: Tensor) -> Candidate:
    """A candidate with the multiply-adds that images cost, where these decide and can be followed one by one."""
    decide = any(method.data_dependent for method in candidate.run.methods)
    if not decide or around_of(candidate.model) is not None:
        return candidate
    try:
        return candidate._replace(gmacs=plain.gmacs * expected_share(candidate.model, images))
    except ValueError:  # tokens come back, or a new sequence begins
        return candidate


def _meet(calls: Sequence[Callable[[Tensor], Tensor]], batches: Sequence[Tensor]) -> None:
    """Shows compiled graphs other images before they are timed: other counts are compiled anew, once."""
    for batch in batches:
        for call in calls:
            call(batch)


def _timed(
    calls: Sequence[Callable[[Tensor], Tensor]], batches: Sequence[Tensor], rounds: int, clock: Callable[[], float],
    tick: Callable[[], Any],
) -> list[list[float]]:  # fmt: skip
    """Seconds of every call, a value a round; the rounds go through the batches, from the front again at the end."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        steps = [partial(call, batches[number % len(batches)]) for call in calls]
        for row, own in zip(times, interleave(steps, 1, clock, tick)):
            row += own
    return times


def _tokens_out(candidate: Candidate, batches: Sequence[Tensor]) -> float | None:
    """Mean over all images; of the first batch where all have as many."""
    decide = any(method.data_dependent for method in candidate.run.methods)
    found = [forward_counted(candidate.model, images)[1] for images in batches[: None if decide else 1]]
    return None if found[0] is None else torch.cat(found).double().mean().item()


def _ratios(times: list[list[float]], index: int) -> list[float]:
    return [base / own for base, own in zip(times[0], times[index])]

