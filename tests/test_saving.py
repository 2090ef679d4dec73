"""A model as one folder: what comes back, what fits and what does not, and that nothing in it runs."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import timm
import torch
from cases import build, images
from safetensors.torch import load_file, save_file
from test_docs import blocks
from torch import nn
from training_data import ROOT

import tokenzoo
from tokenzoo.apply.saving import RECIPE, WEIGHTS

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
NAME = "vit_tiny_patch16_224"


def created(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**TINY, **options}).eval()


@pytest.mark.parametrize("method", [
    None, {"method": "tome", "r": 2}, "sit", ["dynamicvit", {"method": "tome", "r": 1, "layers": [0]}],
], ids=str)  # fmt: skip
@torch.no_grad()
def test_created_from_its_name(method, tmp_path, caplog):
    model = created()
    if method is not None:
        tokenzoo.patch_model(model, method)
    x = images(model)
    folder = tokenzoo.save(model, tmp_path / "new" / "folder", NAME, **TINY)
    assert sorted(path.name for path in folder.iterdir()) == sorted([RECIPE, WEIGHTS])
    caplog.clear()
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING, logger="tokenzoo"):
        other = tokenzoo.load(folder)
    assert not caplog.records  # no word about parameters that are untrained
    assert torch.equal(other(x), model(x)) and not other.training
    assert tokenzoo.is_patched(other) == (method is not None)
    assert method is None or tokenzoo.recipe(other) == tokenzoo.recipe(model)
    assert list(other.state_dict()) == list(model.state_dict())


@torch.no_grad()
def test_number_formats_and_what_is_there_already(tmp_path):
    model = tokenzoo.patch_model(created().to(torch.bfloat16), "dynamicvit")
    tokenzoo.save(model, tmp_path, NAME, **TINY)
    other = tokenzoo.load(tmp_path)
    x = images(model).to(torch.bfloat16)
    assert other(x).dtype == torch.bfloat16 and torch.equal(other(x), model(x))
    tokenzoo.save(created(), tmp_path, NAME, **TINY)  # in its place
    assert not tokenzoo.is_patched(tokenzoo.load(tmp_path))
    assert not list(tmp_path.glob("*.part"))


class Tied(nn.Module):
    """A classifier and its twin share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.turned = nn.Linear(6, 3)
        self.turned.weight = nn.Parameter(torch.randn(6, 3).t())


def test_shared_and_turned_weights(tmp_path):
    model, other = Tied(), Tied()
    tokenzoo.save(model, tmp_path)
    assert "second.weight" not in load_file(tmp_path / WEIGHTS)
    tokenzoo.load(tmp_path, other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_models_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    tokenzoo.patch_model(model, "dynamicvit", keep_rate=0.6)
    x = torch.randn(2, 3, 32, 32)
    tokenzoo.save(model, tmp_path)
    other = tokenzoo.load(tmp_path, transformers.ViTForImageClassification(config).eval())
    assert torch.equal(other(x).logits, model(x).logits)
    with pytest.raises(ValueError, match="does not say how to create.*ViTForImageClassification.*load\\(folder, model"):
        tokenzoo.load(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = tokenzoo.patch_model(build("deit"), "dynamicvit", layers=(1,))
    tokenzoo.save(model, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    del state["blocks.1.tokenzoo_0_dynamicvit.out_conv.0.bias"], state["norm.weight"]
    state["more"], state["head.weight"] = torch.zeros(2), torch.zeros(9, 32)
    save_file(state, tmp_path / WEIGHTS)
    other = build("deit", seed=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=(
        "missing blocks.1.tokenzoo_0_dynamicvit.out_conv.0.bias, norm.weight; extra more; of another shape "
        r"head.weight \[9, 32\] for \[7, 32\]"
    )):  # fmt: skip
        tokenzoo.load(tmp_path, other)
    assert not tokenzoo.is_patched(other)
    after = other.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())


def test_bad_input(tmp_path):
    model = created()
    with pytest.raises(ValueError, match=r"options \['num_classes'\] are for timm.create_model; give the name"):
        tokenzoo.save(model, tmp_path / "a", num_classes=7)
    with pytest.raises(ValueError, match=r"creates another model.*of another shape head.bias \[7\] for \[1000\]"):
        tokenzoo.save(model, tmp_path / "a", NAME, **{**TINY, "num_classes": 1000})
    with pytest.raises(ValueError, match="norm_layer=.* cannot be written as JSON"):
        tokenzoo.save(model, tmp_path / "a", NAME, **TINY, norm_layer=nn.LayerNorm)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=f"holds no {RECIPE}"):
        tokenzoo.load(tmp_path)
    tokenzoo.save(model, tmp_path, NAME, **TINY)
    with pytest.raises(ValueError, match="patched already.*unpatch_model"):
        tokenzoo.load(tmp_path, tokenzoo.patch_model(created(), "topk"))
    found = json.loads((tmp_path / RECIPE).read_text())
    for text, message in (
        (json.dumps({**found, "format": 99}), "has format 99, and this version reads 1"), ("[1", "is not valid JSON"),
        (json.dumps({**found, "recipe": {"method": "no_such"}}), "no_such"),
    ):  # fmt: skip
        (tmp_path / RECIPE).write_text(text)
        with pytest.raises(ValueError, match=message):
            tokenzoo.load(tmp_path)
    for name, options, message in (
        ("hf-hub:someone/model", {}, "'hf-hub:someone/model' is no model of the installed timm"),
        (NAME, {"checkpoint_path": "x.pth"}, r"\['checkpoint_path'\] would bring in weights from elsewhere"),
    ):  # fmt: skip
        (tmp_path / RECIPE).write_text(json.dumps({**found, "timm": {"name": name, "options": options}}))
        with pytest.raises(ValueError, match=message):
            tokenzoo.load(tmp_path)
    (tmp_path / RECIPE).write_text(json.dumps(found))
    torch.save(model, tmp_path / WEIGHTS)  # a pickle, which could run code
    with pytest.raises(ValueError, match=f"{WEIGHTS} is no safetensors file"):
        tokenzoo.load(tmp_path)


def test_as_the_page_says(tmp_path, monkeypatch):
    """Released names and the folder, with the page's own lines."""
    *_, released, _, saved = blocks((ROOT / "docs" / "learned.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("deit_small_patch16_224", num_classes=200)
    state = model.state_dict()
    from tokenzoo.layers.token_predictor import TokenPredictor

    predictors = [TokenPredictor(384) for _ in range(3)]
    for stage, predictor in enumerate(predictors):
        state |= {f"score_predictor.{stage}.{key}": value for key, value in predictor.state_dict().items()}
    torch.save({"model": state}, "dynamic-vit_384_r0.7.pth")
    names = {"timm": timm, "torch": torch, "tokenzoo": tokenzoo}
    released = released.replace('"deit_small_patch16_224"', '"deit_small_patch16_224", num_classes=200')
    exec(released, names)
    held = names["model"].blocks[6].tokenzoo_0_dynamicvit.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in predictors[1].state_dict().items())
    exec(saved, names)
    assert tokenzoo.recipe(names["model"])["method"] == "dynamicvit"
    x = torch.randn(1, 3, 224, 224)
    assert names["model"](x).shape == (1, 200) and torch.equal(names["model"].blocks[6].tokenzoo_0_dynamicvit.in_conv[1]
                                                             .weight, predictors[1].in_conv[1].weight)


def test_released_names_need_a_method_that_has_some():
    model = build("deit")
    with pytest.raises(ValueError, match="is not patched; call tokenzoo.patch_model"):
        tokenzoo.rename_released(model, {})
    with pytest.raises(ValueError, match="no method of the model's recipe has released weights"):
        tokenzoo.rename_released(tokenzoo.patch_model(model, "tome", r=1), {})
