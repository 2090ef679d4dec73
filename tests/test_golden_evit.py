"""EViT against the published implementation."""

import re

import torch
from goldens import Case, cases, check_settings, close, read, small_block

import tokenzoo
from tokenzoo.core.schedule import cosine_keep_rate
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.evit import EViT


@cases("evit", lambda c: c.has("out_block"))
def test_block(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "heads", "keep_rate", "keep_rate_passed", "tokens", "fuse", "left_tokens", "N_out")
    passed = s["keep_rate_passed"]
    rate = passed if passed is not None and s["keep_rate"] < 1 else s["keep_rate"]
    method = EViT(fuse_token=s["fuse"])
    layout = Layout(1, True, (1, s["N"] - 1))
    block = small_block(case.part("weights"), s["heads"], method, layout, (rate, s["tokens"]))
    seen = {}
    block.norm2.register_forward_hook(lambda module, args, out: seen.update(tokens=args[0]))
    tokens = Tokens(case["x"], layout, trace=())
    with torch.no_grad():
        heads = block.heads(tokens._replace(x=block.attention_input(tokens.x)), None)
        signals = Signals(heads, None, tokens)
        out = block(tokens)
    close(signals.attention, case["attn"], 1e-5)
    close(seen["tokens"], case["out_tokens"], 1e-5)
    close(out.x, case["out_block"])
    assert out.x.shape[1] == s["N_out"]
    if not case.has("out_idx"):
        assert not out.trace
        return
    close(signals.class_attention.mean(1)[:, 1:], case["out_cls_attn"], 1e-5)
    (step,) = out.trace
    idx, kept = step.map.heads[:, 1:] - 1, s["left_tokens"]
    assert torch.equal(idx[:, :kept], case["out_idx"])
    gone = step.map.assign[:, 1:] == (s["N_out"] - 1 if s["fuse"] else -1)
    assert torch.equal(gone.nonzero()[:, 1].view(s["B"], -1), case["out_complement"])


@cases("evit", lambda c: c.short.startswith("ipe"))
def test_keep_rate_schedule(case: Case):
    steps, start, length, target = re.fullmatch(r"ipe(\d+)_start(\d+)_shrink(\d+)_base([\d.]+)", case.short).groups()
    for iteration, epoch, rate in read(case.file)[0][case.name].tolist():
        got = cosine_keep_rate(int(iteration), int(epoch), int(steps), int(start), int(length), float(target))
        assert abs(got - rate) < 1e-6


@cases("evit", lambda c: c.has("out_logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "keep_rate", "keep_rate_passed", "tokens", "fuse", "fp64_diff")
    x = case.input(case["out_logits"].shape[0])
    model = case.model()
    if tuple(x.shape[-2:]) != model.patch_embed.img_size:
        resize(model, tuple(x.shape[-2:]))
    counts = s["tokens"] or [None] * len(model.blocks)
    layers = [i for i, (rate, count) in enumerate(zip(s["keep_rate"], counts)) if rate < 1 or count is not None]
    rates = [s["keep_rate"][i] for i in layers]
    tokenzoo.patch_model(
        model, "evit", layers=layers, keep_rate=rates, tokens=[counts[i] for i in layers], fuse_token=s["fuse"]
    )
    passed = s["keep_rate_passed"]
    if passed is not None:  # a rate given at run time holds for the blocks that reduce
        tokenzoo.update_method(model, keep_rate=passed)
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["out_logits"])
    if case.has("out_features"):
        close(tokens.x, case["out_features"])
    expected = case.matching(r"out_idx\d+")
    assert len(expected) == len(tokens.trace)
    place = torch.arange(model.patch_embed.num_patches).expand(len(x), -1)
    for j, step in enumerate(tokens.trace):
        fused = int(s["fuse"])
        idx = step.map.heads[:, 1 : step.map.n_out - fused] - 1
        assert torch.equal(idx, case[f"out_idx{j}"])
        place = place.gather(1, idx)
        # upstream enters its fused slot as patch 0
        assert torch.equal(place, case[f"out_real_idx{j}"])
        place = torch.cat([place, torch.zeros_like(place[:, :fused])], dim=1)
    counts = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    assert [row.tokens_out for row in counts if row.block is not None] == case["out_tokens_per_block"].tolist()


def resize(model, size):
    """Bicubic resize of the position table without antialiasing, as upstream does at every forward."""
    table, grid = model.pos_embed, model.patch_embed.grid_size
    new = [side // patch for side, patch in zip(size, model.patch_embed.patch_size)]
    patches = table[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=new, mode="bicubic", align_corners=False)
    model.patch_embed.set_input_size(img_size=size)
    model.pos_embed = torch.nn.Parameter(torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1))
