"""ATS against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close, small_block

import tokenzoo
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.ats import ATS, sample_heights


@cases("ats", lambda c: c.has("out_sorted_scores"))
def test_sampling(case: Case):
    s = case.settings
    check_settings(s, "B", "heads", "N", "head_dim", "n_ref_tokens", "n_tokens", "masked_in_image0", "kept")
    attn, v = case["attn"], case["v"]
    scores = attn[:, :, 0, 1:].sum(1) * v.transpose(1, 2).flatten(2).norm(dim=2)[:, 1:]
    masked = torch.zeros(s["B"], 1, dtype=torch.bool)
    masked[0] = s["masked_in_image0"] > 0
    candidates = s["n_tokens"] - 1 if s["n_tokens"] < s["N"] else None
    picked, order = sample_heights(scores, s["n_ref_tokens"] - 1, ~masked, candidates)
    normed = scores / scores.sum(1, keepdim=True)
    close(normed.gather(1, order), case["out_sorted_scores"], 1e-5)
    real = normed.gather(1, order) > 0
    assert torch.equal(order[real], case["out_sorted_indices"][real])
    kept = case["out_kept_tokens"]
    for image in range(s["B"]):
        expected = kept[image][kept[image] >= 0]
        assert torch.equal(order[image][picked[image]] + 1, expected)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), expected])
        close(case["out_x"][image, : len(rows)], case["x"][image, rows], 1e-6)
        assert case["out_policy"][image].sum() == len(rows)


@cases("ats", lambda c: c.has("out_block"))
def test_block(case: Case):
    s = case.settings
    check_settings(
        s, "B", "N", "C", "heads", "n_tokens", "n_ref_tokens", "drop_tokens", "masked_per_image", "kept_incl_cls"
    )
    layout = Layout(1, True, (1, s["n_ref_tokens"] - 1))
    # the budget spreads as many heights as the network had patches; storage is cut or not
    method = ATS(batch_invariant=False, padded=True, max_tokens=None if s["drop_tokens"] else s["n_tokens"])
    strength = method.max_tokens
    block = small_block(case.part("weights"), s["heads"], method, layout, strength)
    block.tokenzoo = block.tokenzoo._replace(steps=(tokenzoo.core.method.Step(method, 0, strength),))
    seen = {}
    block.norm2.register_forward_hook(lambda module, args, out: seen.update(tokens=args[0]))
    policy = case["policy"].bool()
    valid = None if policy.all() else policy
    with torch.no_grad():
        out = block(Tokens(case["x"], layout, valid=valid))
    rows = out.valid.unsqueeze(-1)
    close(seen["tokens"] * rows, case["out_tokens_after_attn"])
    close(out.x * rows, case["out_block"])
    assert torch.equal(out.valid, case["out_policy"].bool())
    assert out.valid.sum(1).tolist() == s["kept_incl_cls"]


@cases("ats", lambda c: c.has("out_logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "ats_blocks", "num_tokens", "drop_tokens", "B")
    x = case.input(s["B"])
    model = case.model()
    # released code: dropping lets the padding, hence batch mates, decide about the lowest token
    budget = None if s["drop_tokens"] else s["num_tokens"]
    options = {"max_tokens": budget, "padded": budget is not None, "batch_invariant": not s["drop_tokens"]}
    tokenzoo.patch_model(model, "ats", layers=s["ats_blocks"], **options)
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["out_logits"])
    real, padded, n = [], [], model.pos_embed.shape[1]
    count = [n] * s["B"]
    steps = {step.block: step for step in tokens.trace}
    for block in range(len(model.blocks)):
        if block in steps:
            valid, n = steps[block].map.valid, steps[block].map.n_out
            count = [n] * s["B"] if valid is None else valid.sum(1).tolist()  # None: no image has padding
        real.append(count)
        padded.append(n)
    assert real == case["out_real_tokens_per_block"].tolist()
    assert padded == case["out_padded_tokens_per_block"].tolist()
