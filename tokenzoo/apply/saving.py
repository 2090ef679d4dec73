"""A model with its recipe and its weights as one folder: `model.json` and `model.safetensors`, nothing that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.classes import path_of
from ..adapters.inspect import is_patched
from ..core.safe_files import parse_json
from .patch import put_on, recipe, unpatch_model

FORMAT = 1
RECIPE, WEIGHTS = "model.json", "model.safetensors"
# options of timm.create_model that read other files
_FETCHING = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def save(model: nn.Module, folder: str | Path, name: str | None = None, **options: Any) -> Path:
    """Writes recipe and weights of a model, learned modules included, into a folder that `load` takes.

    Args:
        model: patched or not; any model that `patch_model` takes.
        folder: made where it is missing; files of an earlier `save` are replaced.
        name: timm's name of the model, so that `load` can create it; None leaves that to whoever loads.
        **options: what `timm.create_model` needs besides (`num_classes`, `img_size`, ...).

    Returns:
        The folder.

    Raises:
        ValueError: `name` with these options is another model than this one, options that are no JSON, or options
            without a name.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if options and name is None:
        raise ValueError(f"options {sorted(options)} are for timm.create_model; give the name of the model too")
    found = said_of(model, name, **options)
    state, shared = _apart(model.state_dict())
    if name is not None:
        _check_created(found, state | {alias: state[other] for alias, other in shared.items()})
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    found |= {"dtype": kinds.pop() if len(kinds) == 1 else None, "shared": shared}
    folder.mkdir(parents=True, exist_ok=True)
    for file, write in (
        (WEIGHTS, lambda path: save_file(state, path)),
        (RECIPE, lambda path: Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")),
    ):
        part = folder / f"{file}.part"
        write(str(part))
        os.replace(part, folder / file)
    return folder


def said_of(model: nn.Module, name: str | None, **options: Any) -> dict[str, Any]:
    """What `model.json` says of a model besides its weights: its class, its recipe, and how timm creates it.

    Args:
        model: patched or not.
        name: timm's name of the model, None for none.
        **options: what `timm.create_model` needs besides.

    Raises:
        ValueError: options that are no JSON.
    """
    timm = None if name is None else {"name": name, "options": _plain(options)}
    own = recipe(model) if is_patched(model) else None
    return {"format": FORMAT, "class": path_of(type(model)), "recipe": own, "timm": timm}


def is_saved(method: Any) -> bool:
    """Whether something names a folder that `save` or `tokenzoo train` wrote."""
    return isinstance(method, (str, Path)) and (Path(method) / RECIPE).is_file()


def saved_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The recipe of a folder that `save` wrote, None of an unpatched model.

    Raises:
        ValueError: no such folder, or a format of another version.
    """
    return _said(Path(folder))["recipe"]


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model from what `save` wrote: created or given, patched with the recipe, with the weights.

    Methods of your own have to be imported before.

    Args:
        folder: what `save` wrote; only JSON and tensors are read from it.
        model: the model to put both on, in place, not patched; None creates the timm model that the folder names, in
            eval mode and in the number format of the weights.

    Raises:
        ValueError: no such folder, a format of another version, no model to create, weights that are missing or extra
            or of another shape (each is named; a given model is then as it was).
        TypeError: a model that the recipe cannot be put on.
    """
    found, state = _read(Path(folder))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        given = model is not None
        if not given:
            model = _create(found, Path(folder))
            if isinstance(kind := getattr(torch, str(found.get("dtype")), None), torch.dtype):
                model = model.to(kind)
        elif is_patched(model):
            raise ValueError(
                f"{type(model).__name__} is patched already, and the folder brings a recipe of its own; call "
                "tokenzoo.unpatch_model first"
            )
        if found["recipe"] is not None:
            put_on(model, found["recipe"])
    fault = _difference(model.state_dict(), state)
    if fault:
        if given and found["recipe"] is not None:
            unpatch_model(model)
        raise ValueError(f"{folder} does not fit {path_of(type(model))}, it was written from {found['class']}: {fault}")
    model.load_state_dict(state)
    return model if given else model.eval()


def _apart(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that may be written, and names of those that are another one's values."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in the state of the model is {type(value).__name__}, which no tensor file holds")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and key in seen:
            shared[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, shared


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{key}={value!r} cannot be written as JSON; leave name out, and give the model to tokenzoo.load"
            ) from error
    return options


def _create(found: dict[str, Any], folder: Path) -> nn.Module:
    import timm

    if found["timm"] is None:
        raise ValueError(
            f"{folder} does not say how to create its {found['class']}; call tokenzoo.load(folder, model), or save "
            "with the name of a timm model"
        )
    name, options = found["timm"]["name"], found["timm"]["options"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{name!r} is no model of the installed timm, or its module is not imported")
    fetching = sorted(_FETCHING & options.keys())
    if fetching:
        raise ValueError(f"{fetching} would bring in weights from elsewhere; a folder holds its own")
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return timm.create_model(name, pretrained=False, **options)


def _check_created(found: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuses a name that makes another model than the one that is saved, as far as its weights tell."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        created = _create(found, Path())
    fault = _difference(created.state_dict(), {key: v for key, v in state.items() if ".tokenzoo_" not in key})
    if fault:
        raise ValueError(
            f"name={found['timm']['name']!r} with options {found['timm']['options']} creates another model than this "
            f"{found['class']} (weights {fault}); give the options that the model was created with"
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = _said(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file: {error}") from error
    shared = found.get("shared", {})  # a name that is not there is missing, and said to be
    return found, state | {name: state[other] for name, other in shared.items() if other in state}


def _said(folder: Path) -> dict[str, Any]:
    for file in (RECIPE, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} holds no {file}; give a folder that tokenzoo.save or tokenzoo train wrote")
    found = parse_json((folder / RECIPE).read_bytes(), str(folder / RECIPE))
    if not isinstance(found, dict) or found.get("format") != FORMAT or not {"class", "recipe", "timm"} <= found.keys():
        raise ValueError(
            f"{folder / RECIPE} has format {found.get('format') if isinstance(found, dict) else found!r}, and this "
            f"version reads {FORMAT}; use the version of tokenzoo that wrote it"
        )
    return found


def _difference(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What weights lack, have too many, or have in another shape; empty where they fit."""
    shapes = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own.keys() & state.keys() if own[key].shape != state[key].shape
    ]  # fmt: skip
    parts = (
        ("missing", own.keys() - state.keys()), ("extra", state.keys() - own.keys()), ("of another shape", shapes),
    )  # fmt: skip
    return "; ".join(f"{what} {_some(sorted(names))}" for what, names in parts if names)


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
