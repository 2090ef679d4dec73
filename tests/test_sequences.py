"""Sequence and layout agree: prompts, other image sizes, blocks called by hand; all else is refused by name."""

from functools import partial

import pytest
import timm
import torch
import yaml
from cases import BACKBONES, METHODS, VIT, build, given, images, serves
from scan_cases import build as build_scan
from test_sam import micro as sam
from test_svit_adapter import micro as svit
from torch import nn

import tokenzoo
from tokenzoo.core.recipe import Recipe
from tokenzoo.core.tokens import Tokens

PROMPTS = 5
EMBED = {"cts"}  # acts on the image, in front of the blocks
methods = pytest.mark.parametrize("method", METHODS)
POOLINGS = [
    "deit", "distilled", "registers", "gap_with_class", "gap", "avgmax", "map_with_class", "prr", "parallel_things",
    "lv_vit", "dinov3", "rope_mixed",
]  # fmt: skip


def with_prompts(model: nn.Module, place: int | None = None) -> nn.Module:
    """Prompts in the sequence by a hook, behind the class token; rotary layers of timm have to be told."""
    place = min(1, model.num_prefix_tokens) if place is None else place
    prompts = torch.randn(1, PROMPTS, model.embed_dim, generator=torch.Generator().manual_seed(3))
    model.prompts = nn.Parameter(prompts)

    def insert(module, args, out):
        return torch.cat([out[:, :place], model.prompts.expand(len(out), -1, -1), out[:, place:]], dim=1)

    model.norm_pre.register_forward_hook(insert)
    for block in model.blocks:
        if hasattr(getattr(block, "attn", None), "num_prefix_tokens"):
            block.attn.num_prefix_tokens += PROMPTS
    return model


def by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The blocks in a loop of the user's own; padding is zero, as in `forward_tokens`."""
    embedded, options = model._pos_embed(model.patch_embed(x)), {}
    if isinstance(embedded, tuple):
        embedded, options = embedded[0], {"rope": embedded[1]}
    z = model.norm_pre(embedded)
    for block in model.blocks:
        z = block(z, **options)
    assert isinstance(z, torch.Tensor)
    return model.norm(z)


def real(tokens: Tokens, x: torch.Tensor) -> torch.Tensor:
    """Values without those of padding."""
    return x if tokens.valid is None else x * tokens.valid.unsqueeze(-1)


# ---- prompts


@methods
@pytest.mark.parametrize("backbone", POOLINGS)
@torch.no_grad()
def test_prompts_are_what_they_are_without_a_patch(method, backbone):
    """Nothing removed: logits, features and pooling of the model with its hook; something removed: prompts stay."""
    model = with_prompts(build(backbone))
    if not serves(method, model):
        return
    x = images(model)
    plain, features = model(x), model.forward_features(x)
    first = model.num_prefix_tokens + PROMPTS
    if method != "ats":  # it has no strength zero
        with tokenzoo.patched(model, given(method, "zero"), protect=PROMPTS):
            torch.testing.assert_close(model(x), plain, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(model.forward_features(x), features, atol=2e-5, rtol=1e-4)
    with tokenzoo.patched(model, given(method), protect=PROMPTS):
        tokens = model.forward_tokens(x, trace=True, dense=True)
        assert (tokens.layout.num_prefix, tokens.layout.own_prefix) == (first, model.num_prefix_tokens)
        for step in tokens.trace:
            own = torch.arange(first).expand(len(x), -1)
            assert torch.equal(step.map.heads[:, :first], own) and torch.equal(step.map.assign[:, :first], own)
        assert model.lift_features(tokens).shape == features.shape
        report = tokenzoo.report(model)
        assert tokens.length <= report.tokens_out if report.data_dependent else tokens.length == report.tokens_out
        taps = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
        for spatial, prefix in taps:
            assert spatial.shape[2:] == tokens.layout.grid and prefix.shape[1] == first
        assert model(x).isfinite().all()
    assert torch.equal(model(x), plain)


@methods
@torch.no_grad()
def test_prompts_by_hand(method):
    model = build("deit")
    x = images(model)
    if method not in EMBED:
        tokenzoo.patch_model(with_prompts(model), given(method), protect=PROMPTS)
        tokens = model.forward_tokens(x)
        torch.testing.assert_close(real(tokens, by_hand(model, x)), tokens.x, atol=1e-6, rtol=1e-5)


@methods
def test_prompts_without_protect_are_refused(method):
    model = with_prompts(build("deit"))
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    with pytest.raises(ValueError, match=rf"22 tokens.* 4 x 4 .*protect={PROMPTS}"):
        model(x)
    if method not in EMBED:
        with pytest.raises(ValueError, match=rf"blocks.0 .*22 tokens.* 4 x 4 .*protect={PROMPTS}"):
            by_hand(model, x)


def test_prompts_learn():
    model = with_prompts(build("deit"))
    tokenzoo.patch_model(model, "tome", r=2, protect=PROMPTS)
    model(images(model)).square().sum().backward()
    assert (model.prompts.grad.abs().sum(-1) > 0).all()


def test_protect_is_plain_data(tmp_path):
    recipe = Recipe.parse("tome", r=2, protect=8)
    assert recipe.to_dict() == {"method": "tome", "r": 2, "protect": 8} and Recipe.parse(recipe.to_dict()) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(Recipe.parse(["evit", {"method": "tome", "r": 1}], protect=8).to_dict()))
    model = tokenzoo.patch_model(VIT(), str(file))
    assert tokenzoo.recipe(model)["protect"] == 8 and tokenzoo.report(model).rows[0].tokens_in == 25
    tokenzoo.unpatch_model(model)
    costs = [tokenzoo.report(tokenzoo.patch_model(VIT(), "tome", r=0, protect=n)) for n in (0, 8)]
    assert costs[1].unpatched > costs[0].unpatched and costs[1].total == costs[1].unpatched


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)])
def test_protect_that_is_no_count(value, error):
    with pytest.raises(error, match="protect=.*give the number"):
        tokenzoo.patch_model(VIT(), "tome", r=2, protect=value)


def test_protect_where_there_is_no_place_for_it():
    for model, method in ((svit(), "tome"), (sam(), "cluster"), (build_scan("vim"), "tome")):
        kind = type(model)
        given = {"r": 1} if method == "tome" else {"scale": 0.5, "layers": 0}
        with pytest.raises(ValueError, match=f"protect=3.*{kind.__name__}"):
            tokenzoo.patch_model(model, method, protect=3, **given)
        assert type(model) is kind


# ---- other sizes


SIZED = {
    "vit": partial(VIT, img_size=32),
    "dynamic": partial(VIT, dynamic_img_size=True),
    "registers": BACKBONES["registers"],
    "dinov3": BACKBONES["dinov3"],
    "eva": BACKBONES["eva_giant"],
    "t2t_vit": BACKBONES["t2t_vit"],
}


@methods
@pytest.mark.parametrize("name", list(SIZED))
@torch.no_grad()
def test_sizes_set_after_patching_are_followed(name, method):
    """By the model and by blocks called without it: the same as patched afterwards."""
    models = []
    for late in (False, True):
        torch.manual_seed(0)
        model = SIZED[name]().eval()
        side = 4 * model.patch_embed.img_size[0] // model.patch_embed.grid_size[0]
        size = (2 * side, side // 2)  # 8 x 2 patches: as many as before, in another grid
        if not serves(method, model):
            return
        if late:
            tokenzoo.patch_model(model, given(method))
        model.set_input_size(img_size=size)
        if not late:
            tokenzoo.patch_model(model, given(method))
        models.append(model)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(models[0](x), models[1](x))
    assert str(tokenzoo.report(models[0])) == str(tokenzoo.report(models[1]))
    if method not in EMBED:
        assert torch.equal(by_hand(models[0], x), by_hand(models[1], x))


@methods
@torch.no_grad()
def test_another_size_by_hand_is_refused_until_it_is_set(method):
    if method in EMBED:
        return
    model = SIZED["dynamic"]().eval()
    tokenzoo.patch_model(model, given(method))
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"blocks.0 .*25 tokens.* 4 x 4 .*model.set_input_size"):
        by_hand(model, x)
    model.set_input_size(img_size=(32, 48))
    tokens = model.forward_tokens(x)
    torch.testing.assert_close(real(tokens, by_hand(model, x)), tokens.x, atol=1e-6, rtol=1e-5)


def test_a_patch_embedding_put_in_by_hand():
    """Followed by the model; blocks by themselves refuse until the size is set."""
    model = tokenzoo.patch_model(VIT(pos_embed="none").eval(), "pool", stride=2)
    model.patch_embed = timm.layers.PatchEmbed(img_size=(32, 64), patch_size=8, embed_dim=32)
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        whole = model.forward_tokens(x)
        with pytest.raises(ValueError, match="set_input_size"):
            by_hand(model, x)
        model.set_input_size(img_size=(32, 64))
        torch.testing.assert_close(by_hand(model, x), whole.x, atol=1e-6, rtol=1e-5)
