"""The classes that torch.hub gives for DINOv2, on a stand-in under their names: the package itself is in no index."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from cases import KEEPS_LENGTH, METHODS, VIT, given
from library_cases import SIZE, images, rough

import tokenzoo
from tokenzoo.adapters import registry
from tokenzoo.cost.trace import count_macs

methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def dino():
    """The stand-in's module of models; nothing of it is left afterwards."""
    folder, kept, later = str(Path(__file__).parent / "standins"), dict(registry._FAMILIES), dict(registry._LATER)
    assert importlib.util.find_spec("dinov2") is None, "the real package is here: test against that one"
    sys.path.insert(0, folder)
    yield importlib.import_module("dinov2.models.vision_transformer")
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dinov2" or name.endswith(".dinov2_hub")]:
        del sys.modules[name]
    for now, before in ((registry._FAMILIES, kept), (registry._LATER, later)):
        now.clear()
        now.update(before)


def build(dino, registers=0):
    torch.manual_seed(0)
    return rough(dino.DinoVisionTransformer(num_register_tokens=registers))


def twin_of(model):
    """timm's DINOv2 with the same weights."""
    registers, weights = model.num_register_tokens, {}
    options = {"init_values": 1.0, "num_classes": 0, "reg_tokens": registers, "no_embed_class": registers > 0}
    twin = VIT(**options).eval()
    for key, value in model.state_dict().items():
        key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.2.", "mlp.fc2.").replace("register_tokens", "reg_token")
        if key != "mask_token":
            weights[key] = value
    if registers:  # timm adds the position of the class token beforehand
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    twin.load_state_dict(weights)
    return twin


@methods
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_the_same_weights_in_timm_give_the_same_answer(dino, registers, method):
    model, x = build(dino, registers), images()
    twin, plain, weights = twin_of(model), model(x), list(model.state_dict())
    torch.testing.assert_close(twin(x), plain, atol=1e-5, rtol=1e-5)
    if method != "ats":
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    tokenzoo.patch_model(model, given(method))
    tokenzoo.patch_model(twin, given(method))
    torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=1e-5)
    report, features = tokenzoo.report(model), model(x, is_training=True)
    assert report.total == tokenzoo.report(twin).total
    assert report.data_dependent or (report.tokens_out == 17 + registers) == (method in KEEPS_LENGTH)
    torch.testing.assert_close(features["x_norm_clstoken"], model(x))
    assert features["x_norm_regtokens"].shape[1] == registers
    assert features["x_prenorm"].shape[1] == twin.forward_tokens(x).length <= report.tokens_out
    # a mean of the patches, as upstream's classifiers take it, is that of timm's pooling
    mean = twin.pool(twin.forward_tokens(x), "avg")
    torch.testing.assert_close(features["x_norm_patchtokens"].mean(1), mean, atol=1e-5, rtol=1e-5)
    for y, (ours, first) in zip(
        twin.forward_intermediates(x, [1, 3], norm=True, intermediates_only=True),
        model.get_intermediate_layers(x, [1, 3], reshape=True, return_class_token=True),
    ):
        torch.testing.assert_close(ours, y, atol=1e-5, rtol=1e-5)
        assert first.shape == (3, 32)
    tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain) and list(model.state_dict()) == weights
    assert type(model) is dino.DinoVisionTransformer


@torch.no_grad()
def test_upstreams_own_calls(dino):
    model, x = build(dino, 4), images()
    plain = model.get_intermediate_layers(x, 2, return_class_token=True)
    tokenzoo.patch_model(model, "tome", r=0)
    for (ours, first), (patches, own) in zip(model.get_intermediate_layers(x, 2, return_class_token=True), plain):
        torch.testing.assert_close(ours, patches, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first, own, atol=1e-5, rtol=1e-5)
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, "tome", r=2, dense=True)
    features = model(x, is_training=True)
    assert features["x_norm_patchtokens"].shape == (3, 16, 32) and features["x_prenorm"].shape == (3, 21, 32)
    torch.testing.assert_close(model.norm(features["x_prenorm"])[:, 5:], features["x_norm_patchtokens"])
    with pytest.raises(ValueError, match="masks and lists of crops belong to pre-training"):
        model(x, masks=torch.zeros(3, 16, dtype=torch.bool))
    assert tokenzoo.report(model).total == pytest.approx(count_macs(model, SIZE).total, rel=0.01)


@torch.no_grad()
def test_a_mean_of_the_patches_is_weighed_by_size(dino):
    """As upstream's classifiers take it, of a model whose recipe pools by size."""
    model, x = build(dino, 4), images()
    tokenzoo.patch_model(model, "tome", r=3, mass_pool=True)
    tokens = model.forward_tokens(x)
    expected = (tokens.x * tokens.size)[:, 5:].sum(1) / tokens.size[:, 5:].sum(1)
    torch.testing.assert_close(model.forward_features(x)["x_norm_patchtokens"].mean(1), expected, atol=1e-5, rtol=1e-5)


def test_blocks_that_are_not_the_sum_of_their_parts_are_refused(dino, monkeypatch):
    block = dino.NestedTensorBlock
    monkeypatch.setattr(block, "forward", lambda self, x: x + self.ls2(self.mlp(self.norm2(x))))
    model = build(dino).train()
    model.norm.eval()
    with pytest.raises(ValueError, match="NestedTensorBlock .* is not the sum of the parts .*vit_small_patch14_dinov2"):
        tokenzoo.patch_model(model, "tome", r=2)
    assert model.blocks[0].training and not model.norm.training and not tokenzoo.is_patched(model)
    monkeypatch.undo()
    model = build(dino)
    model.chunked_blocks = True
    with pytest.raises(ValueError, match="block_chunks=0"):
        tokenzoo.patch_model(model, "tome", r=2)
