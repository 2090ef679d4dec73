"""Every method on every backbone: identity at zero reduction, right shapes and counts, exact undoing."""

import copy
import io
import pickle

import pytest
import torch
from cases import EVERY, KEEPS_LENGTH, backbone_names, build, given, images, serves
from scan_cases import SCAN_METHODS
from torch.utils._python_dispatch import TorchDispatchMode

import tokenzoo
from tokenzoo.adapters.wrappers import backbone_of
from tokenzoo.core.step import Step


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in backbone_names()}


pairs = pytest.mark.parametrize("method", EVERY)
backbones = pytest.mark.parametrize("backbone", backbone_names())


def test_the_table_has_a_row_for_every_method():
    """In the table of models that attend, or in that of models that scan."""
    scanning = {name for name in tokenzoo.list_methods() if tokenzoo.create_method(name).reads_scan}
    assert sorted({*EVERY, *SCAN_METHODS}) == tokenzoo.list_methods() and set(SCAN_METHODS) - set(EVERY) == scanning


@pairs
@backbones
@torch.no_grad()
def test_zero_reduction_changes_nothing(models, method, backbone):
    model = models[backbone]
    if not serves(method, model):
        with pytest.raises(ValueError, match="token|half the size|cannot be replaced|channels|through gates"):
            tokenzoo.patch_model(model, method)
        return
    x = images(model)
    plain, features = model(x), model.forward_features(x)
    with tokenzoo.patched(model, given(method, "zero")):
        if method == "ats":
            # it has no strength zero; sampling the queries of the last block leaves the prefix rows what they were
            prefix = model.num_prefix_tokens
            got = model.forward_features(x)
            torch.testing.assert_close(got[:, :prefix], features[:, :prefix], atol=1e-5, rtol=1e-5)
            assert got.shape[1] < features.shape[1]
            if model.global_pool == "token":
                torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.forward_features(x), features, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), plain)


@pairs
@backbones
@torch.no_grad()
def test_reduction(models, method, backbone):
    """Counts as reported, intermediates complete, batch mates without influence, and exact undoing."""
    model = models[backbone]
    if not serves(method, model):
        return
    x = images(model)
    plain, keys = model(x), list(model.state_dict())
    old = not hasattr(model, "forward_intermediates")  # ConViT in older releases of timm
    full = None if old else model.forward_intermediates(x, intermediates_only=True)
    tokenzoo.patch_model(model, given(method))
    try:
        tokens = model.forward_tokens(x, trace=True)
        report = tokenzoo.report(model)
        out = model(x)
        if report.data_dependent:
            assert tokens.length <= report.tokens_out
        elif method in KEEPS_LENGTH:
            assert tokens.length == report.tokens_out == model.num_prefix_tokens + tokens.layout.num_patches
        else:
            assert tokens.length == report.tokens_out < model.num_prefix_tokens + tokens.layout.num_patches
        assert bool(tokens.trace) == (method not in KEEPS_LENGTH) and out.isfinite().all()
        if model.global_pool:
            assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-5)
            alone = torch.cat([model(image[None]) for image in x])
            torch.testing.assert_close(alone, out, atol=2e-5, rtol=1e-4)
        if tokens.size is not None and tokenzoo.method_class(method).kind == "merge":
            start = float(model.num_prefix_tokens + tokens.layout.num_patches)
            torch.testing.assert_close(tokens.size.sum(1), torch.full((len(x), 1), start))
            assert (tokens.size[:, : model.num_prefix_tokens] == 1).all()
        lifted = model.forward_intermediates(x, intermediates_only=True)
        assert old or [y.shape for y in lifted] == [y.shape for y in full]
        short = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        assert short[-1].shape[1] == tokens.num_patches
        assert [key for key in model.state_dict() if ".tokenzoo_" not in key] == keys
    finally:
        tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain)
    assert type(model).__module__.startswith(("timm", "tokenzoo.models"))
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@pairs
def test_prefix_tokens_stay(models, method):
    model = models["registers"]
    x = images(model)
    with torch.no_grad(), tokenzoo.patched(model, given(method)):
        for step in model.forward_tokens(x, trace=True).trace:
            assert torch.equal(step.map.heads[:, :5], torch.arange(5).expand(len(x), -1))
            assert torch.equal(step.map.assign[:, :5], torch.arange(5).expand(len(x), -1))


@pairs
def test_survives_copies_after_a_training_step(method):
    model = build("registers").train()
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(x), model(x))
            assert tokenzoo.recipe(other) == tokenzoo.recipe(model)
        fresh = build("registers")
        state = model.state_dict()  # a checkpoint of the patched model fits the plain one, learned modules aside
        fresh.load_state_dict({key: value for key, value in state.items() if ".tokenzoo_" not in key})
        tokenzoo.unpatch_model(model)
        assert torch.equal(fresh(x), model(x))


@pairs
@pytest.mark.parametrize("backbone", [name for name in ("deit", "dinov3") if name in backbone_names()])
def test_checkpointed_gradients_are_equal(method, backbone):
    grads = []
    for checkpointing in (False, True):
        model = build(backbone).train()
        tokenzoo.patch_model(model, given(method))
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(images(model)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)


@pairs
def test_threads_share_one_model(method):
    from concurrent.futures import ThreadPoolExecutor

    model = build("deit")
    tokenzoo.patch_model(model, given(method))
    batches = [images(model, batch=b, seed=s) for s, b in enumerate((1, 2, 3, 4))]

    @torch.no_grad()
    def run(x):
        return [model(x) for _ in range(5)]

    alone = [run(x)[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for expected, outs in zip(alone, pool.map(run, batches)):
            assert all(torch.equal(out, expected) for out in outs)


@pairs
@torch.no_grad()
def test_lower_precision_runs(method):
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, given(method, "static"))
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.forward_tokens(x)
        assert tokens.size is None or tokens.size.dtype == torch.float32
        torch.testing.assert_close(model(x).float(), exact, atol=0.3, rtol=0.3)
    for dtype in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(model).to(dtype)(x.to(dtype)).dtype == dtype


@pairs
@torch.no_grad()
def test_choices_do_not_follow_autocast(method):
    """Scores are computed in float32 from the heads: under autocast they agree with a float32 computation."""
    from tokenzoo.ops.attention import Heads, attention_received, attention_rows

    torch.manual_seed(0)
    heads = Heads(*(torch.randn(2, 2, 9, 16) for _ in range(3)), 0.25)
    rows, received = attention_rows(heads, 0, 1), attention_received(heads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_rows(heads, 0, 1), rows)
        assert torch.equal(attention_received(heads), received)


class Products(TorchDispatchMode):
    """Notes the number formats of products between tokens."""

    def __init__(self):
        super().__init__()
        self.formats = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.formats.add(out.dtype)
        return out


@pairs
@torch.no_grad()
def test_decisions_are_made_in_float32(method, monkeypatch):
    """Under autocast too: no product between tokens that a decision looks at is of half precision."""
    seen = Products()

    def decide(step, tokens, signals, before=Step.decide):
        with seen:
            return before(step, tokens, signals)

    monkeypatch.setattr(Step, "decide", decide)
    for name in ("deit", "gap"):
        if serves(method, build(name)):
            model = tokenzoo.patch_model(build(name), given(method))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(images(model))
    assert seen.formats <= {torch.float32}


@pairs
@torch.no_grad()
def test_features_only(method):
    import timm

    options = dict(img_size=64, depth=4, features_only=True, out_indices=(1, 3))
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    tokenzoo.patch_model(model, given(method))
    assert [f.shape for f in model(x)] == [f.shape for f in plain]
    saved = tokenzoo.recipe(model)["method"]
    assert (saved if isinstance(saved, str) else saved[-1]["method"]) == method
    tokenzoo.unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain))


@pairs
@torch.no_grad()
def test_pruned_and_stopped_early(method):
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    stopped = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
    every = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(stopped, every))
    final, _ = model.forward_intermediates(x, indices=[2], stop_early=True)
    model.prune_intermediate_layers([1, 2])
    assert len(model.blocks) == 3
    pruned = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, every))
    assert torch.equal(model.forward_features(x), final)
    assert len(tokenzoo.report(model).rows) == 5


@pairs
@torch.no_grad()
def test_blocks_without_their_model(method):
    """Code that calls `model.blocks` itself gets a plain tensor back."""
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    if tokenzoo.create_method(method).place == "embed":
        with pytest.raises(ValueError, match="called without their model"):
            model.blocks(embedded)
        return
    out = model.blocks(embedded)
    assert isinstance(out, torch.Tensor)
    rows = model.forward_tokens(x)
    torch.testing.assert_close(model.norm(out)[:, 0], rows.x[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("method", [m for m in EVERY if m != "pool"])
def test_attention_mask_follows_the_tokens(method):
    """Hiding patches by a mask equals hiding them by any other formulation: a mask of zeros changes nothing, and what a
    mask hides has no influence."""
    model = build("deit")
    x = images(model)
    n = 1 + model.patch_embed.num_patches
    tokenzoo.patch_model(model, given(method))
    plain = model(x)
    open_mask = torch.zeros(n, n)
    if tokenzoo.method_class(method).kind == "attention":
        with pytest.raises(ValueError, match="no attn_mask covers"):
            model(x, attn_mask=open_mask)
        return
    torch.testing.assert_close(model(x, attn_mask=open_mask), plain, atol=1e-5, rtol=1e-5)
    keys = torch.ones(len(x), 1, 1, n, dtype=torch.bool)
    torch.testing.assert_close(model(x, attn_mask=keys), plain, atol=1e-5, rtol=1e-5)
    if tokenzoo.method_class(method).kind == "merge":
        return  # a merged token may hold hidden and seen patches: the destination's entry counts
    keys[..., 5] = False
    hidden = model(x, attn_mask=keys)
    assert not torch.allclose(hidden, plain, atol=1e-4)


def test_a_wrapped_or_second_patch_is_refused():
    model = build("deit")
    tokenzoo.patch_model(model, "tome", r=1)
    with pytest.raises(ValueError, match="patched already"):
        tokenzoo.patch_model(model, "evit")
    assert backbone_of(model) is model
