"""Taking times: clocks that fit the device, round robin, warm-up, compilation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .memory import free_memory, is_out_of_memory
from .runs import Candidate

_log = logging.getLogger(__name__)


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of values."""
        q1, median, q3 = (float(q) for q in np.percentile(values, (25, 50, 75)))
        return cls(median, q1, q3)


def clock_for(device: torch.device) -> tuple[Callable[[], float], str]:
    """A clock in seconds and its name: process time for one CPU thread, else wall time, the device waited for."""
    if device.type == "cpu":
        return (time.process_time, "cpu time") if torch.get_num_threads() == 1 else (time.perf_counter, "wall time")
    synchronize = torch.get_device_module(device).synchronize

    def synchronized() -> float:
        synchronize(device)
        return time.perf_counter()

    return synchronized, "wall time, synchronized"


def interleave(
    steps: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float], tick: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """Times steps round robin: A B C A B C ...

    Args:
        steps: what to time.
        rounds: how often each one is timed.
        clock: seconds.
        tick: called after every step, outside of the timing.

    Returns:
        Seconds, one list a step with one value a round.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, row in zip(steps, times):
            start = clock()
            step()
            row.append(clock() - start)
            tick()
    return times


def compiled(candidate: Candidate, compiler: str | None) -> Callable[[Tensor], Tensor]:
    """What is timed: the model itself, or compiled with a backend of torch.compile.

    Raises:
        ValueError: unknown backend.
    """
    if compiler is None:
        return candidate.model
    if compiler not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"--torchcompile {compiler!r} is not a backend of torch.compile; use one of {usual}")
    # fullgraph: a graph break or a full cache must not fall back to eager unseen; data-dependent counts need breaks
    dynamic = any(m.data_dependent for m in candidate.run.methods)
    return torch.compile(candidate.model, backend=compiler, dynamic=None if dynamic else False, fullgraph=not dynamic)


def room_for_graphs(graphs: int) -> AbstractContextManager:
    """Context with a large enough graph cache: all candidates run the same Python code and share one."""
    import torch._dynamo.config as dynamo

    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # the name until torch 2.6
    return dynamo.patch(**{name: max(graphs, getattr(dynamo, name))})


def warm_up(candidates: list[Candidate], calls: list[Callable], images: Tensor, times: int) -> Tensor:
    """Runs every candidate; returns the images of the largest batch that all of them can hold."""
    while True:
        reason = None
        for candidate, call in zip(candidates, calls):
            try:
                for _ in range(times):
                    call(images)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"{candidate.run.label}: {str(error).partition(chr(10))[0] or type(error).__name__}"
                break
        if reason is None:
            return images
        if len(images) == 1:
            raise ValueError(
                f"not even one image of {tuple(images.shape[1:])} fits into the memory of {images.device} ({reason}); "
                "use a smaller --img-size, a smaller model or another --device"
            )
        images = images[: len(images) // 2]
        _log.warning("out of memory, going on with batch %d (%s)", len(images), reason)
        free_memory(images.device)
