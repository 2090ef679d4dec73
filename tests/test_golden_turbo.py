"""Turbo against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.turbo import Turbo


class Given:
    """Signals that hold a metric and an importance."""

    def __init__(self, metric, importance):
        self.metric, self.importance = metric, importance


@cases("turbo", lambda c: c.has("in/metric"))
def test_merging(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "r", "class_token", "alpha")
    prefix, x = int(s["class_token"]), case["in/tokens"]
    layout = Layout(prefix, bool(prefix), (1, s["N"] - prefix), track_size=True)
    method = Turbo(r=s["r"], alpha=s["alpha"], min_tokens=0, clip=True)
    step = Step(method, 0, method.strengths(1)[0])
    for size, wanted in ((case["in/size"], "out/tokens"), (None, "out/tokens_size1")):
        tokens = Tokens(x, layout, size)
        out = tokens.reduce(method.map(tokens, Given(case["in/metric"], case["in/attn_cls"]), step))
        close(out.x, case[wanted], 1e-5)
        if size is not None:
            close(out.size, case["out/size"], 1e-5)


@cases("turbo", lambda c: c.has("out/logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "r", "alpha", "r_threshold", "beta", "gamma")
    x, model = case.input(len(case["out/logits"])), case.model()
    options = {key: s[key] for key in ("r", "alpha", "beta", "gamma")}
    tokenzoo.patch_model(model, "turbo", min_tokens=s["r_threshold"], clip=True, **options)
    with torch.no_grad():
        tokens = model.forward_tokens(x)
        close(model(x), case["out/logits"])
    close(tokens.size, case["out/size"], 1e-5)
    rows = [row for row in tokenzoo.report(model, tuple(x.shape[-2:])).rows if row.block is not None]
    lengths = case["out/lengths"].tolist()
    assert lengths in ([row.tokens_out for row in rows], [row.tokens_in for row in rows])
