"""The command line, `tokenzoo COMMAND ...`: one command per file, each with an example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..core.plugins import import_plugins
from .common import add_import, add_parser

COMMANDS = (
    "list", "eval", "bench", "train", "segment", "vlm", "show", "tune", "rates", "export", "serve", "completion",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="tokenzoo", description="Token reduction for vision backbones: measure, train, look, and export."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name}_command")
        sub = add_parser(commands, name, module)
        # flags of the first can stand in a file, the others have parsers of their own
        if name not in ("train", "segment", "vlm"):
            add_import(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user errors end with one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        import_plugins(getattr(args, "imports", ()))
        return args.run(args) or 0
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"tokenzoo {args.command}: {error}\n")
        return 2
