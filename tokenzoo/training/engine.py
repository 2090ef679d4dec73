"""One epoch of any trainer: batches in, updates out; a loss that is no number stops the run before it is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..evaluation.distributed import World
from ..evaluation.runs import Precision
from .batches import Batch
from .keep_rate import KeepRateWarmup
from .losses import PARTS
from .sharding import load_optimizer, load_weights, whole, without_sync


class Diverged(ValueError):
    """The loss is no number any more."""


class Step(Protocol):
    """A model with its losses, a module: called with images, target and the number of the update."""

    model: nn.Module
    parts: tuple[str, ...]  # what comes back beside "loss": parts of `PARTS`, then those that methods bring

    def __call__(self, images: Tensor, target: Tensor, update: int) -> dict[str, Tensor]: ...


class Batches(Protocol):
    """The batches of a training set; what is drawn for an epoch depends on its number alone."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]: ...


class Rates(Protocol):
    """A schedule: sets the learning rates of an update and returns the highest."""

    def set(self, epoch: int, update: int) -> float: ...


class Average(Protocol):
    """Averaged weights, such as timm's `ModelEmaV3`."""

    module: nn.Module

    def update(self, model: nn.Module, step: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How batches become updates.

    Args:
        clip_grad: limit of the gradients, None for none.
        clip_mode: what is limited: "norm", "value" or "agc".
        grad_accum_steps: batches per update.
        log_interval: updates between looks at the loss on an accelerator.
        recovery_interval: updates between checkpoints inside an epoch, 0 for none.
    """

    clip_grad: float | None = None
    clip_mode: str = "norm"
    grad_accum_steps: int = 1
    log_interval: int = 50
    recovery_interval: int = 0


@dataclass(kw_only=True)
class Engine:
    """All that changes while a model trains.

    Args:
        step: the model with its losses.
        wrapped: the same, or DDP around it; under FSDP the step itself, sharded.
        optimizer: of the model's parameters.
        schedule: of the learning rate.
        ema: averaged weights, None for none.
        warmup: of the keep rate, None for none.
        batches: of the training set.
        precision: number formats.
        world: this process among all.
        pace: how batches become updates.
        diverged: what to say of a loss that is no number: its value, the epoch and the batch.
    """

    step: Step
    wrapped: nn.Module
    optimizer: Optimizer
    schedule: Rates
    ema: Average | None = None
    warmup: KeepRateWarmup | None = None
    batches: Batches
    precision: Precision
    world: World
    pace: Pace
    diverged: Callable[[float, int, int], str]
    scaler: Any = field(init=False)
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        half = self.precision.amp == torch.float16
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self.clear()

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts whose sums are kept: those of `PARTS`, there or not, then those that methods bring."""
        return (*PARTS, *(part for part in self.step.parts if part not in PARTS))

    @property
    def updates(self) -> int:
        """Updates an epoch has; the last may see fewer batches."""
        return -(-len(self.batches) // self.pace.grad_accum_steps)

    def clear(self) -> None:
        """Forgets the losses summed so far."""
        # batches, losses that are no numbers, the loss and its parts
        self.sums = torch.zeros(3 + len(self.parts), dtype=torch.float64, device=self.world.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this; all processes have to ask for it, and the first one gets it whole."""
        state = {
            "model": self.step.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return whole(state, self.world.main)

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        load_weights(self.step.model, state["model"])
        if self.ema is not None:
            load_weights(self.ema.module, state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def run_epoch(self, epoch: int, first: int = 0, save: Callable[[int], None] | None = None) -> dict[str, float]:
        """Trains for one epoch.

        Args:
            epoch: its number.
            first: first batch, the beginning of an update.
            save: called inside the epoch with the next batch's number, every --recovery-interval updates.

        Returns:
            The highest learning rate and the keep rate of the last update (None without one), and mean losses.

        Raises:
            Diverged: the loss is no number; what was saved last is sound.
        """
        pace, total = self.pace, len(self.batches)
        self.wrapped.train()
        lr = keep_rate = None
        for batch in self.batches.epoch(epoch, first):
            number, inside = divmod(batch.index, pace.grad_accum_steps)
            update = epoch * self.updates + number
            share = min(pace.grad_accum_steps, total - number * pace.grad_accum_steps)
            if inside == 0:
                lr = self.schedule.set(epoch, update)
                if self.warmup is not None:
                    keep_rate = self.warmup.set(self.step.model, epoch, update)
                    if self.ema is not None:  # a copy, which knows nothing of updates
                        self.warmup.set(self.ema.module, epoch, update)
            closes = inside == share - 1
            waits = nullcontext() if closes or self.world.size == 1 else without_sync(self.wrapped)
            with waits:
                with self.precision.autocast(self.world.device):
                    losses = self.wrapped(batch.images, batch.target, update)
                self._note(losses)
                if self.world.size == 1 and self.world.device.type == "cpu":
                    self.check(epoch, batch.index)  # costs nothing here, and the weights stay sound
                self.scaler.scale(losses["loss"] / share).backward()
            if not closes:
                continue
            self._update(update)
            done = batch.index + 1
            if (number + 1) % pace.log_interval == 0:
                self.check(epoch, batch.index)
            if save is not None and pace.recovery_interval and (number + 1) % pace.recovery_interval == 0:
                if done < total:
                    self.check(epoch, batch.index)
                    save(done)
        self.check(epoch, total - 1)
        values = self.world.total(self.sums).tolist()
        names = ("train_loss", *(f"train_{part}" for part in self.parts))
        means = {name: value / values[0] for name, value in zip(names, values[2:])}
        absent = {f"train_{part}" for part in PARTS} - {f"train_{part}" for part in self.step.parts}
        return {"lr": lr, "keep_rate": keep_rate, **{k: v for k, v in means.items() if k not in absent}}

    def _note(self, losses: dict[str, Tensor]) -> None:
        loss = losses["loss"].detach().double()
        zero = torch.zeros_like(loss)
        parts = [losses[part].detach().double() if part in losses else zero for part in self.parts]
        self.sums += torch.stack([zero + 1, (~loss.isfinite()).double(), loss, *parts])

    def _update(self, update: int) -> None:
        from timm.utils import dispatch_clip_grad

        if self.pace.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.step.model.parameters(), self.pace.clip_grad, self.pace.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.step.model, step=update + 1)

    def check(self, epoch: int, batch: int) -> None:
        """Stops all processes if a loss was no number in any of them."""
        broken, value = self.world.total(self.sums[1:3]).tolist()
        if broken > 0:
            raise Diverged(self.diverged(value, epoch, batch))
