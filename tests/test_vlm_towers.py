"""Methods inside the tower of a vision-language model, together with a selector and droppers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import vlm_reference as reference
from vlm_cases import FAMILIES, Loudest, alone, build, loudest, prompts, tower_of

import tokenzoo
from tokenzoo.view.maps import token_maps
from tokenzoo.vlm.reading import Noting
from tokenzoo.vlm.recipe import VlmRecipe

PACKED = [name for name in FAMILIES if name.startswith("qwen")]
families = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PACKED])
METHODS = {"tome": lambda: tokenzoo.ToMe(r=2), "evit": lambda: tokenzoo.EViT(keep_rate=0.7, layers=[1, 2])}
methods = pytest.mark.parametrize("method", METHODS)


def behind(keep: int = 9) -> list:
    return [Loudest(keep=keep), tokenzoo.FastV(layers=3)]


@families
def test_a_tower_that_reduces_nothing_changes_nothing(name):
    model = build(name)
    batch = prompts(name, model)
    kinds = [type(m) for m in model.modules()]
    with torch.no_grad():
        plain = model(**batch).logits
        tokenzoo.patch_model(model, ["fastervlm", tokenzoo.FastV(layers=3)], prefill=0.7, text=16, images=[16])
        recipe, want = model.tokenzoo_recipe, model(**batch).logits
        tokenzoo.unpatch_model(model)
        tokenzoo.patch_model(model, [tokenzoo.ToMe(r=0), recipe.selector, *recipe.droppers])
        assert torch.equal(model(**batch).logits, want)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(**batch).logits, plain)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("tokenzoo" in key for m in model.modules() for key in vars(m))
    assert not any(isinstance(h, Noting) for m in model.modules() for h in m._forward_pre_hooks.values())


@families
@methods
def test_rows_come_from_the_reduced_tower(name, method):
    """As an unpatched language model on some of the rows of a tower that gives all tokens back."""
    model = build(name)
    batch = prompts(name, model)
    whole = [rows.clone() for rows in reference.features(model, batch)]
    tokenzoo.patch_model(tower_of(model), METHODS[method](), dense=True)
    expected = []
    for one in alone(name, batch, (1, 2)):
        rows = reference.features(model, one)
        kept = torch.cat([loudest(model, each, 6) for each in rows])
        expected.append(reference.logits(model, one, reference.at_entry(model, one, kept)))
    assert not torch.equal(reference.features(model, batch)[0], whole[0])
    tokenzoo.unpatch_model(tower_of(model))
    tokenzoo.patch_model(model, [METHODS[method](), Loudest(keep=6)])
    with torch.no_grad():
        found = model(**batch).logits
    for row, want in zip(found, expected):
        assert (row[-len(want) :] - want).abs().max() <= 1e-5


@families
def test_a_batch_is_each_prompt_alone(name):
    model = build(name, double=True)
    batch = prompts(name, model, (1, 2, 0))
    tokenzoo.patch_model(model, [tokenzoo.ToMe(r=2), *behind()])
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone(name, batch, (1, 2, 0))):
            want = model(**one).logits[0]
            assert (row[-len(want) :] - want).abs().max() <= 1e-6


@dataclass(frozen=True, kw_only=True)
class Asking(Loudest):
    """Notes what the class token attends to."""

    reads = ("tower",)
    name = "asking"

    def map(self, rows, signals, keep):
        SEEN.append(signals.class_row(-2))
        return super().map(rows, signals, keep)


SEEN: list[torch.Tensor] = []


def test_signals_of_merged_tokens_are_shares_of_their_patches():
    """Attention to a token of size s, weighed by log s as ToMe does, falls to its s patches in equal parts."""
    model = build("llava", double=True)
    batch = prompts("llava", model, counts=(1,))
    tower = tower_of(model)
    tokenzoo.patch_model(tower, tokenzoo.ToMe(r=2))
    inputs, layer = [], tower.encoder.layers[2]  # its output is handed on
    hook = layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    maps = token_maps(tower, batch["pixel_values"])
    hook.remove()
    assign = next(block for block in maps.blocks if block.block == 1).assign[0]
    tokenzoo.unpatch_model(tower)
    x, attn = inputs[0][0], layer.self_attn
    assert len(x) == 17 - 4
    z = layer.layer_norm1(x)
    q, k = (proj(z).unflatten(-1, (2, -1)).transpose(0, 1) for proj in (attn.q_proj, attn.k_proj))  # [H, n, d]
    size = torch.ones(len(x)).double()
    size[1:] = torch.bincount(assign, minlength=len(x))[1:].double()
    logits = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5)[:, 0] + size.log()
    want = (logits.softmax(-1).mean(0) / size)[assign]
    SEEN.clear()
    tokenzoo.patch_model(model, [tokenzoo.ToMe(r=2), Asking(keep=6)])
    with torch.no_grad():
        model(**batch)
    assert (SEEN[0][0] - want).abs().max() <= 1e-6


def test_generation_copies_and_reports():
    model = build("llava")
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, [tokenzoo.ToMe(r=3), *behind()])
    assert [row.tokens_out for row in tokenzoo.report(model).tower.rows if "layers" in row.name] == [14, 11, 8, 5]
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.generate(**batch, **options)
    assert all(torch.equal(twin.generate(**batch, **options), want) for twin in twins)
    told = tokenzoo.visual_rows(model, **batch)
    assert [int(each.keep.sum()) for each in told] == [9, 9, 9]


def test_gradients_reach_the_tower_with_and_without_checkpoints():
    model = build("llava", double=True).train()
    batch = prompts("llava", model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    tokenzoo.patch_model(model, [tokenzoo.ToMe(r=2), *behind()])

    def gradient():
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return tower_of(model).encoder.layers[0].mlp.fc1.weight.grad.clone()

    plain = gradient()
    assert plain.abs().sum() > 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert (gradient() - plain).abs().max() <= 1e-10


@pytest.mark.parametrize("method", [
    "tome",
    [{"method": "tower:random", "keep_rate": 0.5}, {"method": "uniform", "keep": 4}],
    [{"method": ["tome", "tower:random"], "fill": "zero"}, "fastv"],
    [{"method": "evit", "fill": "nearest"}, {"method": "random", "keep": 4}],
])  # fmt: skip
def test_recipes_are_plain_data(method):
    recipe = VlmRecipe.parse(method)
    assert recipe.tower is not None and VlmRecipe.parse(recipe.to_dict()) == recipe


def test_options_of_a_whole_tower_are_given_once():
    with pytest.raises(ValueError, match="in one part"):
        VlmRecipe.parse(["tome", {"method": "evit", "fill": "zero"}])
    with pytest.raises(ValueError, match="outermost list"):
        VlmRecipe.parse([{"method": ["tome", "fastv"]}])


@pytest.mark.parametrize("name", PACKED[:1])
def test_packed_towers_refuse_methods(name):
    model = build(name)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="packs images"):
        tokenzoo.patch_model(model, ["tome", *behind()])
    assert [type(m) for m in model.modules()] == kinds


def test_a_tower_that_cannot_follow_leaves_the_model_as_it_was():
    model = build("paligemma")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="class token"):
        tokenzoo.patch_model(model, ["ats", *behind()])
    assert [type(m) for m in model.modules()] == kinds and not tokenzoo.is_patched(model)
