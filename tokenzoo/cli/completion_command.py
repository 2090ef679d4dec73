"""`tokenzoo completion SHELL`: a script by which a shell completes commands, flags and the names of methods."""

from __future__ import annotations

import argparse

from .common import say

HELP = "print a completion script for a shell"
EXAMPLE = "tokenzoo completion bash"
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to write for")


def run(args: argparse.Namespace) -> None:
    """Prints the script.

    Raises:
        ImportError: shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion scripts are written by shtab: pip install 'tokenzoo[completion]'") from error
    from . import build_parser

    say(shtab.complete(build_parser(), shell=args.shell))
