"""The most memory that a call holds at once, beyond what lay there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HOW = {
    "cpu": "tensors allocated and not yet freed, as torch's profiler notes every allocation of the host",
    "cuda": "torch.cuda.max_memory_allocated",
}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that tensors take at once while a function runs, at most; weights and inputs lay there before.

    On a CPU it follows the allocations of tensors, of operators' own buffers too, and not the resident set, which
    depends on what the C library gives back and when. What a library allocates past torch is not seen there.

    Args:
        call: what to run, once.
        device: where its tensors lie.

    Returns:
        Bytes; None on devices whose allocations torch does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most
