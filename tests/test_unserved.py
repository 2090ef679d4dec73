"""Models that no family serves are refused with the reason and the nearest thing that works."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from timm.models._registry import _module_to_models
from torch import nn

import tokenzoo
from tokenzoo.adapters import unserved
from tokenzoo.adapters.registry import families

ATTENDS = re.compile("attn|attention|mhsa", re.IGNORECASE)
FILES = sorted(name for name in _module_to_models if find_spec(f"timm.models.{name}"))  # others are registered by us


def model_classes(module: str) -> list[type]:
    """Classes of models that a module of timm defines: what has a classifier to be replaced."""
    found = vars(import_module(f"timm.models.{module}")).values()
    mine = [cls for cls in found if inspect.isclass(cls) and cls.__module__ == f"timm.models.{module}"]
    return [cls for cls in mine if issubclass(cls, nn.Module) and hasattr(cls, "reset_classifier")]


def attends(module: str) -> bool:
    """Whether a module of timm defines, or imports, attention of any kind."""
    found = vars(import_module(f"timm.models.{module}")).values()
    return any(inspect.isclass(cls) and issubclass(cls, nn.Module) and ATTENDS.search(cls.__name__) for cls in found)


def empty(cls: type) -> nn.Module:
    """An object of a class, without building the model."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    return model


@pytest.mark.parametrize("module", FILES)
def test_every_model_of_timm_is_served_or_refused_with_a_reason(module):
    served = {cls for family in families() for cls in (*family.models, *family.around)}
    refused = [cls for cls in model_classes(module) if cls not in served]
    for cls in refused:
        if not attends(module) and unserved.why_not(cls) is None:
            continue  # nobody expects a network without attention to lose tokens
        with pytest.raises(TypeError) as error:
            tokenzoo.patch_model(empty(cls), "tome")
        name = rf"timm\.models\.{module}\.{cls.__name__}"
        words = rf"{name} is not a backbone that tokenzoo can patch: it .+; nearest: .+"
        assert re.fullmatch(words, str(error.value)), str(error.value)
        assert len(str(error.value)) < 400


def test_rows_name_what_exists():
    """No row for a module that the installed packages lack, which a spelling mistake would be; older ones lack some."""
    newest = {"timm": "1.0.31", "torchvision": "0.29", "transformers": "5.24", "open_clip": "3.3"}
    names = {"open_clip": "open_clip_torch"}
    for package, least in newest.items():
        if find_spec(package) is None or Version(version(names.get(package, package))) < Version(least):
            continue
        rows = [name for name in unserved._ROWS if name.partition(".")[0] == package]
        assert rows and all(find_spec(name) is not None for name in rows), package


REFUSED = {
    "swin_transformer.SwinTransformer": "attends inside windows .*vit_small",
    "maxxvit.MaxxVit": "maps of a convolutional network",
    "mvitv2.MultiScaleVit": "shrinks its map .*pit_s_224",
    "resnet.ResNet": "is a convolutional network",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_what_else(name):
    module, _, cls = name.partition(".")
    model = empty(getattr(import_module(f"timm.models.{module}"), cls))
    with pytest.raises(TypeError, match=rf"timm\.models\.{name} is not a backbone .*{REFUSED[name]}"):
        tokenzoo.patch_model(model, "tome", r=2)


def test_others_are_refused_likewise():
    with torch.device("meta"):
        swin, apart = torchvision.models.swin_t(), timm.create_model("resnet18", features_only=True)
    for model, words in (
        (swin, r"torchvision\.\S+SwinTransformer .*attends inside windows"),
        (apart, r"FeatureListNet .*a model taken apart.*features_only"),
    ):
        with pytest.raises(TypeError, match=words):
            tokenzoo.patch_model(model, "tome", r=2)


def test_models_of_transformers_are_refused_likewise():
    transformers = pytest.importorskip("transformers")
    for name, words in (("Swin", "attends inside windows"), ("Segformer", "shrinks its map")):
        with torch.device("meta"):
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())
        start = rf"modeling_{name.lower()}\.{name}Model is not a backbone"
        with pytest.raises(TypeError, match=f"{start} .*{words}.*; nearest"):
            tokenzoo.patch_model(model, "tome", r=2)


def test_a_model_derived_from_a_known_one_has_its_reason():
    swin = timm.models.swin_transformer.SwinTransformer
    with pytest.raises(TypeError, match=r"\.Mine is not a backbone .*attends inside windows"):
        tokenzoo.patch_model(empty(type("Mine", (swin,), {})), "tome")
