"""Merging around branches against the published implementations: tomesd, and ToMe in its dense form."""

import ast

import torch
from goldens import Case, cases, check_settings, close, decode_reduced, micro_decoder, read

import tokenzoo
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import MergeMap
from tokenzoo.methods.tomesd import ToMeSD
from tokenzoo.ops.matching.strided import cell_split, split_pairs


@cases("tomesd", lambda c: c.has("src_set"))
def test_matching(case: Case):
    s = case.settings
    check_settings(s, "B", "h", "w", "sy", "sx", "r", "r_eff", "C", "no_rand")
    n, src, dst = s["h"] * s["w"], case["src_set"], case["dst_set"]
    own_src, own_dst = cell_split((s["h"], s["w"]), (s["sy"], s["sx"]), src.device)
    if s["no_rand"]:  # the published order inside both sets is that of an unstable sort
        assert torch.equal(own_src, src.sort()[0]) and torch.equal(own_dst, dst.sort()[0])
    assert min(s["r"], len(own_src)) == s["r_eff"]
    pairs = split_pairs(case["metric"], src.unsqueeze(0), dst.unsqueeze(0), s["r_eff"])
    rest = case["out_unm_idx"].shape[1]
    assert torch.equal(pairs.src, src[case["out_src_idx"]])
    assert torch.equal(pairs.order[:, :rest], src[case["out_unm_idx"]])
    assert torch.equal(pairs.slot - rest, case["out_dst_idx"])
    mean = MergeMap(pairs.order, pairs.src, pairs.slot, n)
    close(mean.apply(case["x"]), case["out_merged_mean"], 1e-5)
    close(mean.lift(case["out_merged_mean"]), case["out_unmerged"], 1e-5)
    close(MergeMap(pairs.order, pairs.src, pairs.slot, n, reduce="sum").apply(case["x"]), case["out_merged_sum"], 1e-5)


def merge_by_method(method: ToMeSD, x: torch.Tensor, prefix: int, grid: tuple[int, int]):
    """The method's own map of tokens that are their own metric."""
    tokens = Tokens(x, Layout(prefix, prefix > 0, grid))
    signals = Signals(None, None, tokens)
    signals.branch_input = x
    (step,) = tokenzoo.Recipe((method,)).steps(1)[0]
    return method.map(tokens, signals, step)


def share(r: int, n: int) -> float:
    """The ratio that asks for r of n tokens."""
    return min((r + 0.5) / n, 1 - 1e-9)


@cases("dense_unmerge", lambda c: c.has("n_merged"))
def test_cells(case: Case):
    s = case.settings
    check_settings(s, "h", "w", "r", "sx", "sy", "no_rand")
    assert s["no_rand"]
    x, n = case["tokens"], s["h"] * s["w"]
    method = ToMeSD(ratio=share(s["r"], n), stride=(s["sy"], s["sx"]), clip=True)
    merge = merge_by_method(method, x, 0, (s["h"], s["w"]))
    assert merge.n_out == int(case["n_merged"])
    close(merge.lift(merge.apply(x)), case["unmerged"], 1e-5)


@cases("dense_unmerge", lambda c: c.has("merged"))
def test_even_into_odd(case: Case):
    s = case.settings
    check_settings(s, "r", "class_token")
    x, prefix = case["tokens"], int(s["class_token"])
    n = x.shape[1]
    method = ToMeSD(ratio=share(s["r"], n), stride=None, metric="normed", clip=True)
    merge = merge_by_method(method, x, prefix, (1, n - prefix))
    close(merge.apply(x), case["merged"], 1e-5)
    close(merge.lift(case["merged"]), case["unmerged"], 1e-6)


def tome_dense(case: Case):
    """The encoder of a case with ToMe's dense form."""
    ratio = ast.literal_eval(read(case.file)[1]["ratios"])[case.short]
    model = case.model()
    options = {"stride": None, "metric": "normed", "branches": ("attention", "mlp"), "clip": True}
    return tokenzoo.patch_model(model, "tomesd", ratio=ratio, **options)


@cases("dense_unmerge", lambda c: c.has("branch_tokens"))
def test_encoder(case: Case):
    model, inside = tome_dense(case), []
    for block in model.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1):
            layer.register_forward_hook(lambda module, args, out: inside.append(args[0].shape[1]))
    with torch.no_grad():
        close(model.forward_features(case.input(case["features"].shape[0])), case["features"])
    assert inside == case["branch_tokens"].flatten().tolist()


@cases("dense_unmerge", lambda c: c.has("branch_tokens"))
def test_labels(case: Case):
    _, labels = decode_reduced(tome_dense(case), micro_decoder("mask"), case.input(case["labels"].shape[0]))
    assert torch.equal(labels, case["labels"].long())
