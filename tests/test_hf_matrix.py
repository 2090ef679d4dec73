"""Every method on every tower of transformers: identity at zero reduction, counts as reported, exact undoing."""

import pytest
import torch
from cases import KEEPS_LENGTH, METHODS
from hf_cases import MEANS, TOWERS, answers, ask, build, given, images, served

import tokenzoo
from tokenzoo.adapters.wrappers import backbone_of
from tokenzoo.core.registry import create_method


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def model(models, tower):
    if tower not in models:
        models[tower] = build(tower)
    return models[tower]


methods = pytest.mark.parametrize("method", METHODS)
towers = pytest.mark.parametrize("tower", TOWERS)


def close(got, expected, **tolerance):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **{"atol": 1e-5, "rtol": 1e-5, **tolerance})


@methods
@towers
@torch.no_grad()
def test_zero_reduction_changes_nothing(model, method, tower):
    if not served(method, model):
        with pytest.raises(ValueError, match="class token"):
            tokenzoo.patch_model(model, method)
        return
    x = images(model)
    plain = ask(model, x, output_hidden_states=True)
    with tokenzoo.patched(model, given(method, "zero")):
        got = ask(model, x, output_hidden_states=True)
    if method != "ats":  # it has no strength zero
        close(answers(got), answers(plain))
        assert len(got.hidden_states) == len(plain.hidden_states) == 5
        close(got.hidden_states, plain.hidden_states, atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(answers(ask(model, x)), answers(plain)))


@methods
@towers
@torch.no_grad()
def test_reduction(model, method, tower):
    """Counts as reported, batch mates without influence, weights and their names as they were, exact undoing."""
    if not served(method, model):
        pytest.skip("needs a class token")
    x, backbone = images(model), backbone_of(model)
    plain, keys, classes = ask(model, x), list(model.state_dict()), [type(m) for m in model.modules()]
    tokenzoo.patch_model(model, given(method))
    try:
        report, tokens = tokenzoo.report(model), backbone.forward_tokens(x, trace=True)
        out, states = ask(model, x), ask(backbone, x, output_hidden_states=True).hidden_states
        lengths = [state.shape[1] for state in states[1:]]
        expected = [row.tokens_out for row in report.rows if row.block is not None]
        if create_method(method).traits.data_dependent or report.data_dependent:
            assert all(n <= bound for n, bound in zip(lengths, expected)) and tokens.length == lengths[-1]
        else:
            assert lengths == expected and tokens.length == report.tokens_out
        first = backbone.num_prefix_tokens + tokens.layout.num_patches
        assert (tokens.length == first) == (method in KEEPS_LENGTH)
        assert not all(
            a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(answers(out), answers(plain))
        )
        pooled = [value for value in answers(out) if value.dim() != 3]
        alone = [[v for v in answers(ask(model, image[None])) if v.dim() != 3] for image in x]
        close([torch.cat(parts) for parts in zip(*alone)], pooled, atol=2e-5, rtol=1e-4)
        close([backbone.forward_head(backbone.forward_features(x))], [backbone.forward_head(tokens)], atol=2e-5)
        assert list(model.state_dict()) == keys
    finally:
        tokenzoo.unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(answers(ask(model, x)), answers(plain)))
    assert [type(m) for m in model.modules()] == classes
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@methods
@pytest.mark.parametrize("tower", MEANS)
@torch.no_grad()
def test_means_outside_of_the_tower_weigh_by_size(model, method, tower):
    """Classifiers that take a plain mean of what the tower gives take that of its tokens by size, without padding."""
    if not served(method, model):
        pytest.skip("needs a class token")
    x, backbone = images(model), backbone_of(model)
    with tokenzoo.patched(model, given(method)):
        tokens = backbone.forward_tokens(x)
        pooled = backbone.pool_tokens(tokens, "avg")
        if tower in ("dinov2_classes", "registers_classes"):
            pooled = torch.cat([tokens.x[:, 0], pooled], dim=1)
        torch.testing.assert_close(model(x).logits, model.classifier(pooled), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", [None, "tome", "evit", "mctf", "pool", "tomesd"])
def test_formula_is_what_tracing_counts(model, tower, method):
    if method is None and tower.startswith("siglip2"):
        pytest.skip("upstream takes patches alone")
    if method is None:
        report, traced = tokenzoo.report(model), tokenzoo.count_macs(model, (3, 32, 32))
    else:
        with tokenzoo.patched(model, given(method, "static")):
            report, traced = tokenzoo.report(model), tokenzoo.count_macs(model, (3, 32, 32))
    # SigLIP 2 resizes positions by a product, which is counted as little as other interpolation
    assert traced.total == pytest.approx(report.total, rel=0.03 if tower.startswith("siglip2") else 0.01)
    blocks = {row.name: row.macs for row in report.rows if row.block is not None}
    assert dict(traced.rows[:-1]) == pytest.approx(blocks, rel=0.02)
