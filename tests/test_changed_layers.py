"""Linear layers with something around them: adapters, hooks, quantisation; every method, every block."""

import copy

import pytest
import torch
from cases import METHODS, VIT, backbone_names, build, given, images, serves
from changed_layers import CHANGES, Around, linear_layers, merge
from torch import nn

import tokenzoo

# one row of cases.py for each way in which blocks project
BLOCKS = (
    "deit", "res_post", "parallel_scaling", "parallel_things", "gated", "differential", "diff_parallel", "eva02",
    "eva_giant", "dinov3", "pe_like", "lv_vit", "beit", "beit_shared", "relpos_mlp", "cait",
    "xcit",
)  # fmt: skip
blocks = pytest.mark.parametrize("backbone", [name for name in BLOCKS if name in backbone_names()])
changes = pytest.mark.parametrize("change", CHANGES)
# timm's fused layer with biases of its own reads the weight; a switch of timm's makes it call the layer
CALLED = ("around", "adapter", "hooked", "pre_hooked", "overridden", "quantised")


def reads_around(model):
    """Attention layers that read the weight of their projection in timm."""
    return [m for m in model.modules() if getattr(m, "q_bias", None) is not None and not m.qkv_bias_separate]


def changed(backbone, change, names=(), called=True):
    model = build(backbone)
    for attn in reads_around(model) if called and change in CALLED else ():
        attn.qkv_bias_separate = True
    return CHANGES[change](model, linear_layers(model, names)).eval()


@changes
@blocks
@torch.no_grad()
def test_zero_reduction_is_the_changed_model(backbone, change):
    model = changed(backbone, change)
    x = images(model, batch=2)
    plain, features = model(x), model.forward_features(x)
    assert not torch.allclose(plain, build(backbone)(x), atol=1e-3)
    # rounding of activations may fall to the other side where sums are taken in another order
    bound = {"atol": 0.02 * float(features.abs().max()), "rtol": 0} if change == "quantised" else {"atol": 3e-5}
    bound = {"rtol": 1e-4, **bound}
    for method in METHODS:
        reads_class = model.global_pool == "token" and getattr(model, "aux_head", None) is None  # all that ATS leaves
        if not serves(method, model) or (method == "ats" and not reads_class):
            continue
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x), plain, **bound, msg=lambda text, m=method: f"{m}: {text}")
            if method != "ats":
                torch.testing.assert_close(model.forward_features(x), features, **bound)
    torch.testing.assert_close(model(x), plain, **bound)


@blocks
def test_adapters_are_their_merged_weights_under_reduction(backbone):
    model = changed(backbone, "around")
    merged = merge(copy.deepcopy(model))
    x = images(model, batch=2)
    adapters = [p for name, p in model.named_parameters() if name.endswith((".up", ".down"))]
    for method in METHODS:
        if not serves(method, model):
            continue
        recipe = given(method)
        torch.manual_seed(0)
        with tokenzoo.patched(model, recipe):
            out = model(x)
            grads = torch.autograd.grad(out.sum(), adapters, allow_unused=True) if method in ("tome", "mctf") else ()
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads), method
        torch.manual_seed(0)
        with torch.no_grad(), tokenzoo.patched(merged, recipe):
            torch.testing.assert_close(out, merged(x), atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")


@changes
@blocks
def test_costs_are_those_of_the_plain_model(backbone, change):
    attention = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "gate", "in_proj")
    options = {"r": 2} if backbone == "lv_vit" else {"flops": 0.8}  # its stem is nearly all that it costs
    plain = tokenzoo.patch_model(build(backbone), "tome", **options)
    model = changed(backbone, change, attention if change == "around" else ())
    tokenzoo.patch_model(model, "tome", **options)
    assert tokenzoo.recipe(model) == tokenzoo.recipe(plain)
    assert tokenzoo.report(model).rows == tokenzoo.report(plain).rows


def test_fused_projection_that_timm_reads_around():
    """What timm's own layer gives where it does not call a projection; an adapter, which it skips, is refused."""
    for change in ("hooked", "parametrised", "overridden"):
        model = changed("eva_giant", change, ("qkv",), called=False)
        x = images(model, batch=2)
        with torch.no_grad():
            plain = model(x)
            for method in ("tome", "mctf"):
                with tokenzoo.patched(model, given(method, "zero")):
                    torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    model = changed("eva_giant", "adapter", ("qkv",), called=False)
    tokenzoo.patch_model(model, "tome", r=2)
    with pytest.raises(ValueError, match="qkv is a changed_layers.Adapter .*qkv_bias_separate = True"):
        model(x)
    model = changed("eva_giant", "around", ("qkv",), called=False)  # timm fails on it, there is no weight to read
    tokenzoo.patch_model(model, "mctf", r=2)
    assert model(x).isfinite().all()


# ---- the layers of tokenzoo's own models


def test_models_that_scan():
    from scan_cases import SCAN_METHODS, build, given

    for scanner in ("vim", "vim_v1", "vim_forward", "plain_mamba_depthwise"):
        model = build(scanner)
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        plain, rows = model(x), tokenzoo.report(model).rows
        names = [name for name in linear_layers(model) if name.startswith("layers.1.")]
        assert {name.rpartition(".")[2] for name in names} >= {"in_proj", "x_proj", "dt_proj", "out_proj"}
        for change, function in CHANGES.items():
            for name in names:  # one layer alone, so that none hides another
                model = build(scanner)
                model = function(model, {name: linear_layers(model)[name]}).eval()
                out = model(x)
                assert (out - plain).abs().max() > 1e-4, (scanner, change, name)
                assert tokenzoo.report(model).rows == rows
                if change == "around":
                    grads = torch.autograd.grad(out.sum(), [p for n, p in model.named_parameters() if ".down" in n])
                    assert all(grad.abs().max() > 0 for grad in grads)
                    merged = merge(copy.deepcopy(model))
                    torch.testing.assert_close(out, merged(x), atol=1e-5, rtol=1e-4)
            model = build(scanner)
            model = function(model, linear_layers(model)).eval()
            with torch.no_grad():
                out = model(x)
                merged = merge(copy.deepcopy(model)) if change == "around" else None
                for method in SCAN_METHODS:
                    with tokenzoo.patched(model, given(method, "zero")):
                        torch.testing.assert_close(model(x), out, atol=2e-5, rtol=1e-4)
                    if merged is not None:
                        with tokenzoo.patched(model, given(method)), tokenzoo.patched(merged, given(method)):
                            torch.testing.assert_close(model(x), merged(x), atol=1e-4, rtol=1e-4)


def test_convolution_of_a_mixer_is_called():
    from scan_cases import build

    model = build("vim")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        for layer in model.layers:
            layer.mixer.conv1d.register_forward_hook(lambda module, args, out: out * 1.0)
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)  # called, and the same
        for layer in model.layers:
            layer.mixer.conv1d.register_forward_hook(lambda module, args, out: out * 1.5)
        assert (model(x) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_pointwise_convolutions_of_svit():
    from test_svit_adapter import micro

    model = micro()
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    plain, rows = model(x), tokenzoo.report(model).rows
    for stage in model.layers:
        for block in stage.blocks if stage.is_plain else ():
            for owner, name in ((block.attn.stoken_refine, "qkv"), (block.attn.stoken_refine, "proj"),
                                (block.mlp2, "fc1"), (block.mlp2, "fc2")):  # fmt: skip
                conv = getattr(owner, name)
                setattr(owner, name, Around(conv, conv.in_channels, conv.out_channels))
    out = model(x)
    assert (out - plain).abs().max() > 1e-3
    merged = merge(copy.deepcopy(model))
    for method in ("tome", "mctf", "evit", "evo"):
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x), out, atol=1e-4, rtol=1e-4)
            assert tokenzoo.report(model).unpatched == sum(row.macs for row in rows)
        with tokenzoo.patched(model, given(method)), tokenzoo.patched(merged, given(method)):
            torch.testing.assert_close(model(x), merged(x), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_layers_of_dense_heads():
    from dense_models import shaken

    from tokenzoo.dense import BNLinearHead, DToPHead

    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    head = shaken(BNLinearHead(16, 5))
    plain, macs = head(x), head.macs(9)
    head.conv_seg = Around(head.conv_seg, 16, 5)
    out = head(x)
    assert (out - plain).abs().max() > 1e-3 and head.macs(9) == macs
    torch.testing.assert_close(out, merge(head)(x), atol=1e-5, rtol=1e-5)

    head = shaken(DToPHead(16, 4, 16, 2, depth=2))
    plain = head(x)[1]
    head.q.register_forward_hook(lambda module, args, queries: queries * 2)
    assert (head(x)[1] - plain).abs().max() > 1e-3


# ---- where a weight may be sliced


def test_plain_layers_alone_are_sliced():
    from tokenzoo.ops.projections import is_plain, linear_part

    x = torch.randn(2, 3, 8)
    layer = nn.Linear(8, 6)
    assert is_plain(layer) and is_plain(copy.deepcopy(layer)) and is_plain(nn.Linear(8, 6, bias=False))
    torch.testing.assert_close(linear_part(layer, x, 2, 5), layer(x)[..., 2:5])

    class Own(nn.Linear):
        pass

    class Subclass(torch.Tensor):
        pass

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(layer)])})
    model.blocks = model["blocks"]
    others = [Own(8, 6)]
    for function in CHANGES.values():
        other = copy.deepcopy(model)
        others.append(function(other, {"blocks.0.0": other["blocks"][0][0]})["blocks"][0][0])
    special = nn.Linear(8, 6)
    special.weight = nn.Parameter(special.weight.detach().as_subclass(Subclass))
    observed = nn.Linear(8, 6)
    observed.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    for other in (*others, special, observed):
        assert not is_plain(other), other
        torch.testing.assert_close(linear_part(other, x, 2, 5), other(x)[..., 2:5])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2)
    try:
        assert not is_plain(layer)
        torch.testing.assert_close(linear_part(layer, x, 2, 5), layer(x)[..., 2:5])
    finally:
        handle.remove()
    assert is_plain(layer)


def test_counters_count_the_part_that_is_used():
    from torch.utils.flop_counter import FlopCounterMode

    from tokenzoo.ops.projections import linear_part

    with FlopCounterMode(display=False) as counter:
        linear_part(nn.Linear(8, 6), torch.randn(1, 3, 8), 2, 5)
    assert counter.get_total_flops() == 2 * 3 * 8 * 3


def test_programs_hold_slices_of_plain_layers():
    """Exported and compiled, a method that projects values behind its merging still projects them alone."""
    torch.manual_seed(0)
    model = tokenzoo.patch_model(VIT(depth=1, mlp_ratio=4).eval(), given("mctf", layers=0))
    x = images(model, batch=2)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(x)
        exported = torch.export.export(model, (x,))
    for graph in (*graphs, exported.graph_module):
        found = [node.meta for node in graph.graph.nodes if "linear" in str(node.target)]
        widths = {meta.get("val", meta.get("example_value")).shape[-1] for meta in found}
        assert {64, 32} <= widths and 96 not in widths
