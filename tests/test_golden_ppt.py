"""PPT against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.methods import ppt
from tokenzoo.ops.attention import significance


@cases("ppt", lambda c: c.has("out/score"))
def test_scores(case: Case):
    check_settings(case.settings, "heads")
    attention, values = case["in/attn"], case["in/v"].transpose(1, 2)
    scores = significance(attention[:, :, 0].mean(1), values)[:, 1:]
    share, variance = ppt.shares_and_variance(scores)
    close(share, case["out/score"], 1e-5)
    torch.testing.assert_close(variance[:, 0], case["out/variance"], atol=1e-7, rtol=1e-4)


@cases("ppt", lambda c: c.has("logits"))
def test_model(case: Case, monkeypatch):
    s = case.settings
    check_settings(s, "r", "pp_loc_list", "threshold", "prop_attn")
    x, variances, found = case.input(len(case["logits"])), [], ppt.shares_and_variance

    def noted(*args):
        out = found(*args)
        variances.append(out[1].squeeze(1))
        return out

    monkeypatch.setattr(ppt, "shares_and_variance", noted)
    model = case.model()
    options = {"threshold": s["threshold"], "prop_attn": bool(s["prop_attn"])}
    tokenzoo.patch_model(model, "ppt", r=s["r"], layers=s["pp_loc_list"], clip=True, **options)
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        if case.has("score_variance"):
            torch.testing.assert_close(torch.stack(variances), case["score_variance"], atol=1e-7, rtol=1e-4)
        close(model(x), case["logits"], 1e-5)
    size = tokens.size
    if not s["prop_attn"]:  # theirs begins anew in every block
        size = tokens.trace[-1].map.pool(torch.ones(len(x), tokens.trace[-1].map.n_in, 1))
    close(size, case["size"], 1e-5)
    rows = [row for row in tokenzoo.report(model, tuple(x.shape[-2:])).rows if row.block is not None]
    assert [row.tokens_out for row in rows] == case["token_counts"].tolist()
