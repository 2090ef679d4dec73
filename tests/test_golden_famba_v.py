"""Famba-V against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close
from test_golden_vision_mamba import build

import tokenzoo


def strategy(s):
    """The released conditions on the block index, which turn "lower" and "upper" around, as a strategy of ours."""
    kind, layer = s["fusion_strategy"], s.get("fusion_layer")
    if kind in ("all", "alternate"):
        assert layer is None
        return kind
    return {"lower": f"upper:{layer + 1}", "upper": f"lower:{layer}"}[kind]


@cases("famba_v", lambda c: c.has("output/logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "fusion_strategy", "fusion_layer", "fusion_token")
    weights = case.fixture()
    model, x = build(weights, cls_position="first"), case.input(len(case["output/logits"]))
    assert set(case.part("output")) == {"logits", "token_counts_after_block"}
    expected = case["output/token_counts_after_block"].tolist()
    if s["fusion_strategy"] == "no":
        assert expected == [model.pos_embed.shape[1]] * len(model.layers)
        with torch.no_grad():
            close(model(x), case["output/logits"])
            same = Case(weights, "variant_cls_first")
            if same.has("logits") and not same.has("input"):
                close(same["logits"], case["output/logits"])
        tokenzoo.patch_model(model, "famba", r=0, ordered=False)
    else:
        tokenzoo.patch_model(
            model, "famba", r=s["fusion_token"], strategy=strategy(s), ordered=False, clip=s["fusion_token"] > 32
        )
    with torch.no_grad():
        close(model(x), case["output/logits"])
        assert [tokens.length for tokens in model.walk(x)][1:] == expected
    assert [row.tokens_out for row in tokenzoo.report(model).rows if row.block is not None] == expected
