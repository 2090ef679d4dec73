#!/usr/bin/env python3
"""The same as `tokenzoo train`, as a file: `torchrun --nproc_per_node 8 train_imagenet.py ...` starts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokenzoo.cli.train_command import start
from tokenzoo.training.options import parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; user errors end with one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        start(parse_options(argv), argv)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"train_imagenet.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
