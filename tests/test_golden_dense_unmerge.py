"""EViT with dense recovery against the port inside Expedit-Segmenter (ToMe's dense form: test_golden_tomesd.py)."""

import torch
from goldens import Case, cases, check_settings, close

import tokenzoo


@cases("dense_unmerge", lambda c: "keep" in c.asks)
@torch.no_grad()
def test_recovery(case: Case):
    s = case.settings
    check_settings(s, "keep", "fuse", "k", "T")
    model, x = case.model(), case.input(len(case["cls"]))
    layers = tuple(i for i, rate in enumerate(s["keep"]) if rate < 1)
    tokenzoo.patch_model(
        model, "evit", layers=layers, keep_rate=tuple(s["keep"][i] for i in layers), fuse_token=s["fuse"], dense=True,
        fill={"kind": "nearest", "k": s["k"], "temperature": s["T"], "norm": "l2"},
    )  # fmt: skip
    features = model.forward_features(x)
    close(features[:, 0], case["cls"])
    close(features[:, 1:], case["features"])
    assert [tokens.length for tokens in model.walk(x)][1:] == case["block_tokens"].tolist()
