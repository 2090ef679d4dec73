"""What the tables of frozen backbones share: weights, recipes at several strengths, and runs that take turns.

CARD.md beside the weights says where they come from. They are read from a folder that the user names; nothing of them
is written anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core.learned import needs_training
from tokenzoo.evaluation.runs import Run, shared_copy

SPARE = (0.9, 0.7, 0.5, 0.95, 0.85, 0.75)  # where a method cannot go as far down, it gets strengths above its floor
TURN = 10  # reducing runs between two runs of the unpatched model: ratios are to the one before


class Card(NamedTuple):
    """A backbone: timm's name, its file and folder, and how its images are normalised."""

    model: str
    folder: str
    file: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CARDS = {
    "vit_tiny_tin200": Card("vit_tiny_patch16_224", "vit_tiny_tin200", "model.safetensors", (0.5,) * 3, (0.5,) * 3),
    "vit_small14_saliency": Card(
        "vit_small_patch14_dinov2", "vit_small14_saliency", "backbone.safetensors", (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
}  # fmt: skip


class Setting(NamedTuple):
    """One row of a table: its name, the methods' names, what `patch_model` takes, the share asked for, and the recipe
    that was found for it, so that it is solved once."""

    name: str
    method: str
    run: Run
    share: float | None = None
    solved: Any = None


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options that name weights, images with masks, the card and the size of what a backbone reads."""
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--card", choices=sorted(CARDS), required=True)
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"))


def load_backbone(weights: Path, card: Card, size: tuple[int, int]) -> nn.Module:
    """The backbone with its position embeddings resampled once for images of `size` (height, width)."""
    model = timm.create_model(card.model, num_classes=0, img_size=size).eval().requires_grad_(False)
    state = {k: v.float() for k, v in load_file(weights / card.folder / card.file).items() if not k.startswith("head.")}
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(model.patch_embed.grid_size), [side, side], num_prefix_tokens=1
    )
    model.load_state_dict(state)
    return model


def read_image(path: Path, size: tuple[int, int], card: Card, crop: bool = False) -> Tensor:
    """An image [1, 3, height, width] as the backbone takes it, resized to `size`, or cut to its shape first."""
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    if crop:
        high, wide = image.shape[-2:]
        side = min(high, wide)
        top, left = (high - side) // 2, (wide - side) // 2
        image = image[:, :, top : top + side, left : left + side]
    image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    return (image - mean) / std


def at_shares(
    model: nn.Module, shares: Sequence[float], options: Mapping[str, Mapping[str, Any]], spare: Sequence[float] = SPARE
) -> list[Setting]:
    """Every method that needs no training at the shares of the multiply-adds that it can reach, or at others above.

    Args:
        model: the backbone.
        shares: asked for.
        options: of methods by name, besides the share.
        spare: shares for methods that cannot reach all of these.
    """
    found = []
    for name in tokenzoo.list_methods():
        if tokenzoo.create_method(name).closes_span or needs_training(tokenzoo.method_class(name)):
            continue  # rebuilds what another method took away; or says nothing before it is trained
        own: dict[int, Setting] = {}
        for share in (*shares, *spare):
            if len(own) == len(shares):
                break
            given = {"flops": share, **options.get(name, {})}
            trial = shared_copy(model)
            try:
                tokenzoo.patch_model(trial, name, **given)
            except (ValueError, TypeError) as error:
                print(f"left out: {name} at {share}: {error}", flush=True)
                if "cannot be reached" not in str(error):
                    break
                continue
            text, solved = " ".join([name, *(f"{k}={v}" for k, v in given.items())]), tokenzoo.recipe(trial)
            total = int(tokenzoo.report(trial, model.patch_embed.img_size).total)
            own.setdefault(total, Setting(text, name, Run(name, given), share, solved))
        found += [own[total] for total in sorted(own, reverse=True)]
    return found


def patched_copies(model: nn.Module, settings: Sequence[Setting]) -> dict[str, nn.Module]:
    """One model per setting, on shared weights; "unpatched" is the model itself."""
    models = {"unpatched": model}
    for setting in settings:
        own = shared_copy(model)
        if setting.solved is not None:
            tokenzoo.patch_model(own, setting.solved)
        else:
            tokenzoo.patch_model(own, setting.run.recipe(), flops=setting.run.flops)
        models[setting.name] = own
    return models


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds of CPU time."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def take_turns(
    images: Iterable[str], names: Sequence[str], state: Path, work: Callable[[str, str], dict[str, Any]]
) -> Iterator[str]:
    """Runs all settings on one image after another, and keeps what they give, one line per image.

    The unpatched model comes first and again after every `TURN` settings, whose order starts at another place for
    every image. Images that have a line of the same settings are done.

    Args:
        images: names.
        names: of the reducing settings.
        state: file of lines {"image", "rows": [[setting, index of the unpatched run before it, values]]}.
        work: (setting, image) to values that JSON can hold.
    """
    done = {line["image"] for line in read_state(state, names)}
    for number, image in enumerate(images):
        if image in done:
            continue
        turn = number * 7 % max(1, len(names))
        rows: list[list[Any]] = []
        last = 0
        for place, name in enumerate((*names[turn:], *names[:turn])):
            if place % TURN == 0:
                last = len(rows)
                rows.append(["unpatched", last, work("unpatched", image)])
            rows.append([name, last, work(name, image)])
        with state.open("a") as file:
            file.write(json.dumps({"image": image, "names": list(names), "rows": rows}) + "\n")
        yield image


def read_state(state: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of all images that were run with these settings, among others or not.

    Raises:
        ValueError: the file lacks some of these settings.
    """
    lines = [json.loads(line) for line in state.read_text().splitlines()] if state.is_file() else []
    for line in lines:
        if not set(names) <= set(line["names"]):
            raise ValueError(f"{state} was written with other settings; name another file, or delete it")
    return lines


def by_setting(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(values of a setting, values of the unpatched run before it), one pair per image."""
    pairs = []
    for line in lines:
        rows = line["rows"]
        _, before, values = next(row for row in rows if row[0] == name)
        pairs.append((values, rows[before][2]))
    return pairs
