"""Methods with learned modules: parameters live in the blocks, train, are saved, and leave with the method."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from cases import build, images
from torch import nn

import tokenzoo
from tokenzoo.core import registry
from tokenzoo.core.method import Method, Step
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.core.traits import Place, Traits
from tokenzoo.maps import MixMap, TokenMap


class Predictor(nn.Module):
    """Scores of every patch for every new token."""

    def __init__(self, dim: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.5)
        self.score = nn.Linear(dim, slots)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.dropout(self.norm(x)))


@dataclass(frozen=True, kw_only=True)
class ToySlim(Method):
    """Mixes all patches into a few tokens by learned weights."""

    slots: int = 6
    at: str = "between"

    name = "toy_slim"
    source = "this test"
    kind = "merge"
    traits = Traits(place=lambda m: Place(m.at))

    def strengths(self, depth: int) -> dict[int, Any]:
        return {i: self.slots for i in self.resolve_layers(depth)}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + step.strength

    def module(self, dim: int, step: Step) -> nn.Module:
        return Predictor(dim, step.strength)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap:
        prefix = tokens.layout.num_prefix
        share = signals.module(tokens.x[:, prefix:]).softmax(1).transpose(1, 2)  # [B, slots, patches]
        same = torch.eye(prefix).expand(len(share), -1, -1)
        weight = F.pad(share, (prefix, 0, prefix, 0))
        return MixMap(weight + F.pad(same, (0, tokens.num_patches, 0, step.strength)))


OURS = "tokenzoo_0_toy_slim"
NEW = [f"{OURS}.{part}" for part in ("norm.weight", "norm.bias", "score.weight", "score.bias")]


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    registry.register(ToySlim)
    yield
    del registry._METHODS[ToySlim.name]


def patched(name: str = "deit", **options: Any) -> nn.Module:
    model = build(name)
    torch.manual_seed(3)
    return tokenzoo.patch_model(model, "toy_slim", **{"layers": (1, 3), "slots": 6, **options})


@pytest.mark.parametrize("name", ["deit", "registers", "parallel_scaling", "dinov3"])
def test_parameters_live_in_their_blocks(name, caplog):
    before = build(name).state_dict()
    with caplog.at_level(logging.WARNING, logger="tokenzoo"):
        model = patched(name)
    after = model.state_dict()
    expected = [f"blocks.{block}.{key}" for block in (1, 3) for key in NEW]
    assert set(after) - set(before) == set(expected)
    assert set(before) <= set(after) and all(torch.equal(after[key], value) for key, value in before.items())
    assert "8 new parameters are untrained, in blocks." in caplog.text
    assert all(".".join(key.split(".")[:3]) in caplog.text for key in expected)  # modules, of which some hold many


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("name", ["deit", "layer_scale", "gap", "dinov3"])
def test_parameters_get_gradients(name, place):
    model = patched(name, slots=5, at=place, layers=(0, 2)).train()
    model(images(model)).square().mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if OURS in key}
    assert len(gradients) == 8
    for key, gradient in gradients.items():
        # one score shifted alike for all patches changes no share of the softmax
        if not key.endswith("score.bias"):
            assert gradient is not None and gradient.abs().max() > 0, key


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = patched(slots=5)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        torch.manual_seed(0)  # the predictor's dropout draws the same way when its block runs again
        model(images(model)).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


def test_unpatching_takes_them_away():
    model = build("deit")
    keys, x = list(model.state_dict()), images(model)
    with torch.no_grad():
        expected = model(x)
        tokenzoo.patch_model(model, "toy_slim")
        assert not torch.equal(model(x), expected)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert not any(hasattr(block, OURS) for block in model.blocks)


def test_trained_weights_come_back_through_recipe_and_state_dict():
    model = patched(slots=5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images(model)).square().mean().backward()
    optimizer.step()
    model.eval()
    recipe, weights = tokenzoo.recipe(model), model.state_dict()
    other = tokenzoo.patch_model(build("deit", seed=1), recipe)
    other.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert torch.equal(model(images(model)), other(images(model)))
        assert torch.equal(model(images(model)), copy.deepcopy(model)(images(model)))
    missing = patched().load_state_dict(build("deit", seed=1).state_dict(), strict=False)
    assert sorted(missing.missing_keys) == sorted(f"blocks.{b}.{key}" for b in (1, 3) for key in NEW)
    assert not missing.unexpected_keys


def test_layer_decay_sees_them_with_their_block():
    model = patched()
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for index in (1, 3):
        block = model.blocks[index]
        own = getattr(block, OURS)
        assert {scale[id(p)] for p in own.parameters()} == {scale[id(block.mlp.fc1.weight)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_they_start_like_their_block(dtype, training):
    model = build("deit").to(dtype).train(training)
    tokenzoo.patch_model(model, "toy_slim", layers=(1,))
    own = getattr(model.blocks[1], OURS)
    assert all(part.training is training for part in own.modules())
    assert {p.dtype for p in own.parameters()} == {dtype}
    out = model(images(model).to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


def test_two_in_one_block_keep_apart():
    model = build("deit")
    tokenzoo.patch_model(model, [ToySlim(layers=(2,), slots=8), ToySlim(layers=(2,), slots=3)])
    assert model.blocks[2].tokenzoo_0_toy_slim.score.out_features == 8
    assert model.blocks[2].tokenzoo_1_toy_slim.score.out_features == 3
    assert tokenzoo.report(model).tokens_out == 1 + 3
    assert model.forward_tokens(images(model)).length == 1 + 3


def test_beside_methods_without_parameters():
    model = build("deit")
    tokenzoo.patch_model(model, [tokenzoo.ToMe(r=2, layers=(0, 2)), ToySlim(layers=(2,), slots=4)])
    assert [key for key in model.state_dict() if "tokenzoo" in key] == [
        f"blocks.2.tokenzoo_1_toy_slim.{key.removeprefix(OURS + '.')}" for key in NEW
    ]
    assert model.forward_tokens(images(model)).length == tokenzoo.report(model).tokens_out == 1 + 4


def test_changing_options_under_learned_modules_is_refused():
    model = patched()
    with pytest.raises(ValueError, match="toy_slim keeps learned modules in its blocks; unpatch and patch again"):
        tokenzoo.update_method(model, slots=3)
    assert model.forward_tokens(images(model)).length == 1 + 6
