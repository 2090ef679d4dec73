"""A small trainer for segmentation models: a head on a frozen backbone, or the whole model, patched or not."""

from __future__ import annotations

import copy
import csv
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core.safe_files import read_torch
from ...dense.checkpoints import load_state
from ...dense.storage import save_segmenter
from ...evaluation.distributed import World
from ...evaluation.runs import Precision
from ...evaluation.segmentation.confusion import areas, confusion_matrix, scores
from ..checkpoints import write_whole
from ..engine import Engine, Pace
from .augment import Gallery, Views
from .step import RisingAverage, SegmentStep, StepRates, ViewBatches, class_weights, normalisation

_log = logging.getLogger(__name__)
COLUMNS = ("epoch", "lr", "train_loss", "val_miou", "val_aacc", "seconds")


@dataclass(frozen=True, kw_only=True)
class SegmentTraining:
    """Everything that decides the weights that come out, besides model and data.

    Args:
        epochs: passes over the pictures.
        batch_size: views a step.
        lr: peak learning rate.
        opt: timm's name of the optimizer.
        weight_decay: of matrices; norms and biases have none.
        sched: timm's name of the schedule.
        warmup_epochs: of a linear warm-up.
        min_lr: where the schedule ends.
        clip_grad: largest norm of all gradients; None for no limit.
        freeze_encoder: train the head only.
        class_weights: "none", or "sqrt-inverse" (one over the root of a class's share of the pixels, mean 1).
        ema: decay of the averaged weights that are kept; 0 keeps the last ones.
        amp: autocast in bfloat16.
        seed: of views, order and stochastic depth.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        threads: CPU threads, None for torch's own choice.
    """

    epochs: int = 100
    batch_size: int = 8
    lr: float = 1e-3
    opt: str = "adamw"
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: int = 5
    min_lr: float = 1e-5
    clip_grad: float | None = 1.0
    freeze_encoder: bool = False
    class_weights: str = "none"
    ema: float = 0.0
    amp: bool = False
    seed: int = 0
    eval_every: int = 10
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; give a whole number of at least 1")
        if not self.lr > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"lr={self.lr} has to be positive and ema={self.ema} in [0, 1)")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad={self.clip_grad} has to be positive; None sets no limit")
        if self.sched == "plateau":
            raise ValueError("sched='plateau' waits for results between epochs, which this trainer does not give it")
        if self.class_weights not in ("none", "sqrt-inverse"):
            raise ValueError(f"class_weights={self.class_weights!r}; use 'none' or 'sqrt-inverse'")


def train_segmenter(
    model: nn.Module,
    train: Gallery,
    val: Gallery | None,
    views: Views,
    options: SegmentTraining,
    output: Path,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains a segmentation model; what is drawn at random depends on seed and epoch only.

    Args:
        model: a `Segmenter`, on its device; its encoder may be patched.
        train: pictures to learn from.
        val: pictures to evaluate on, None for none.
        views: how views are cut out.
        options: everything else.
        output: folder for last.pt, summary.csv and model.safetensors (the last, or averaged, weights in float16).
        resume: go on from last.pt if there is one.
        progress: called with the row of every finished epoch.

    Returns:
        One row an epoch, see `COLUMNS`.

    Raises:
        ValueError: fewer pictures than a batch, a last.pt of other options, other views, another number of pictures
            or another model, or a loss that is no number.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    if len(train) < options.batch_size:
        raise ValueError(f"{len(train)} pictures are fewer than batch_size={options.batch_size}; lower it")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.freeze_encoder:
        model.encoder.requires_grad_(False)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = create_optimizer_v2(model, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay)
    steps = len(train) // options.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=options.sched, num_epochs=options.epochs, min_lr=options.min_lr,
        warmup_epochs=min(options.warmup_epochs, options.epochs - 1), warmup_lr=options.lr / 100,
        step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    if scheduler is None:  # older timm does not refuse unknown names
        raise ValueError(f"sched={options.sched!r} is no schedule that timm knows; use 'cosine', 'poly' or 'step'")
    average = RisingAverage(copy.deepcopy(model).eval(), options.ema) if options.ema else None
    settings = {**asdict(options), **asdict(views), "pictures": len(train)}
    state = _State(model, None if average is None else average.module, optimizer, output / "last.pt", settings)
    rows = state.load() if resume else []
    engine = _engine(model, average, train, views, options, optimizer, scheduler)
    kept = model if average is None else average.module
    for epoch in range(len(rows), options.epochs):
        start = time.perf_counter()
        engine.clear()
        loss = engine.run_epoch(epoch)["train_loss"]
        row = dict.fromkeys(COLUMNS, "") | {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "train_loss": loss}
        last = epoch == options.epochs - 1
        if val is not None and (last or (epoch + 1) % options.eval_every == 0):
            found = evaluate_whole(kept, val, options.amp)
            row |= {"val_miou": float(found.miou), "val_aacc": float(found.aacc)}
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        state.save(rows)
        _write_rows(rows, output / "summary.csv")
        if progress is not None:
            progress(row)
    save_segmenter(kept, output / "model.safetensors")
    return rows


def _engine(
    model: nn.Module,
    average: RisingAverage | None,
    train: Gallery,
    views: Views,
    options: SegmentTraining,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> Engine:
    """The engine of all trainers, with what segmentation brings."""
    device = next(model.parameters()).device
    batches = ViewBatches(train, views, options.batch_size, options.seed, model)
    weight = class_weights(train, model.num_classes, options.class_weights)
    weight = None if weight is None else weight.to(device)
    step = SegmentStep(model, weight, options.amp, options.freeze_encoder, len(batches))
    optimizer.zero_grad(set_to_none=True)
    return Engine(
        step=step,
        wrapped=step,
        optimizer=optimizer,
        schedule=StepRates(optimizer, scheduler),
        ema=average,
        batches=batches,
        precision=Precision(),
        world=World(0, 1, device),
        pace=Pace(clip_grad=options.clip_grad),
        diverged=lambda value, epoch, batch: (
            f"the loss is {value} in epoch {epoch}, step {batch}; lower lr={options.lr}"
        ),
    )


@torch.no_grad()
def evaluate_whole(model: nn.Module, data: Gallery, amp: bool = False) -> Any:
    """Scores of whole pictures, counts summed over all of them (see `evaluation.segmentation.confusion.Scores`)."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    mean, std = normalisation(model)
    total = np.zeros((model.num_classes, model.num_classes))
    for image, mask in zip(data.images, data.masks):
        x = (image[None].to(device).float() / 255 - mean) / std
        with Precision(amp=torch.bfloat16 if amp else None).autocast(device):
            labels = model(x).argmax(1)[0].cpu().numpy()
        total += confusion_matrix(labels, mask.numpy(), model.num_classes)
    model.train(was)
    return scores(areas(total))


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


class _State:
    """What a run that was stopped needs to go on, in one file that is replaced as a whole."""

    def __init__(
        self,
        model: nn.Module,
        averaged: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        path: Path,
        settings: dict[str, Any],
    ) -> None:
        self.modules = {"model": model} | ({} if averaged is None else {"averaged": averaged})
        self.optimizer, self.path = optimizer, path
        self.options = {k: v for k, v in settings.items() if k not in ("threads", "eval_every")}

    def save(self, rows: list[dict[str, Any]]) -> None:
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        optimizer = self.optimizer.state_dict()
        write_whole(self.path, {**modules, "optimizer": optimizer, "rows": rows, "options": self.options})

    def load(self) -> list[dict[str, Any]]:
        """The rows so far; none where there is no file."""
        if not self.path.is_file():
            _log.warning("there is no %s to resume from; starting from the beginning", self.path)
            return []
        saved = read_torch(self.path)
        if saved["options"] != self.options:
            changed = sorted(k for k in self.options if saved["options"].get(k) != self.options[k])
            raise ValueError(f"{self.path} was written with other options ({', '.join(changed)}); give the same ones")
        for name, module in self.modules.items():
            load_state(module, saved[name], str(self.path))
        self.optimizer.load_state_dict(saved["optimizer"])
        return saved["rows"]
