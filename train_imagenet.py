#!/usr/bin/env python3
"""Fine-tunes a timm model with any token reduction method; `python train_imagenet.py --help` lists the flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from tokenzoo.cli.common import say
from tokenzoo.evaluation import result_line
from tokenzoo.training.options import parse_options
from tokenzoo.training.run import train


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; user errors end with one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        args = parse_options(argv)
        result = train(args, _show, argv)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"train_imagenet.py: {error}\n")
        return 2
    if result is not None:
        say(result_line([result]))
    return 0


def _show(row: dict[str, Any]) -> None:
    words = [f"epoch {row['epoch']}", f"lr {row['lr']:.3g}", f"loss {row['train_loss']:.4f}"]
    if row["keep_rate"] != "":
        words.append(f"keep rate {row['keep_rate']}")
    if row["eval_top1"] != "":
        words.append(f"top-1 {row['eval_top1']:.2f}  top-5 {row['eval_top5']:.2f}")
    if row["unpatched_top1"] != "":
        words.append(f"unpatched top-1 {row['unpatched_top1']:.2f}")
    if row["n_broken"]:
        words.append(f"{row['n_broken']} broken pictures")
    say("  ".join([*words, f"{row['images_per_second']:.1f} images/s  {row['seconds']:.1f} s"]))


if __name__ == "__main__":
    sys.exit(main())
