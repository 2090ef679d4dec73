"""Every message that docs/troubleshooting.md quotes is raised as it stands there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

import tokenzoo

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = dict(re.findall(r"^### (.+)\n\n```text\n(.+)\n```$", PAGE, re.MULTILINE))
tiny = partial(timm.create_model, "vit_tiny_patch16_224", img_size=64, depth=4)


class Around(nn.Module):
    """A model of a user with a backbone in it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny()


class Changed(Block):
    """A block of a user."""


def patched(options: dict | None = None, method: str = "tome", model: nn.Module | None = None) -> nn.Module:
    return tokenzoo.patch_model(tiny() if model is None else model, method, **(options or {"r": 1}))


def other_block() -> None:
    model = tiny()
    model.blocks[1].__class__ = Changed
    patched(model=model)


def other_size() -> None:
    model = patched()
    model(torch.zeros(1, 3, 80, 80))


def prompts() -> None:
    model = tiny().eval()
    patched(model=model)

    def add(module: nn.Module, args: tuple) -> tuple:
        return torch.cat([args[0], args[0][:, :1]], 1), *args[1:]

    model.blocks[1].register_forward_pre_hook(add)
    model(torch.zeros(1, 3, 64, 64))


def script() -> None:
    model = tiny()
    patched(model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model)


def on_scans() -> None:
    patched({"keep_rate": 0.7}, "evit", timm.create_model("vim_tiny_patch16_224", img_size=64, depth=2))


def twice() -> None:
    model = tiny()
    patched(model=model)
    patched(model=model)


RAISED: dict[str, Callable[[], object]] = {
    "A name that nothing is known by": lambda: patched(method="tomee"),
    "An option that the method lacks": lambda: patched({"rr": 3}),
    "A value out of range": lambda: patched({"keep_rate": 1.5}, "evit"),
    "More tokens than there are": lambda: patched({"r": 13}),
    "A budget that no strength reaches": lambda: patched({"flops": 0.1}),
    "A block that is not there": lambda: patched({"layers": (9,)}, "evit"),
    "Patched twice": twice,
    "Nothing to take off": lambda: tokenzoo.unpatch_model(tiny()),
    "Wrapped before it was patched": lambda: patched(model=nn.DataParallel(tiny())),
    "A backbone inside of a model": lambda: patched(model=Around()),
    "Windows, stages and convolutions": lambda: patched(model=_swin()),
    "A block of a class of your own": other_block,
    "No class token": lambda: patched({"layers": (1,)}, "ats", tiny(class_token=False, global_pool="avg")),
    "A method of attention on a model that scans": on_scans,
    "A method for scans on a model that attends": lambda: patched({"keep_rate": 0.8}, "ssm_prune"),
    "Patch dropout": lambda: patched(model=tiny(patch_drop_rate=0.5)),
    "An image of another size": other_size,
    "Prompts added in the middle": prompts,
    "TorchScript": script,
    "A recipe file that is not there": lambda: tokenzoo.patch_model(tiny(), "configs/tome/none.yaml"),
    "Too few images to tune on": lambda: tokenzoo.tune(tiny(), torch.zeros(1, 3, 64, 64), flops=0.7),
}


def _swin() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1))


def test_every_quotation_has_its_case():
    assert list(QUOTED) == list(RAISED) and len(QUOTED) == PAGE.count("```text")


@pytest.mark.parametrize("title", QUOTED)
def test_the_message_is_raised_as_quoted(title):
    with pytest.raises((ValueError, TypeError, AssertionError)) as caught:
        RAISED[title]()
    pattern = ".+".join(re.escape(part) for part in QUOTED[title].split("..."))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
