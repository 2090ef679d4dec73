"""Which form of the selective scan runs: chosen by device, or forced."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("blocked", "loop", "chunked", "triton", "mamba_ssm")
_forced: list[str] = []  # innermost `scan_backend` last


@contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Force one form of the selective scan inside a `with` statement; an argument of the call still wins.

    The choice holds for the whole process, all threads.

    Args:
        name: "blocked" (default on a CPU), "loop", "chunked" (default in exported graphs and on devices without
            Triton), "triton" (default on CUDA) or "mamba_ssm" (preferred on CUDA where that package is installed).

    Raises:
        ValueError: The name is unknown.
    """
    _check_name(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose_backend(u: Tensor, own_decay: bool = False, resumed: bool = False) -> str:
    """Name the form of the selective scan that runs for an input.

    Args:
        u: Input of the scan.
        own_decay: Whether `decay_dt` is given.
        resumed: Whether an initial state is given.
    """
    if _forced:
        return _forced[-1]
    if _exporting():
        return "chunked"  # plain operators, few of them
    if u.device.type == "cpu":
        return "blocked"
    if u.device.type == "cuda":
        plain = not (own_decay or resumed or torch.compiler.is_compiling() or u.dtype == torch.float64)
        if plain and _installed("mamba_ssm"):
            return "mamba_ssm"
        if _installed("triton"):
            return "triton"
    return "chunked"


def resolve_backend(backend: str | None, u: Tensor, own_decay: bool, resumed: bool) -> str:
    """The form that runs: an argument, or the choice; raises where it cannot serve the call."""
    if backend is not None:
        _check_name(backend)
    name = backend or choose_backend(u, own_decay, resumed)
    if name == "triton":
        _check_triton(u)
    if name == "mamba_ssm":
        _check_mamba_ssm(u, own_decay, resumed)
    return name


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"selective_scan: backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")


def _check_triton(u: Tensor) -> None:
    if not _installed("triton"):
        raise ValueError(
            "selective_scan: backend 'triton' needs the package triton; install it (pip install triton) or use "
            "backend='chunked'"
        )
    if u.device.type != "cuda" and not (u.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"selective_scan: backend 'triton' needs CUDA tensors, u is on {u.device}; move the model and its input "
            "to a CUDA device or use backend='blocked'"
        )


def _check_mamba_ssm(u: Tensor, own_decay: bool, resumed: bool) -> None:
    remedy = "use backend='triton' on CUDA, backend='blocked' on a CPU"
    if not _installed("mamba_ssm"):
        raise ValueError(f"selective_scan: backend 'mamba_ssm' needs the package mamba_ssm; install it or {remedy}")
    if u.device.type != "cuda":
        raise ValueError(f"selective_scan: backend 'mamba_ssm' needs CUDA tensors, u is on {u.device}; {remedy}")
    for given, what in ((own_decay, "decay_dt"), (resumed, "initial_state")):
        if given:
            raise ValueError(f"selective_scan: backend 'mamba_ssm' takes no {what}; {remedy}")
    if u.dtype == torch.float64:
        raise ValueError(f"selective_scan: backend 'mamba_ssm' takes no float64 input; {remedy}")


def _exporting() -> bool:
    """Whether a graph for export is recorded, whose operators must be torch's own."""
    if torch.jit.is_tracing():
        return True
    if hasattr(torch.compiler, "is_exporting"):  # torch >= 2.7
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
