"""Activations, gradients and attention maps of a patched model on the full grid."""

import gc
import weakref
from functools import partial

import pytest
import torch
from cases import METHODS, build, given, images, serves
from torch import nn

import tokenzoo
from tokenzoo.core.tokens import trace_assign
from tokenzoo.models import SViT

BACKBONES = ("deit", "gap", "dinov3", "eva02")
SIDE = 4  # patches a side of the tiny models
close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)


def written_out(model):
    """Attention maps exist where attention is not fused."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


class Taken:
    """What hooks get: inputs, outputs and gradients at the outputs of all modules inside of the blocks."""

    def __init__(self, model):
        self.given, self.out, self.grad = {}, {}, {}
        for name, module in model.named_modules():
            if name.startswith("blocks.") or name == "norm":
                module.register_forward_hook(partial(self._hook, name))

    def _hook(self, name, module, args, out):
        if not (isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)):
            return
        self.given[name], self.out[name] = args[0].detach(), out.detach()
        if out.requires_grad:
            out.register_hook(partial(self._keep, name))

    def _keep(self, name, grad):
        self.grad.setdefault(name, grad)  # of the last call where a layer runs twice


def run(model, x, **options):
    """One pass with everything taken, and its explanation."""
    taken = Taken(model)
    with tokenzoo.explain(model, **options) as seen:
        model(x)[:, 1].sum().backward()
    return taken, seen


def cases(name, method, kind, **more):
    model = written_out(build(name))
    if not serves(method, model):
        pytest.skip("refused by name, see tests/test_refusals.py")
    x = images(model)
    tokenzoo.patch_model(model, given(method, kind), **more)
    return model, x


def zero_methods():
    return [name for name in METHODS if name not in ("ats", "reconstruct")]  # these have no zero


def block_before(seen, taken, index, model):
    """What a block reads, on the grid."""
    if index:
        return seen.activation(taken.out[f"blocks.{index - 1}"], f"blocks.{index - 1}")
    if model.blocks[0].tokenzoo.at("around"):  # its layers may see merged tokens, the block sees the whole grid
        patches = taken.given["blocks.0"][:, model.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return seen.activation(taken.given["blocks.0"], model.blocks[0].norm1)


def is_tokens(out):
    return out.dim() == 3


matrix = pytest.mark.parametrize("name", BACKBONES)
every = pytest.mark.parametrize("method", METHODS)


@matrix
@pytest.mark.parametrize("method", zero_methods())
def test_nothing_removed_is_the_grid_of_the_plain_model(name, method):
    plain = written_out(build(name))
    prefix = plain.num_prefix_tokens
    taken, _ = run(plain, images(plain))
    model, x = cases(name, method, "zero")
    own, seen = run(model, x)

    def grid(values):
        return values[:, prefix:].transpose(1, 2).unflatten(2, (SIDE, SIDE))

    close(seen.activation(own.out["norm"], "norm"), grid(taken.out["norm"]))
    close(seen.gradient(own.grad["norm"], "norm"), grid(taken.grad["norm"]))
    for i in range(4):
        for layer in (f"blocks.{i}", f"blocks.{i}.norm1", f"blocks.{i}.attn", f"blocks.{i}.norm2", f"blocks.{i}.mlp"):
            close(seen.activation(own.out[layer], layer), grid(taken.out[layer]))
            close(seen.gradient(own.grad[layer], layer), grid(taken.grad[layer]))
        layer = f"blocks.{i}.attn.attn_drop"
        close(seen.attention(own.out[layer], layer), taken.out[layer])


@matrix
@every
def test_blocks_give_what_intermediates_are(name, method):
    model, x = cases(name, method, "reduce", fill="zero")
    taken, seen = run(model, x)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    for i, one in enumerate(expected):
        close(seen.activation(taken.out[f"blocks.{i}"], model.blocks[i]), one)


@matrix
@every
def test_parts_of_a_block_add_up_on_the_grid(name, method):
    """What enters the second norm and what the MLP adds make what leaves: the layers see the same tokens."""
    model, x = cases(name, method, "reduce")
    taken, seen = run(model, x)
    for i, block in enumerate(model.blocks):
        name, gammas = f"blocks.{i}", [getattr(block, key, None) for key in ("gamma_1", "gamma_2")]
        adds = [
            seen.activation(taken.out[f"{name}.{part}"] * (1 if gamma is None else gamma.detach()), f"{name}.{part}")
            for part, gamma in zip(("attn", "mlp"), gammas)
        ]
        leaves = seen.activation(taken.out[name], name)
        if not any(block.tokenzoo.at(place) for place in ("before", "ahead", "queries", "between", "after")):
            enters = block_before(seen, taken, i, model)
            close(leaves, enters + sum(adds))
        elif not block.tokenzoo.at("after"):
            close(leaves, seen.activation(taken.given[f"{name}.norm2"], f"{name}.norm2") + adds[1])


@matrix
@every
def test_sums_over_the_grid_are_sums_over_tokens(name, method):
    """The weights of Grad-CAM, which are sums over positions, are those of the tokens."""
    model, x = cases(name, method, "reduce")
    prefix = model.num_prefix_tokens
    taken, seen = run(model, x)
    checked = 0
    for layer, grad in taken.grad.items():
        if not is_tokens(grad):
            continue
        close(seen.gradient(grad, layer).sum((2, 3)), grad[:, prefix:].sum(1))
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("method", ["tome", "pool", "mctf", "evit", "topk", "uniform", "ats"])
def test_sums_of_activation_times_gradient_stay(method):
    model, x = cases("deit", method, "reduce")
    taken, seen = run(model, x)
    for layer in ("blocks.2", "blocks.3.norm1", "blocks.3.norm2", "blocks.3.attn"):
        out, grad = taken.out[layer], taken.grad[layer]
        product = seen.activation(out, layer) * seen.gradient(grad, layer)
        close(product.sum((1, 2, 3)), (out * grad)[:, 1:].sum((1, 2)))


@matrix
@every
def test_rows_of_attention_sum_to_one(name, method):
    model, x = cases(name, method, "reduce")
    total = model.num_prefix_tokens + SIDE**2
    taken, seen = run(model, x)
    for i in range(4):
        layer = f"blocks.{i}.attn.attn_drop"
        lifted = seen.attention(taken.out[layer], layer)
        assert lifted.shape[1:] == (2, total, total)
        rows = lifted.sum(3)
        asked = rows.abs() > 1e-6
        assert torch.equal(asked, asked[:, :1].expand_as(asked))  # a patch asks in all heads or was dropped
        close(rows[asked], torch.ones_like(rows[asked]))
        if not any(step.map.drops for step in model.forward_tokens(x, trace=True).trace):
            assert asked.all()


@pytest.mark.parametrize("method", ["tome", "evit", "ats", "random"])
def test_against_one_patch_at_a_time(method):
    """Written out in loops, from the trace of another pass."""
    torch.manual_seed(0)
    model, x = cases("deit", method, "reduce")
    torch.manual_seed(7)
    taken, seen = run(model, x)
    torch.manual_seed(7)
    trace = model.forward_tokens(x, trace=True).trace
    # what acts between attention and MLP has not happened at norm1, and has at norm2; ats acts on the rows of the map
    layers = {"blocks.2.norm1": 2, "blocks.2.norm2": 3, "blocks.2": 3, "blocks.2.attn": 3 if method == "ats" else 2}
    for layer, stop in layers.items():
        assign = trace_assign(tuple(s for s in trace if s.block < stop), len(x), 17, x.device)
        out, grad = taken.out[layer], taken.grad[layer]
        lifted, spread = seen.activation(out, layer), seen.gradient(grad, layer)
        for image in range(len(x)):
            for patch in range(16):
                token = int(assign[image, patch + 1])
                value, share = torch.zeros(32), torch.zeros(32)
                if token >= 0:
                    value, share = out[image, token], grad[image, token] / int((assign[image] == token).sum())
                close(lifted[image, :, patch // SIDE, patch % SIDE], value)
                close(spread[image, :, patch // SIDE, patch % SIDE], share)
    keys = trace_assign(tuple(s for s in trace if s.block < 2), len(x), 17, x.device)
    asks = trace_assign(tuple(s for s in trace if s.block < (3 if method == "ats" else 2)), len(x), 17, x.device)
    raw = taken.out["blocks.2.attn.attn_drop"]
    lifted = seen.attention(raw, model.blocks[2].attn.attn_drop)
    for image in range(len(x)):
        for i, q in enumerate(asks[image].tolist()):
            for j, k in enumerate(keys[image].tolist()):
                expected = torch.zeros(2)
                if q >= 0 and k >= 0:
                    expected = raw[image, :, q, k] / int((keys[image] == k).sum())
                close(lifted[image, :, i, j], expected)


@pytest.mark.parametrize("method", ["tome", "mctf", "pool", "algm"])
def test_merged_twins_look_like_apart(method):
    """Where only identical patches merge, activations, gradients and maps are those of the unpatched model."""
    options = {"tome": {"r": 2}, "mctf": {"r": 2, "bidirectional": False}, "pool": {"stride": 2}, "algm": {}}[method]
    options = {"prop_attn": True, **options}

    def model():
        made = written_out(build("deit"))
        nn.init.zeros_(made.pos_embed)
        return made

    x = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32).contiguous()
    plain = model()
    taken, whole = run(plain, x)
    patched = tokenzoo.patch_model(model(), method, **options)
    assert patched.tokenzoo_recipe.proportional  # attention counts the patches of a token
    own, seen = run(patched, x)
    assert own.out["blocks.3"].shape[1] < 17
    for i in range(4):
        for layer in (f"blocks.{i}", f"blocks.{i}.norm1", f"blocks.{i}.attn", f"blocks.{i}.norm2", f"blocks.{i}.mlp"):
            close(seen.activation(own.out[layer], layer), whole.activation(taken.out[layer], layer))
            if method == "mctf" and layer.endswith("norm1"):  # runs twice: queries and keys of all, values of the rest
                continue
            close(seen.gradient(own.grad[layer], layer), whole.gradient(taken.grad[layer], layer))
        layer = f"blocks.{i}.attn.attn_drop"
        close(seen.attention(own.out[layer], layer), taken.out[layer])


@pytest.mark.parametrize("name", ["parallel_scaling", "parallel_things", "res_post", "differential", "registers_only"])
@pytest.mark.parametrize("method", ["tome", "evit", "tomesd", "mctf"])
def test_other_blocks(name, method):
    model, x = cases(name, method, "reduce")
    taken, seen = run(model, x)
    prefix, checked = model.num_prefix_tokens, 0
    for layer, grad in taken.grad.items():
        if is_tokens(grad):
            assert seen.activation(taken.out[layer], layer).shape[2:] == (SIDE, SIDE)
            close(seen.gradient(grad, layer).sum((2, 3)), grad[:, prefix:].sum(1))
            checked += 1
        elif layer.endswith("attn_drop"):
            rows = seen.attention(taken.out[layer], layer).sum(3)
            close(rows, (rows.abs() > 1e-6).float())
            checked += 1
    assert checked > 15


def test_fills():
    model, x = cases("deit", "evit", "reduce")
    for fill in ("stash", "nearest"):
        taken, seen = run(model, x, fill=fill)
        tokenzoo.unpatch_model(model)
        tokenzoo.patch_model(model, given("evit"), fill=fill)
        with torch.no_grad():
            expected = model.forward_intermediates(x, intermediates_only=True)[-1]
        close(seen.activation(taken.out["blocks.3"], "blocks.3"), expected)
    taken, seen = run(model, x, fill="stash")
    with pytest.raises(ValueError, match="fill='stash': LayerNorm is not a whole block.*'zero'"):
        seen.activation(taken.out["norm"], "norm")
    with pytest.raises(ValueError, match="fill='none'"):
        tokenzoo.explain(model, fill="none")


def test_nothing_stays_behind():
    model, x = cases("deit", "tome", "reduce")
    before = model(x)
    seen = tokenzoo.explain(model)
    with pytest.raises(ZeroDivisionError), seen:
        assert torch.equal(model(x), before)
        with pytest.raises(ValueError, match="watching already"):
            seen.__enter__()
        1 / 0  # noqa: B018
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), before)
    assert model.forward_tokens(x).trace is None
    tokenzoo.unpatch_model(model)
    gone = weakref.ref(seen)
    del seen
    gc.collect()
    assert gone() is None


def test_recomputed_blocks_and_inference_mode():
    model, x = cases("deit", "tome", "reduce")
    taken, seen = run(model, x)
    expected = seen.gradient(taken.grad["blocks.2"], "blocks.2")
    model.set_grad_checkpointing()
    taken, seen = run(model, x)
    close(seen.gradient(taken.grad["blocks.2"], "blocks.2"), expected)
    with torch.inference_mode(), tokenzoo.explain(model) as seen:
        model(x)
        assert seen.attention(taken.out["blocks.3.attn.attn_drop"], "blocks.3.attn.attn_drop").shape[2:] == (17, 17)


def test_refusals():
    model, x = cases("deit", "tome", "reduce")
    seen = tokenzoo.explain(model)
    with pytest.raises(ValueError, match=r"blocks\.1 was not seen in a pass.*call the model, not its blocks"):
        seen.activation(torch.zeros(3, 17, 32), "blocks.1")
    with seen:
        model(x)
        with pytest.raises(ValueError, match=r"blocks\.1 gave \(3, 13, 32\) in the last pass, but got \(3, 17, 32\)"):
            seen.activation(torch.zeros(3, 17, 32), "blocks.1")
        with pytest.raises(ValueError, match=r"\[B, heads, N', N'\]"):
            seen.attention(torch.zeros(3, 13, 13), "blocks.1.attn")
        z = torch.zeros(3, 17, 32)
        for block in model.blocks:
            z = block(z)
        with pytest.raises(ValueError, match="was not seen"):
            seen.activation(z, "blocks.3")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with tokenzoo.explain(model) as seen, pytest.raises(ValueError, match="attn_drop runs where fused_attn is False"):
        model(x)
        seen.attention(torch.zeros(3, 2, 17, 17), "blocks.0.attn.attn_drop")
    svit = SViT(embed_dim=(8, 12, 16, 24), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), projection=32, img_size=128)
    with pytest.raises(ValueError, match="SViT: explain carries values back to one grid"):
        tokenzoo.explain(svit)
    with pytest.raises(TypeError, match="not a backbone that tokenzoo can patch"):
        tokenzoo.explain(nn.Linear(2, 2))
