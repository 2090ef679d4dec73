"""Options of a training run: a YAML file sets defaults, the command line overrides, unknown keys are errors."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.safe_files import parse_yaml
from .flags import add_flags

DESCRIPTION = "Fine-tunes a timm model with any token reduction method, on one processor or many GPUs."
# what may differ between a run and its continuation, because the weights do not depend on it
FREE = frozenset({
    "config", "resume", "output", "device", "threads", "workers", "data_dir", "validation_batch_size", "eval_every",
    "eval_unpatched", "log_interval", "log_tensorboard", "log_wandb", "wandb_project", "recovery_interval",
    "checkpoint_hist", "crop_pct", "interpolation", "val_split", "torchcompile", "imports",
    "fsdp",
})  # fmt: skip
_POSITIVE = (
    "batch_size", "epochs", "grad_accum_steps", "lr_base_size", "eval_every", "log_interval", "kd_temperature",
    "kd_views",
)  # fmt: skip
_NOT_NEGATIVE = (
    "workers", "shrink_start_epoch", "shrink_epochs", "consistency", "consistency_task", "kd_weight", "freeze_epochs",
    "kd_token_weight", "warmup_epochs", "aug_repeats", "mixup_off_epoch", "recovery_interval", "seed", "registers",
    "task_weight",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """A parser of all options, with their defaults."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, allow_abbrev=False)
    _add_all(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options to a parser whose namespace is for `options_of`: what was not given is left out of it."""
    parser.allow_abbrev = False
    before = set(parser._actions)
    _add_all(parser)
    for action in parser._actions:
        if action not in before:
            action.default = argparse.SUPPRESS


def _add_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "-c", default=None, help="YAML file with defaults for the flags")
    add_flags(parser)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a run.

    Args:
        argv: words after the program's name.

    Raises:
        ValueError: as in `options_of`.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_options(parser)
    return options_of(vars(parser.parse_args(argv)))


def options_of(given: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a run: what was given, else what the YAML file says, else the defaults.

    Args:
        given: values from a parser with `add_options`; names that are no options are left out.

    Raises:
        ValueError: a YAML file with a key that is not a flag or a value that its flag does not take, or values that
            cannot be.
    """
    parser = build_parser()
    if given.get("config") is not None:
        parser.set_defaults(**read_config(Path(given["config"]), parser))
    args = parser.parse_args([])
    vars(args).update({name: given[name] for name in vars(args) if name in given})
    args.method_kwargs = pairs(args.method_kwargs, "--method-kwargs")
    args.model_kwargs = pairs(args.model_kwargs, "--model-kwargs")
    _check(args)
    return args


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Values of a YAML file, checked against the flags of a parser."""
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist")
    data = parse_yaml(path.read_bytes(), f"--config {path}")
    if not isinstance(data, Mapping):
        raise ValueError(f"--config {path} holds {type(data).__name__}, not a mapping of flags")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    found = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config {path}: {key!r} is no flag of this program{hint}")
        found[name] = _converted(actions[name], value, f"--config {path}: {key}")
    return found


def _converted(action: argparse.Action, value: Any, what: str) -> Any:
    if value is None and action.default is None:
        return None
    if action.dest == "method" and isinstance(value, (Mapping, list)):
        return value
    if action.dest in ("method_kwargs", "model_kwargs") and isinstance(value, Mapping):
        return dict(value)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{what}={value!r}; give true or false")
        return value
    if action.nargs is not None:
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise ValueError(f"{what}={value!r}; give {action.nargs} values")
        return [_scalar(action, v, what) for v in values]
    return _scalar(action, value, what)


def _scalar(action: argparse.Action, value: Any, what: str) -> Any:
    kind = action.type or str
    wrong = isinstance(value, bool) or (kind is int and not isinstance(value, int)) or isinstance(value, (dict, list))
    if not wrong:
        try:  # YAML reads 5e-4 as text
            value = kind(value)
        except (TypeError, ValueError):
            wrong = True
    if wrong:
        raise ValueError(f"{what}={value!r}; give {'text' if kind is str else kind.__name__}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{what}={value!r}; use one of {', '.join(map(str, action.choices))}")
    return value


def pairs(words: Sequence[str] | Mapping[str, Any], what: str) -> dict[str, Any]:
    """KEY=VALUE words as a dict, values read as YAML; a dict stays as it is."""
    if isinstance(words, Mapping):
        return dict(words)
    found = {}
    for word in words:
        key, sep, value = word.partition("=")
        if not sep or not key:
            raise ValueError(f"{what} {word!r} is not of the form KEY=VALUE")
        found[key.replace("-", "_")] = parse_yaml(value, f"{what} {word!r}")
    return found


def flag(name: str) -> str:
    """The flag behind a name of the options."""
    return "--" + name.replace("_", "-")


def _check(args: argparse.Namespace) -> None:
    for name in ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"{flag(name)} is missing; give it on the command line or in the YAML file")
    for names, low in ((_POSITIVE, "above 0"), (_NOT_NEGATIVE, "0 or more")):
        for name in names:
            value = getattr(args, name)
            if value < 0 or (value == 0 and low != "0 or more"):
                raise ValueError(f"{flag(name)} {value}; give {low}")
    if args.checkpoint_hist < 2:
        raise ValueError(f"--checkpoint-hist {args.checkpoint_hist}; keep at least 2, one may be torn")
    if not 0 < args.model_ema_decay < 1:
        raise ValueError(f"--model-ema-decay {args.model_ema_decay} is not between 0 and 1")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise ValueError(f"--batch-size {args.batch_size} is odd; mixup and cutmix mix pairs, give an even one")
    if args.method is None and (args.method_kwargs or args.flops is not None):
        raise ValueError("--method-kwargs and --flops need a --method")
    if args.kd_token_weight and args.kd_model_name is None:
        raise ValueError(
            f"--kd-token-weight {args.kd_token_weight:g} compares tokens with those of a teacher; give --kd-model-name "
            "unpatched, or --kd-token-weight 0"
        )
    if not 0 <= args.kd_shift < 1:
        raise ValueError(f"--kd-shift {args.kd_shift:g} is not in [0, 1), a share of the patch grid")
    if not args.data_dir and not args.dataset:
        raise ValueError("no pictures named; give --data-dir (a folder with train/ and val/) or --dataset")
