"""The example of a backbone from outside: every method that serves attention, and everything behind the commands."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from cases import KEEPS_LENGTH, METHODS, given, shaken
from PIL import Image
from scan_cases import SCAN_METHODS

import tokenzoo
from tokenzoo.adapters import registry
from tokenzoo.apply.export import export
from tokenzoo.cost.trace import count_macs
from tokenzoo.evaluation import Run, bench, evaluate
from tokenzoo.view.maps import draw_token_maps, token_maps

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_backbone.py"
SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def example():
    """The example, whose family is taken out of the registry afterwards: other tests count families."""
    spec = importlib.util.spec_from_file_location("own_backbone", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    registry._FAMILIES.pop("my_vit")


@pytest.fixture
def model(example):
    torch.manual_seed(0)
    return shaken(example.MyViT())


def images(batch=3, seed=1):
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))


methods = pytest.mark.parametrize("method", METHODS)


def test_the_example_is_short():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 60 and not any("timm" in line for line in lines)


def test_registered(model):
    assert tokenzoo.list_backbones()["my_vit"] == ["MyViT"]
    assert tokenzoo.register_family is registry.register_family


def test_classes_that_cannot_stand_for_others_are_refused(example):
    wrong = type("Wrong", (example.MyViT, tokenzoo.adapters.ReducingModel), {})
    other = type("Other", (example.MyViT,), {})
    for models in ({example.MyViT: wrong}, {other: example.ReducingMyViT}, {example.MyViT: other}):
        with pytest.raises(TypeError, match=r"write class \w+\(ReducingModel, \w+\), in this order"):
            tokenzoo.register_family(tokenzoo.adapters.Family(name="wrong", models=models, blocks={}))
    for inner in ({"blocks": {example.Layer: example.Layer}}, {"attentions": {example.Attention: example.Layer}}):
        classes = {"models": {}, "blocks": {}, **inner}
        with pytest.raises(TypeError, match="ReducingBlock|AttentionLayer"):
            tokenzoo.register_family(tokenzoo.adapters.Family(name="wrong", **classes))
    assert "wrong" not in tokenzoo.list_backbones()


def test_unknown_parts_are_refused(example, model):
    class Mine(example.Attention):
        pass

    model.layers[1].attn = Mine(32, 2)
    with pytest.raises(TypeError, match="layers.1 attends with .*Mine"):
        tokenzoo.patch_model(model, "tome", r=2)
    model.layers[2].__class__ = type("Layer", (example.Layer,), {})
    with pytest.raises(TypeError, match="layers.1 attends|layers.2 is"):
        tokenzoo.patch_model(model, "tome", r=2)
    assert not tokenzoo.is_patched(model)


@methods
@torch.no_grad()
def test_identity_reduction_and_undoing(model, method):
    x, plain = images(), model(images())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    names = [set(vars(module)) for module in model.modules()]
    if method != "ats":  # it has no strength zero
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.forward_head(model.forward_features(x)), plain, atol=1e-5, rtol=1e-5)
    tokenzoo.patch_model(model, given(method))
    out, tokens, report = model(x), model.forward_tokens(x, trace=True), tokenzoo.report(model)
    assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-5)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), out, atol=2e-5, rtol=1e-4)
    assert tokens.length <= report.tokens_out if report.data_dependent else tokens.length == report.tokens_out
    assert report.data_dependent or (report.tokens_out == 17) == (method in KEEPS_LENGTH)
    lifted = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(y.shape) for y in lifted] == [(3, 32, 4, 4)] * 4
    tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain)
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == names


@pytest.mark.parametrize("method", sorted(set(SCAN_METHODS) - set(METHODS)))
def test_methods_for_scans_are_refused(model, method):
    with pytest.raises(ValueError, match="MyViT has none"):
        tokenzoo.patch_model(model, method)


@pytest.mark.parametrize("recipe", [None, *(given(name, "static") for name in ("tome", "evit", "mctf", "pool"))])
def test_counts_are_those_of_tracing(model, recipe):
    if recipe is not None:
        tokenzoo.patch_model(model, recipe)
    report, traced = tokenzoo.report(model), count_macs(model, SIZE)
    assert report.total == pytest.approx(traced.total, rel=0.01)
    blocks = [row.macs for row in report.rows if row.block is not None]
    assert [macs for name, macs in traced.rows if name.startswith("layers.")] == pytest.approx(blocks, rel=0.02)


def test_budget_and_training(model):
    tokenzoo.patch_model(model, "evit", flops=0.85)
    assert tokenzoo.report(model).ratio == pytest.approx(0.85, abs=0.02)
    model.train()(images()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(copy.deepcopy(model).eval()(images()), model.eval()(images()))


def test_bench_and_eval(model):
    runs = [Run("tome", {"r": 2}), Run("ats", {"layers": [1]}), Run("pool", {"stride": 2})]
    results = bench(model, runs, batch_size=2, rounds=1, warmup=1, latency=False, input_size=SIZE)
    assert [r.tokens_out for r in results][::3] == [17, 5] and results[1].tokens_out == 9
    assert results[1].gmacs < results[0].gmacs
    batches = [(images(4), torch.arange(4))]
    scores = evaluate(model, runs, batches, input_size=SIZE)
    assert [s.n_images for s in scores] == [4] * 4 and scores[0].tokens_out == 17


def test_show(model):
    tokenzoo.patch_model(model, "tome", r=2)
    maps = token_maps(model, images(1))
    assert maps.grid == (4, 4) and len(maps.blocks) == 4
    assert draw_token_maps(Image.new("RGB", (32, 32)), maps).width > 32


def test_export(model, tmp_path):
    tokenzoo.patch_model(model, "tome", r=2)
    done = export(model, tmp_path / "model.pt2", images(2))
    assert done.difference <= 1e-4 and done.batch_sizes == (2, 1)
