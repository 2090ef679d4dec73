"""One image through a model without and with reduction: answers, costs, time, and where every patch goes."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from ..apply.patch import patched, recipe
from ..cost.report import report
from ..view.maps import token_maps
from .models import Shown
from .uploads import Refused

_ONE_AT_A_TIME = threading.Lock()  # a model is patched in place, and time is measured
_ROUNDS = 5


class Wanted(NamedTuple):
    """A method and its strength.

    Attributes:
        method: its registered name.
        share: of the unpatched multiply-adds that it may cost.
    """

    method: str
    share: float


def show(shown: Shown, image: Image.Image, wanted: Sequence[Wanted]) -> dict[str, Any]:
    """What a page needs to draw an image losing tokens; JSON safe.

    Args:
        shown: the model; unpatched again when this returns.
        image: RGB.
        wanted: methods, each by itself.

    Returns:
        `image` (what the model sees, a PNG as data URL), `before` (top-5, milliseconds, multiply-adds), and `after`, an
        entry per method: the same, its recipe as YAML, and per reducing block the token of every patch, -1 for none.

    Raises:
        Refused: 422 for a method that is unknown, that this model cannot take, or that cannot reach the share.
    """
    x = shown.transform(image).unsqueeze(0)
    with _ONE_AT_A_TIME, torch.inference_mode():
        model = shown.model
        x = x.to(next(model.parameters()).device)
        before = _measured(shown, x)
        return {
            "image": _png(shown.restore(x[0].cpu())),
            "about": shown.about,
            "before": before,
            "after": [_reduced(shown, x, want) for want in wanted],
        }


def _reduced(shown: Shown, x: Tensor, want: Wanted) -> dict[str, Any]:
    try:
        with patched(shown.model, want.method, flops=want.share) as model:
            maps = token_maps(model, x)
            blocks = [
                {
                    "block": entry.block,
                    "tokens_in": int(entry.tokens_in[0]),
                    "tokens_out": int(entry.tokens_out[0]),
                    "assign": entry.assign[0].tolist(),
                    "inside": entry.inside,
                }
                for entry in maps.blocks
            ]
            said = {"recipe": _yaml(recipe(model)), "grid": list(maps.grid), "blocks": blocks}
            return {**want._asdict(), **_measured(shown, x), **said}
    except (ValueError, TypeError) as error:
        raise Refused(422, f"{want.method} cannot be shown: {error}") from error


def _measured(shown: Shown, x: Tensor) -> dict[str, Any]:
    """Answer and costs of a model as it stands."""
    model, seconds = shown.model, []
    answer = _logits(model, x)
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        _logits(model, x)
        seconds.append(time.perf_counter() - began)
    costs = report(model, tuple(x.shape[-2:]))
    return {
        "top": _top(answer, shown.labels),
        "ms": 1e3 * min(seconds),  # other programs only ever add to it
        "gmacs": costs.total / 1e9,
        "ratio": costs.ratio,
    }


def _logits(model: nn.Module, x: Tensor) -> Tensor | None:
    out = model(x)
    out = getattr(out, "logits", out)
    out = out[0] if isinstance(out, tuple) else out
    return out.float().cpu() if isinstance(out, Tensor) else None


def _top(logits: Tensor | None, labels: Sequence[str]) -> list[dict[str, Any]]:
    if logits is None or logits.ndim != 2 or logits.shape[1] < 2:
        return []  # no classifier
    share, index = logits[0].softmax(0).topk(min(5, logits.shape[1]))
    names = [labels[i] if i < len(labels) else f"class {i}" for i in index.tolist()]
    return [{"label": name, "share": value} for name, value in zip(names, share.tolist())]


def _yaml(options: dict[str, Any]) -> str:
    """A line per option, lists within their line."""
    single = ({key: value} for key, value in options.items())
    lines = (yaml.safe_dump(option, default_flow_style=None, width=10**6).strip() for option in single)
    return "".join(f"{line[1:-1] if line.startswith('{') else line}\n" for line in lines)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
