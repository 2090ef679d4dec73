"""The way back to the full grid, for every method: shapes, identity at zero, and tokens that stand for themselves."""

import pytest
import torch
from cases import METHODS, VIT, build, given
from timm.models.vision_transformer import VisionTransformer

import tokenzoo
from tokenzoo.core.lift import Fill, lift

FILLS = ("stash", "nearest", "zero")


def grid_model(class_token=True):
    """15 x 20 patches from an image of which patches are cut with padding."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=(60, 80), patch_size=4, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, num_classes=0,
        class_token=class_token, global_pool="token" if class_token else "avg", dynamic_img_size=True,
        dynamic_img_pad=True,
    ).eval()  # fmt: skip


def patchable(model, method, kind, **more):
    """Patches a model; False where the method needs an even grid."""
    try:
        images = {"frames": 3} if method == "vggt" else {}  # of the rows, which two do not divide
        tokenzoo.patch_model(model, given(method, kind, **images), **more)
    except ValueError as error:
        assert method == "cts" and "odd" in str(error), error
        return False
    return True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fill", FILLS)
@torch.no_grad()
def test_shapes_on_an_uneven_grid(method, fill):
    model = grid_model()
    # two images whose sides are no multiples of the patch
    x = torch.randn(2, 3, 58, 77)
    plain = model.forward_features(x)
    maps = model.forward_intermediates(x, intermediates_only=True)
    if not patchable(model, method, "reduce", dense=True, fill=fill):
        return
    dense = model.forward_features(x)
    assert dense.shape == plain.shape and dense.isfinite().all()
    lifted = model.forward_intermediates(x, intermediates_only=True, norm=True)
    assert [y.shape for y in lifted] == [y.shape for y in maps]
    torch.testing.assert_close(lifted[-1].flatten(2).transpose(1, 2), dense[:, 1:], atol=1e-5, rtol=1e-5)
    alone = torch.cat([model.forward_features(image[None]) for image in x])
    torch.testing.assert_close(alone, dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ats", "reconstruct")])
@torch.no_grad()
def test_zero_reduction_is_the_unpatched_output(method):
    for model in (grid_model(), build("registers")):
        x = torch.randn(2, 3, *model.patch_embed.img_size)
        plain = model.forward_features(x)
        if patchable(model, method, "zero", dense=True):
            torch.testing.assert_close(model.forward_features(x), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_token_that_stands_for_itself_comes_back_unchanged(method):
    model = grid_model()
    x = torch.randn(2, 3, 60, 80)
    if not patchable(model, method, "reduce"):
        return
    tokens = model.forward_tokens(x, dense=True)
    if not tokens.trace or any(step.method in ("cluster", "dct", "fourier", "soft_transform") for step in tokens.trace):
        return  # nothing was taken away, or every token is a mix
    back = lift(tokens.x, tokens.trace, "zero")
    single = 0
    for image in range(2):
        assign = tokenzoo.core.tokens.trace_assign(tokens.trace, 2, 301, x.device)[image]
        members = torch.bincount(assign[assign >= 0], minlength=tokens.length)
        own = (assign >= 0) & (members[assign.clamp(min=0)] == 1)
        single += int(own.sum())
        assert torch.equal(back[image, own], tokens.x[image, assign[own]])
    assert single > 0


@torch.no_grad()
def test_compositions_lift_through_all_their_maps():
    model = grid_model()
    x = torch.randn(2, 3, 60, 80)
    tokenzoo.patch_model(
        model, [tokenzoo.ToMe(r=40, layers=(0,)), tokenzoo.TopK(keep_rate=0.5, layers=(1,))], dense=True
    )
    tokens = model.forward_tokens(x, dense=True)
    merge, keep = tokens.trace
    dense = model.forward_features(x)
    stash = model.norm(keep.before)
    for image in range(2):
        for old in range(1, 301):
            first = merge.map.assign[image, old]
            second = keep.map.assign[image, first]
            expected = tokens.x[image, second] if second >= 0 else stash[image, first]
            torch.testing.assert_close(dense[image, old], expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_nearest_is_the_nearest_kept_token():
    """Against a loop over dropped tokens and distances."""
    torch.manual_seed(0)
    model = tokenzoo.patch_model(VIT(depth=2).eval(), "topk", tokens=6, layers=(0,))
    tokens = model.forward_tokens(torch.randn(3, 3, 32, 32), dense=True)
    (step,) = tokens.trace
    for k, norm in ((1, "l1"), (3, "l1"), (3, "l2")):
        back = lift(tokens.x, tokens.trace, Fill(kind="nearest", k=k, temperature=0.1, norm=norm))
        for image in range(3):
            heads = step.map.heads[image]
            for old in (step.map.assign[image] < 0).nonzero().flatten().tolist():
                far = (step.before[image, heads[1:]] - step.before[image, old]).square().sum(1)
                near = far.argsort()[:k]
                weight = torch.exp(-0.1 * (far[near] - far.min()))
                weight = weight / (weight.sum() if norm == "l1" else weight.square().sum().sqrt())
                expected = (weight[:, None] * tokens.x[image, 1:][near]).sum(0)
                torch.testing.assert_close(back[image, old], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_maps_of_another_width_need_another_fill():
    model = tokenzoo.patch_model(VIT(depth=2).eval(), "topk", tokens=6, layers=(0,))
    tokens = model.forward_tokens(torch.randn(1, 3, 32, 32), dense=True)
    scores = tokens.x[..., :5]
    with pytest.raises(ValueError, match="topk dropped have 32 channels.*5 channels.*nearest"):
        lift(scores, tokens.trace)
    assert lift(scores, tokens.trace, "nearest").shape == (1, 17, 5)


@torch.no_grad()
def test_reconstruction_gives_side_data_back():
    """Sizes and positions after a span are those before it, whatever happened inside."""
    model = build("dinov3")
    inside = [{"method": "cluster", "layers": 0, "scale": 0.5}, {"method": "topk", "layers": [1], "tokens": 2}]
    tokenzoo.patch_model(
        model, [*inside, {"method": "reconstruct", "layers": 2}, {"method": "tome", "r": 3, "layers": [3]}]
    )
    x = torch.randn(2, 3, 32, 32)
    walked = list(model.walk(x))
    assert [tokens.length for tokens in walked] == [21, 9, 7, 21, 18]
    assert walked[3].positions is None or torch.equal(walked[3].positions, torch.arange(21).expand(2, -1))
    assert (walked[3].sizes() == 1).all() and float(walked[4].sizes().sum()) == 42
