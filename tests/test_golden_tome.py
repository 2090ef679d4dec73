"""ToMe against the published implementation."""

import ast
import re

import pytest
import timm
import torch
from goldens import Case, cases, check_settings, close, read

import tokenzoo
from tokenzoo.core.schedule import removed_per_layer
from tokenzoo.core.tokens import trace_assign
from tokenzoo.maps import MergeMap
from tokenzoo.ops.attention import attend, key_bias
from tokenzoo.ops.matching.bipartite import bipartite_pairs, kth_pairs, set_pairs


def merges(pairs, n, weight=None, reduce="mean"):
    return MergeMap(pairs.order, pairs.src, pairs.slot, n, weight, reduce)


@cases("tome", lambda c: c.has("out_unm_idx"))
def test_bipartite_matching(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "r", "r_eff", "class_token", "distill_token", "size_given", "min_gap")
    n, prefix = s["N"], int(s["class_token"]) + int(s["distill_token"])
    r = min(s["r"], (n - prefix) // 2)
    assert r == s["r_eff"]
    pairs = bipartite_pairs(case["metric"], r, prefix)
    even, odd = 2 * case["out_unm_idx"], torch.arange(1, n, 2).expand(s["B"], -1)
    if prefix == 2:  # the distillation token is the first odd one and follows the class token
        order = torch.cat([even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]], dim=1)
    else:
        order = torch.cat([even, odd], dim=1)
    assert torch.equal(pairs.order, order)
    assert torch.equal(pairs.src, 2 * case["out_src_idx"])
    assert torch.equal(pairs.order.gather(1, pairs.slot), 2 * case["out_dst_idx"] + 1)

    size = case["size"] if case.has("size") else torch.ones(s["B"], n, 1)
    close(merges(pairs, n, size).apply(case["x"]), case["out_x_wavg"], 1e-5)
    close(merges(pairs, n).pool(size), case["out_size"], 1e-5)
    close(merges(pairs, n).apply(case["x"]), case["out_x_mean"], 1e-5)
    close(merges(pairs, n, reduce="sum").apply(case["x"]), case["out_x_sum"], 1e-5)
    close(merges(pairs, n, reduce="max").apply(case["x"]), case["out_x_amax"], 1e-5)
    close(merges(pairs, n).membership(), case["out_source"], 1e-5)
    if case.has("out_unmerged"):
        close(merges(pairs, n).lift(case["out_x_wavg"]), case["out_unmerged"], 1e-5)


@cases("tome", lambda c: c.has("x0"))
def test_rounds_follow_each_other(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "r", "class_token", "metric", "note")
    x, size, source = case["x0"], torch.ones(s["B"], s["N"], 1), torch.eye(s["N"]).expand(s["B"], -1, -1)
    for i, r in enumerate(s["r"], 1):
        pairs = bipartite_pairs(x[..., : s["C"] // 2], r, int(s["class_token"]))
        merge = merges(pairs, x.shape[1], size)
        x, size, source = merge.apply(x), merge.pool(size), merge.membership() @ source
        close(x, case[f"x{i}"], 1e-5)
        close(size, case[f"size{i}"], 1e-5)
        close(source, case[f"source{i}"], 1e-5)


@cases("tome", lambda c: "k" in c.asks)
def test_every_kth(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "k")
    n = s["N"] // s["k"] * s["k"]
    x = case["x"][:, :n]
    pairs = kth_pairs(case["metric"][:, :n], s["k"])
    assert torch.equal(pairs.slot, case["out_dst_idx"])
    close(merges(pairs, n).apply(x), case["out_x_mean"], 1e-5)
    close(merges(pairs, n, reduce="sum").apply(x), case["out_x_sum"], 1e-5)
    close(merges(pairs, n).lift(case["out_x_mean"]), case["out_unmerged"], 1e-5)


@cases("tome", lambda c: c.has("a_idx"))
def test_given_sets(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "r", "note")
    pairs = set_pairs(case["metric"], case["a_idx"], case["b_idx"])
    assert torch.equal(pairs.slot, case["out_dst_idx"])
    close(merges(pairs, s["N"]).apply(case["x"]), case["out_x_mean"], 1e-5)
    close(merges(pairs, s["N"], reduce="sum").apply(case["x"]), case["out_x_sum"], 1e-5)
    close(merges(pairs, s["N"]).lift(case["out_x_mean"]), case["out_unmerged"], 1e-5)


@cases("tome", lambda c: c.has("out_metric"))
def test_proportional_attention(case: Case):
    from tokenzoo.adapters.vit.attention import attention_heads, attention_output

    s = case.settings
    check_settings(s, "B", "N", "C", "heads", "size_given")
    attn = timm.layers.Attention(s["C"], s["heads"], qkv_bias=True)
    attn.load_state_dict(case.part("weights"))
    heads = attention_heads(attn.eval(), case["x"])
    bias = key_bias(case["size"] if case.has("size") else None, None)
    close(attention_output(attn, attend(heads, bias), case["x"]), case["out"], 1e-5)
    close(heads.k.mean(1), case["out_metric"], 1e-5)


@cases("tome", lambda c: re.fullmatch(r"L\d+_r.*", c.short) is not None)
def test_r_schedule(case: Case):
    depth, r = re.fullmatch(r"L(\d+)_r(.*)", case.short).groups()
    r = tuple(ast.literal_eval(r[5:])) if r.startswith("tuple") else ast.literal_eval(r)
    assert removed_per_layer(r, int(depth)) == read(case.file)[0][case.name].tolist()


@cases("tome", lambda c: c.has("out_logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "r", "prop_attn", "what", "timm", "fp64_diff")
    x = case.input(case["out_logits"].shape[0])
    mae = case.short.startswith("mae") or "MAE" in s.get("what", "")
    model = case.model(**({"global_pool": "avg"} if mae else {}))
    if case.short.startswith("distilled"):
        model = distilled(model, read(case.file)[0])
    tokenzoo.patch_model(model, "tome", r=s["r"], prop_attn=s["prop_attn"], mass_pool=mae, clip=True)
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["out_logits"])
    if case.has("out_features"):
        close(tokens.x, case["out_features"])
    if case.has("out_size"):
        close(tokens.size, case["out_size"], 1e-5)
    if case.has("out_source_assign"):
        expected = case["out_source_assign"]
        assert torch.equal(trace_assign(tokens.trace, len(x), expected.shape[1], x.device), expected)
    counts = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    assert [row.tokens_out for row in counts if row.block is not None] == case["out_tokens_per_block"].tolist()


def distilled(base, tensors):
    """DeiT with a distillation token from plain weights and the extra ones of the file."""
    extra = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith("distilled_extra_weights/")}
    grid = base.patch_embed.img_size
    model = timm.models.deit.VisionTransformerDistilled(
        img_size=grid,
        patch_size=base.patch_embed.patch_size,
        embed_dim=base.embed_dim,
        depth=len(base.blocks),
        num_heads=base.blocks[0].attn.num_heads,
        num_classes=base.num_classes,
    )
    model.load_state_dict({**base.state_dict(), **extra})
    return model.eval()


def test_unknown_settings_fail():
    with pytest.raises(AssertionError, match="surprise"):
        check_settings({"r": 1, "surprise": 2}, "r")
