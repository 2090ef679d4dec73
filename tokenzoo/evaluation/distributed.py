"""Processes that work together: started by torchrun, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: number of the process over all nodes.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, float64; what was given stays this process's own."""
        if self.size == 1:
            return values.double()
        values = values.to(self.device, torch.float64, copy=True)
        dist.all_reduce(values)
        return values

    def gather(self, own: Any) -> list[Any]:
        """What every process has, by rank; anything that can be pickled."""
        if self.size == 1:
            return [own]
        everything = [None] * self.size
        dist.all_gather_object(everything, own)
        return everything

    def names(self, found: list[str]) -> list[str]:
        """The lists of all processes, one after another."""
        return [name for part in self.gather(found) for name in part]

    def of_main(self, own: Any) -> Any:
        """What the first process has; the same in all of them."""
        if self.size == 1:
            return own
        box = [own]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, count: int) -> range:
        """This process's part of so many things: neighbours, so that the parts in order of rank are all in order."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends all processes where one of them fails inside, instead of leaving the others waiting for it.

        What stands inside must not wait for other processes itself.

        Raises:
            ValueError: in the processes that did not fail, with the message of one that did.
        """
        if self.size == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        messages = self.gather(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank} stopped: {message}")

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()


ALONE = World(0, 1, torch.device("cpu"))  # the device is only where processes meet


@contextmanager
def join(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started (RANK and WORLD_SIZE in the environment); leaves them at the end.

    Args:
        device: "cpu", "cuda" or "cuda:1"; with several processes on "cuda" each takes the one of its LOCAL_RANK.

    Raises:
        ValueError: a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if size > 1 and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {chosen}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()
