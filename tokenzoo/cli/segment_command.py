"""`tokenzoo segment ACTION`: segmentation, one action a file."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from .common import add_import, add_parser

# an action is its file: what is not there is not offered
ACTIONS = tuple(name for name in ("eval", "predict", "train") if find_spec(f"{__package__}.segment_{name}"))
HELP = f"segmentation with a trained model: {', '.join(ACTIONS)}"
EXAMPLE = "tokenzoo segment eval --checkpoint model.safetensors --data-dir camvid/ --method tome r=8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser an action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name in ACTIONS:
        module = import_module(f"{__package__}.segment_{name}")
        add_import(add_parser(actions, name, module))


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    return import_module(f"{__package__}.segment_{args.action}").run(args) or 0
