"""`tokenzoo vlm ACTION`: vision-language models, one action per file."""

from __future__ import annotations

import argparse
from importlib import import_module

from .common import add_import, add_parser

ACTIONS = ("eval", "bench", "show")
HELP = f"vision-language models of transformers: {', '.join(ACTIONS)}"
EXAMPLE = "tokenzoo vlm bench --random tiny --rounds 5 --method uniform keep=16 --method fastv layers=2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name in ACTIONS:
        module = import_module(f"{__package__}.vlm_{name}")
        add_import(add_parser(actions, name, module))


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    return import_module(f"{__package__}.vlm_{args.action}").run(args) or 0
