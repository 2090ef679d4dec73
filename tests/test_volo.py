"""VOLO: methods in the transformer stages, behind outlook attention and in front of class attention."""

import copy
from functools import partial

import pytest
import timm
import torch
from cases import KEEPS_LENGTH, METHODS, given, shaken
from timm.models.volo import VOLO
from torch import nn

import tokenzoo

BASE = partial(
    VOLO, layers=(1, 2, 2), img_size=64, patch_size=8, stem_hidden_dim=8, embed_dims=(16, 32, 32), num_heads=(1, 2, 2),
    downsamples=(True, False, False), outlook_attention=(True, False, False), mlp_ratio=2.0, num_classes=7,
)  # fmt: skip
MODELS = {
    "volo": BASE,
    "volo_avg": partial(BASE, global_pool="avg"),
    "volo_one_head": partial(BASE, use_aux_head=False, qkv_bias=True),
}
SERVED = [method for method in METHODS if method not in ("ats", "cts")]
SIZE = (3, 64, 64)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
pairs = pytest.mark.parametrize("name,method", [(name, method) for name in MODELS for method in SERVED])


def micro(name="volo"):
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(batch=3, seed=1):
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    return {name: micro(name) for name in MODELS}


@pairs
@torch.no_grad()
def test_identity_reduction_and_undoing(models, name, method):
    model, x = models[name], images()
    plain, (features, maps), keys = model(x), model.forward_intermediates(x), list(model.state_dict())
    with tokenzoo.patched(model, given(method, "zero")):
        torch.testing.assert_close(model(x), plain, **CLOSE)
        final, lifted = model.forward_intermediates(x)
        torch.testing.assert_close(final, features, **CLOSE)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(lifted, maps))
    tokenzoo.patch_model(model, given(method))
    try:
        out, tokens, report = model(x), model.forward_tokens(x, trace=True), tokenzoo.report(model)
        assert tokens.length <= report.tokens_out if report.data_dependent else tokens.length == report.tokens_out
        assert report.data_dependent or (report.tokens_out == 17) == (method in KEEPS_LENGTH)
        assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-5)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), out, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), out, atol=2e-5, rtol=1e-4)
        assert [m.shape for m in model.forward_intermediates(x, intermediates_only=True)] == [m.shape for m in maps]
        assert list(model.state_dict()) == keys
    finally:
        tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain) and type(model) is VOLO
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("method", SERVED)
def test_formula_is_what_tracing_counts(models, method):
    model = models["volo"]
    assert tokenzoo.report(model).total == tokenzoo.count_macs(model, SIZE).total
    with tokenzoo.patched(model, given(method, "static")):
        assert tokenzoo.report(model).total == pytest.approx(tokenzoo.count_macs(model, SIZE).total, rel=0.01)


@torch.no_grad()
def test_the_class_token_weighs_by_size():
    model, x = micro(), images()
    tokenzoo.patch_model(model, "tome", r=2)
    *_, left = model.walk(x)
    got, out = model.forward_features(x), model(x)
    rows = torch.repeat_interleave(left.x[0], left.size[0, :, 0].long(), dim=0)[None]
    aux = model.aux_head(got[:1, 1:]).max(1)[0]
    tokenzoo.unpatch_model(model)
    whole = torch.cat([model.cls_token, rows], dim=1)
    for block in model.post_network:
        whole = block(whole)
    own = model.norm(whole)[:, 0]
    torch.testing.assert_close(got[:1, 0], own, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out[:1], model.head(own) + 0.5 * aux, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["tome", "evit", "mctf", "algm", "tomesd"])
def test_gradients_copies_and_half_precision(method):
    grads, x = [], images()
    for checkpointing in (False, True):
        model = micro().train()
        tokenzoo.patch_model(model, given(method))
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(x).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-4, rtol=1e-3, msg=key)
    model = model.eval()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        half = micro().bfloat16()
        plain = half(x.bfloat16())
        with tokenzoo.patched(half, given(method, "zero")):
            torch.testing.assert_close(half(x.bfloat16()), plain, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_stages_pruning_and_heads():
    model, x = micro(), images()
    tokenzoo.patch_model(model, "topk", keep_rate=0.5, layers=(1, 2))
    every = model.forward_intermediates(x, intermediates_only=True)
    for take in ([0], [1], [0, 1]):
        stopped = model.forward_intermediates(x, take, stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, every[i]) for a, i in zip(stopped, take)) and len(stopped) == len(take)
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), **CLOSE)
    assert model(x).shape == (3, 5)
    model.prune_intermediate_layers([0, 1])
    assert len(model.blocks) == 2 and tokenzoo.report(model).tokens_out == model.forward_tokens(x).length
    pruned = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, every))
    getter = timm.create_model("volo_d1_224", features_only=True, feature_cls="getter", img_size=64).eval()
    shapes = [f.shape for f in getter(x)]
    tokenzoo.patch_model(getter, "tome", r=1)
    assert [f.shape for f in getter(x)] == shapes


def test_released_costs():
    report = tokenzoo.report(timm.create_model("volo_d1_224"))
    assert report.total / 1e9 == pytest.approx(6.8, abs=0.2)  # the paper's figure


@torch.no_grad()
def test_exported():
    model, x = micro(), images()
    tokenzoo.patch_model(model, "tome", r=2)
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=16)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dims, strict=False).module()
    torch.testing.assert_close(program(images(5, 4)), model(images(5, 4)), atol=1e-4, rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="ats .* class token"):
        tokenzoo.patch_model(micro(), "ats")
    with pytest.raises(ValueError, match="cts embeds images at half the size"):
        tokenzoo.patch_model(micro(), "cts", shared=0)
    with pytest.raises(ValueError, match="takes the first patch for a class token"):
        tokenzoo.patch_model(BASE(post_layers=None), "tome", r=1)
    with pytest.raises(ValueError, match="served are an outlook stage"):
        tokenzoo.patch_model(BASE(outlook_attention=(True, True, False)), "tome", r=1)
    model = tokenzoo.patch_model(micro(), "tome", r=1)
    with pytest.raises(ValueError, match="forward_train mixes"):
        model.forward_train(images())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads_read_features_of_composed_recipes(models, name):
    """Sizes that pooling weighs by, dropped and padded tokens, soft sizes; and all tokens back."""
    model, x = models[name], images()
    soft = {"method": "cluster", "layers": 0, "where": "before", "scale": 0.5, "prop_attn": True}
    for recipe in (
        given("tome", mass_pool=True),
        given("mctf"),
        given("algm", prop_attn=True),
        soft,
        [given("topk", layers=0), given("tome", r=1, layers=(1, 2), mass_pool=True)],
    ):
        for dense in (False, True):
            with tokenzoo.patched(model, recipe, dense=dense):
                torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), **CLOSE)
