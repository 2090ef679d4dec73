"""Arguments and values that several commands share."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..adapters.wrappers import backbone_of
from ..apply.weights import load_weights
from ..core.registry import list_methods
from ..core.safe_files import parse_yaml
from ..cost.report import report
from ..evaluation.runs import Precision, Run, is_served

_DTYPES = ("float32", "bfloat16", "float16")


def say(text: str = "") -> None:
    """Writes one line to standard output."""
    sys.stdout.write(text + "\n")


def add_parser(parsers: Any, name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command or action, with the help, the example and the flags of its file.

    Args:
        parsers: what `add_subparsers` gave.
        name: what users type.
        module: its file, with HELP, EXAMPLE and `add_arguments`.
    """
    parser = parsers.add_parser(
        name,
        help=module.HELP,
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def add_import(parser: argparse.ArgumentParser) -> None:
    """--import MODULE [MODULE ...]."""
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules or Python files that register methods or backbones of your own",
    )


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--model, --checkpoint, --pretrained, --num-classes, --img-size, --model-kwargs, --device, --threads, --seed."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", "-m", required=required, default=None, help="timm model name")
    group.add_argument("--checkpoint", default="", help="weights to load (.pth or .safetensors)")
    group.add_argument("--pretrained", action="store_true", help="timm's own weights (needs network or a warm cache)")
    group.add_argument("--num-classes", type=int, default=None)
    group.add_argument("--img-size", type=int, nargs="+", default=None, help="one side or height width")
    group.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="passed to timm.create_model")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--threads", type=int, default=None, help="CPU threads")
    group.add_argument("--seed", type=int, default=0, help="seed of random weights and inputs")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """--method NAME [KEY=VALUE ...], repeatable."""
    parser.add_argument(
        "--method",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help=f"a method and its options, repeatable; NAME is one of {', '.join(list_methods())}, a "
        "recipe.yaml, or the folder of a `tokenzoo train` run, whose weights the model then has too; "
        "flops=0.6 solves for a share of the unpatched multiply-adds",
    )
    parser.add_argument(
        "--method-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="options added to every --method"
    )


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """--dtype, --amp, --amp-dtype."""
    group = parser.add_argument_group("precision")
    group.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights and images")
    group.add_argument("--amp", action="store_true", help="run under autocast")
    group.add_argument("--amp-dtype", choices=_DTYPES[1:], default="bfloat16", help="what autocast computes in")


def precision_of(args: argparse.Namespace) -> Precision:
    """The number formats of the arguments."""
    return Precision(getattr(torch, args.dtype), getattr(torch, args.amp_dtype) if args.amp else None)


def say_scans(model: nn.Module, size: tuple[int, ...]) -> None:
    """For models that scan, says which directions the multiply-adds of a table count; nothing for others.

    Args:
        model: unpatched.
        size: height and width of the images, which are filled up to whole patches.
    """
    backbone = backbone_of(model)
    if not is_served(backbone):
        return
    costs = report(backbone, tuple(-(-n // p) * p for n, p in zip(size, backbone.patch_embed.patch_size)))
    if costs.one_direction is not None:
        one, every = costs.one_direction[1] / 1e9, costs.total / 1e9
        say(
            "GMACs count all directions of the scan; with one, as in many papers, the unpatched backbone has "
            f"{one:.3f} instead of {every:.3f}"
        )


def argv_of(args: argparse.Namespace) -> list[str] | None:
    """The words of the command as typed; None where Python called it and there are none."""
    words = sys.argv[1:]
    return words if words[:1] == [getattr(args, "command", None)] else None


def key_values(pairs: list[str], what: str) -> dict[str, Any]:
    """KEY=VALUE words as a dict; values are read as YAML, so 0.7, [3,6,9], true and text all work.

    Raises:
        ValueError: a word without '='.
    """
    out = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise ValueError(f"{what} {pair!r} is not of the form KEY=VALUE")
        out[key.replace("-", "_")] = parse_yaml(value, f"{what} {pair!r}")
    return out


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The unpatched model first, then one run for every --method."""
    common = key_values(args.method_kwargs, "--method-kwargs")
    runs = [Run(None, {})]
    for name, *pairs in args.method:
        run = Run(name, {**common, **key_values(pairs, "--method")})
        _ = run.methods  # reports an unknown name or option before anything is loaded
        runs.append(run)
    return runs


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model of the arguments, in eval mode on its device.

    Raises:
        ValueError: unknown model name, weights that do not fit.
    """
    import timm

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if not timm.is_model(args.model):
        near = timm.list_models(f"*{args.model}*")[:5]
        raise ValueError(
            f"--model {args.model!r} is not a timm model" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    kwargs = key_values(args.model_kwargs, "--model-kwargs")
    if args.img_size:
        kwargs["img_size"] = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    model = timm.create_model(args.model, pretrained=args.pretrained, **kwargs)
    if args.checkpoint:
        load_weights(model, args.checkpoint, "--checkpoint")
    return model.to(args.device).eval()
