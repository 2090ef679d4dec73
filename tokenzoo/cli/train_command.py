"""`tokenzoo train`: fine-tunes a classifier with the reduction active, or trains it from random weights."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from ..evaluation.results import result_line
from ..training.options import add_options, options_of
from ..training.run import train
from .common import argv_of, say

HELP = "fine-tune a timm model with any method, in one process or under torchrun"
EXAMPLE = "tokenzoo train -c configs/evit/deit_small_patch16_224_train.yaml --data-dir imagenet --output runs/evit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and all flags of a run."""
    add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Trains."""
    words = argv_of(args)
    start(options_of(vars(args)), None if words is None else words[1:])


def start(options: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Trains, and says a line for every epoch and the result at the end.

    Args:
        options: of the run.
        argv: words behind the command, for the record.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    result = train(options, _show, argv)
    if result is not None:
        say(result_line([result]))


def _show(row: dict[str, Any]) -> None:
    words = [f"epoch {row['epoch']}", f"lr {row['lr']:.3g}", f"loss {row['train_loss']:.4f}"]
    if row["keep_rate"] != "":
        words.append(f"keep rate {row['keep_rate']}")
    if row["eval_top1"] != "":
        words.append(f"top-1 {row['eval_top1']:.2f}  top-5 {row['eval_top5']:.2f}")
    if row["unpatched_top1"] != "":
        words.append(f"unpatched top-1 {row['unpatched_top1']:.2f}")
    if row["n_broken"]:
        words.append(f"{row['n_broken']} broken images")
    say("  ".join([*words, f"{row['images_per_second']:.1f} images/s  {row['seconds']:.1f} s"]))
