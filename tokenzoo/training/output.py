"""What a run leaves in its folder: options, recipe, a table, a curve, weights."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..apply.saving import RECIPE
from .loggers import Loggers

_log = logging.getLogger(__name__)
COLUMNS = (
    "epoch", "lr", "keep_rate", "train_loss", "train_task", "train_distillation", "train_second_task",
    "train_consistency", "train_token_distillation", "eval_loss", "eval_top1", "eval_top5", "unpatched_top1",
    "unpatched_top5", "n_broken", "images_per_second", "seconds",
)  # fmt: skip


class Output:
    """Writes the files of a run; every one is replaced as a whole.

    Args:
        folder: made if it is not there.
        args: options of the run.

    Raises:
        ValueError: a folder that cannot be written, or one that holds a run already, without --resume.
        ImportError: a logger that is not installed.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"--output {folder} cannot be written ({error.strerror}); give another folder") from error
        if not args.resume and (any(folder.glob("checkpoint-*.pt")) or (folder / "summary.csv").exists()):
            raise ValueError(f"--output {folder} holds a run already; add --resume to go on, or give another folder")
        self.loggers = Loggers(folder, args)

    def describe(self, recipe: dict[str, Any] | None, said: dict[str, Any]) -> None:
        """args.yaml, recipe.json and model.json; a run that goes on leaves them as they are.

        Args:
            recipe: of the run, None without a method.
            said: of the model, from `tokenzoo.apply.saving.said_of`: with it the folder is one for `tokenzoo.load`.
        """
        kept = {key: value for key, value in vars(self.args).items() if key not in ("config", "resume")}
        if not (self.args.resume and (self.folder / "args.yaml").is_file()):
            _replace(self.folder / "args.yaml", yaml.safe_dump(kept, sort_keys=False))
        if not (self.args.resume and (self.folder / "recipe.json").is_file()):
            _replace(self.folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
        if not (self.args.resume and (self.folder / RECIPE).is_file()):
            _replace(self.folder / RECIPE, json.dumps(said, indent=2) + "\n")

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """summary.csv and curve.png from all rows."""
        part = self.folder / "summary.csv.part"
        with part.open("w", newline="") as file:
            owed = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)  # losses of methods
            writer = csv.DictWriter(file, (*COLUMNS, *owed))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.folder / "summary.csv")
        if find_spec("matplotlib") is not None:
            draw_curve(rows, self.folder / "curve.png", f"{self.args.model}, {self.args.method or 'unpatched'}")

    def weights(self, state: dict[str, Tensor], name: str = "model.safetensors") -> None:
        """The weights under the names of the unpatched backbone, a method's own beside them."""
        from safetensors.torch import save

        part = self.folder / f"{name}.part"
        part.write_bytes(save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}))
        os.replace(part, self.folder / name)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def draw_curve(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and top-1 by epoch.

    Args:
        rows: of summary.csv.
        path: PNG to write.
        title: what was trained.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, keys in ((left, ("train_loss", "eval_loss")), (right, ("eval_top1", "unpatched_top1"))):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in rows if row[key] != ""]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3, label=key)
        axes.set_xlabel("epoch")
        if axes.lines:
            axes.legend(fontsize=8)
    left.set_ylabel("loss")
    right.set_ylabel("top-1, percent")
    figure.suptitle(title, fontsize=10)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, path)
