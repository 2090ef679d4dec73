"""A training run from its options to its result: what `tokenzoo train` calls."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..apply.saving import said_of
from ..core.plugins import import_plugins
from ..cost.report import report
from ..evaluation.distributed import World, join
from ..evaluation.environment import command_line, environment
from ..evaluation.loading import data_config
from ..evaluation.runs import Precision
from .batches import TrainBatches
from .build import build
from .checkpoints import Checkpoints, Place
from .data import open_splits
from .engine import Engine, Pace
from .keep_rate import KeepRateWarmup
from .losses import TrainStep, unused_parameters
from .optim import Schedule, build_optimizer, learning_rate, new_parameters
from .output import COLUMNS, Output
from .resuming import refuse_changes, settings_of
from .sharding import Answering, check_sharding, shard, whole
from .validation import ValBatches, unpatched_view, validate

_log = logging.getLogger(__name__)


def train(
    args: argparse.Namespace,
    progress: Callable[[dict[str, Any]], None] | None = None,
    argv: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """Fine-tunes a model, or trains it from random weights.

    Args:
        args: from `parse_options`.
        progress: called with the row of every finished epoch, in the first process only.
        argv: words behind `tokenzoo train`, for the record.

    Returns:
        The result as one JSON-safe dict; None in all processes but the first.

    Raises:
        ValueError: options, data or a recipe that do not fit together, or a loss that is no number.
        TypeError: a model that the method cannot be put on.
    """
    import_plugins(args.imports)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with join(args.device) as world:
        run, failed = _Run(args, world), True
        try:
            result = run.go(progress, argv)
            failed = False
        finally:
            if run.output is not None:
                run.output.loggers.close(failed)
        return result


def _diverged(value: float, epoch: int, batch: int) -> str:
    return (
        f"the loss is no number in epoch {epoch}, at or before batch {batch}; the last good checkpoint is kept. Lower "
        "--lr, set --clip-grad, or use --amp-dtype bfloat16, in another --output"
    )


def _said(args: argparse.Namespace, model: nn.Module, num_classes: int) -> dict[str, Any]:
    """What `tokenzoo.load` needs to create the model of this run."""
    options = {"num_classes": num_classes, **args.model_kwargs}
    if args.img_size:  # the flag goes before the keyword, as when the model is built
        options["img_size"] = args.img_size[0] if len(args.img_size) == 1 else list(args.img_size)
    return said_of(model, args.model, **options)


class _Run:
    """The parts of one run."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        folder = Path(args.output)
        self.output = Output(folder, args) if world.main else None
        world.wait()
        splits = open_splits(args, world)
        if args.fsdp:
            check_sharding(args, world)
        # what is sharded comes from the CPU: one device may not hold it
        self.home = torch.device("cpu") if args.fsdp else world.device
        built = build(args, splits.num_classes, self.home)
        self.model, self.recipe, self.num_classes = built.model, built.recipe, splits.num_classes
        self.said = _said(args, built.model, splits.num_classes)
        config = data_config(self.model, args.img_size, args.crop_pct, None, args.interpolation, args.mean, args.std)
        self.input_size = config["input_size"]
        batches = TrainBatches(splits, config, args, world)
        self.val = None if splits.val is None else ValBatches(splits, config, args, world)
        self.precision = Precision(amp=getattr(torch, args.amp_dtype) if args.amp else None)
        white = tuple((1 - mean) / std for mean, std in zip(config["mean"], config["std"]))
        step = TrainStep(self.model, built.teacher, args, white)
        self.unused = self._probe(step)
        self.costs = report(self.model, self.input_size[1:]) if self.recipe is not None else None
        self.sharded: Callable[[torch.Tensor], torch.Tensor] | None = None  # what evaluation calls
        self.engine = self._engine(step, batches)
        self.checkpoints = Checkpoints(folder, args.checkpoint_hist)
        # workers deal out the shards of a stream; pictures with a number come in one order for any count
        workers = {"workers": args.workers} if splits.stream else {}
        facts = {"processes": world.size, "pictures": len(splits.train), **workers}
        settings = settings_of(args, **facts, classes=splits.num_classes)
        self.settings = {"recipe": self.recipe, "settings": settings}
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}

    def _probe(self, step: TrainStep) -> list[str]:
        """Names the parameters that the loss does not reach; they would only decay."""
        size = (2, *self.input_size)
        generator = torch.Generator().manual_seed(self.args.seed)
        images = torch.randn(size, generator=generator).to(self.home)
        target = torch.arange(2, device=self.home) % self.num_classes
        names = unused_parameters(step.train(), (images, target), self.precision.autocast(self.home))
        if names and self.world.main:
            _log.warning("%d parameters get no gradient: %s", len(names), ", ".join(names))
        return names

    def _engine(self, step: TrainStep, batches: TrainBatches) -> Engine:
        from timm.utils import ModelEmaV3

        args, world = self.args, self.world
        lr = learning_rate(args, world.size)
        ema = None
        if args.model_ema:
            own = {"foreach": False} if args.fsdp else {}  # shards and buffers in one list are refused
            ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, **own)
        if args.fsdp:
            self._shard(step, None if ema is None else ema.module)
        optimizer = build_optimizer(self.model, args, lr)
        updates = -(-len(batches) // args.grad_accum_steps)
        shrinks = args.shrink_start_epoch or args.shrink_epochs
        wrapped: nn.Module = step
        if world.size > 1 and not args.fsdp:
            devices = [world.device.index] if world.device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(
                step, device_ids=devices, find_unused_parameters=bool(self.unused)
            )
        return Engine(
            step=step,
            wrapped=wrapped,
            optimizer=optimizer,
            schedule=Schedule(optimizer, args, updates),
            ema=ema,
            warmup=KeepRateWarmup(self.model, args, updates) if shrinks else None,
            batches=batches,
            precision=self.precision,
            world=world,
            pace=Pace(**{name: getattr(args, name) for name in Pace.__dataclass_fields__}),
            diverged=_diverged,
        )

    def _shard(self, step: TrainStep, average: nn.Module | None) -> None:
        """Parts the weights, and their average, among the processes."""
        step.to_device(self.world.device)
        shard(step, self.model, self.world, ("answer",))
        self.sharded = step.answer
        if average is not None:
            self.sharded = Answering(average)
            shard(self.sharded, average, self.world)

    # ---- the run

    def go(self, progress: Callable[[dict[str, Any]], None] | None, argv: Sequence[str] | None) -> Any:
        place = self._resume() if self.args.resume else Place(0, 0)
        if self.output is not None:
            self.output.describe(self.recipe, self.said)
            self.output.loggers.open(place.epoch)
        engine, epochs = self.engine, self.engine.schedule.epochs
        for epoch in range(place.epoch, epochs):
            start, first = time.perf_counter(), place.batch if epoch == place.epoch else 0
            if first == 0:
                engine.clear()
            trained = engine.run_epoch(epoch, first, lambda batch, epoch=epoch: self._save(Place(epoch, batch)))
            seconds = time.perf_counter() - start
            pictures = (len(engine.batches) - first) * self.args.batch_size * self.world.size
            row = self._row(epoch, trained, pictures / seconds, epoch == epochs - 1)
            row["seconds"] = round(time.perf_counter() - start, 2)
            self.rows.append(row)
            better = row["eval_top1"] != "" and row["eval_top1"] > self.best.get("eval_top1", -math.inf)
            if better:
                self.best = {"epoch": epoch, "eval_top1": row["eval_top1"]}
            engine.clear()
            if self.output is not None:  # before the checkpoint: a point logged twice can be told, a lost one not
                self.output.loggers.log(row)
            self._save(Place(epoch + 1, 0))
            self._write(better)
            if self.output is not None and progress is not None:
                progress(row)
        self._write(better=False)
        return None if self.output is None else self._result(argv)

    def _row(self, epoch: int, trained: dict[str, Any], speed: float, last: bool) -> dict[str, Any]:
        args, row = self.args, dict.fromkeys(COLUMNS, "")
        row |= {"epoch": epoch, "images_per_second": round(speed, 2)}
        row |= {key: value for key, value in trained.items() if value is not None}
        if isinstance(row["keep_rate"], tuple):
            row["keep_rate"] = " ".join(map(str, row["keep_rate"]))
        row["n_broken"] = len(set(self.world.names(list(self.engine.batches.broken))))
        if self.val is None or not (last or (epoch + 1) % args.eval_every == 0):
            return row
        model = self._kept()
        found = validate(model, self.val, self.precision, self.world, self.sharded)
        row |= {"eval_loss": found["loss"], "eval_top1": found["top1"], "eval_top5": found["top5"]}
        if args.eval_unpatched and self.recipe is not None:
            found = validate(unpatched_view(model), self.val, self.precision, self.world)
            row |= {"unpatched_top1": found["top1"], "unpatched_top5": found["top5"]}
        return row

    def _kept(self) -> nn.Module:
        """The weights that are evaluated and saved: averaged ones if there are any."""
        return self.model if self.engine.ema is None else self.engine.ema.module

    def _save(self, place: Place) -> None:
        sums = self.world.total(self.engine.sums).cpu()
        broken = self.world.names(list(self.engine.batches.broken))
        own = self.engine.state()
        if self.world.main:
            state = {"rows": self.rows, "best": self.best, "sums": sums, "broken": broken, **self.settings}
            self.checkpoints.save(place, {**state, **own})

    def _resume(self) -> Place:
        found = self.checkpoints.load()
        if found is None:
            _log.warning("there is no checkpoint in %s to resume from; starting from the beginning", self.args.output)
            return Place(0, 0)
        place, state = found
        refuse_changes(state, self.settings)
        self.engine.load(state)
        self.rows, self.best = state["rows"], state["best"]
        if self.world.main:  # the sums of all processes, counted once
            self.engine.sums[: len(state["sums"])] = state["sums"].to(self.engine.sums)  # parts may have joined since
            self.engine.batches.broken.update(dict.fromkeys(state["broken"], "found before the run was resumed"))
        return place

    def _write(self, better: bool) -> None:
        state = whole(self._kept().state_dict(), self.world.main)
        if self.output is None:
            return
        self.output.weights(state)
        if better:
            self.output.weights(state, "best.safetensors")
        self.output.table(self.rows)

    def _result(self, argv: Sequence[str] | None) -> dict[str, Any]:
        record = environment(self.world.device)
        record["command"] = None if argv is None else command_line(["train", *argv])
        costs = self.costs
        return {
            "model": self.args.model,
            "method": self.recipe,
            "gmacs": None if costs is None else round(costs.total / 1e9, 4),
            "gmac_ratio": None if costs is None else round(costs.ratio, 4),
            "weights": "averaged" if self.engine.ema is not None else "last",
            "best": self.best,
            **(self.rows[-1] if self.rows else {}),
            "broken": sorted(self.engine.batches.broken),
            "new_parameters": new_parameters(self.model),
            "without_gradient": self.unused,
            "processes": self.world.size,
            "environment": record,
        }
