"""Sparsifiner against the published implementation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.core.signals import Signals
from tokenzoo.layers.mask_predictor import MaskPredictor, best_entries
from tokenzoo.ops.attention import attention_rows


@cases("sparsifiner", lambda c: c.has("out/attn_mask"))
def test_mask(case: Case):
    s = case.settings
    check_settings(
        s, "heads", "num_tokens", "attn_keep_rate", "reduce_n_factor", "reduce_c_factor", "coef_topk", "score_topk",
        "topk", "bt",
    )  # fmt: skip
    q, k = case["in/q"], case["in/k"]
    predictor = MaskPredictor(
        s["num_tokens"], q.shape[3], s["heads"], s["reduce_n_factor"], s["reduce_c_factor"], s.get("topk", 8),
        None if s.get("coef_topk", True) else 0.05, s.get("bt", 0.02),
    )  # fmt: skip
    predictor.load_state_dict(case.part("in/weights"))
    with torch.no_grad():
        coefficient, basis = predictor(q, k)
        scores = predictor.scores(coefficient, basis)
    close(predictor.sparse(coefficient), case["out/basis_coef"], 2e-5)
    close(scores, case["out/approx_attn"], 2e-5)
    best = s.get("score_topk", True)
    mask = best_entries(scores, s["attn_keep_rate"], s["num_tokens"]) if best else scores > 1e-4
    assert torch.equal(F.pad(mask, (0, 0, 1, 0), value=True).long(), case["out/attn_mask"])


@cases("sparsifiner", lambda c: c.has("logits"))
def test_model(case: Case, monkeypatch):
    """Their class row counts what was dropped as keys of zero, in the attention and in the ranking of what is left."""

    def counted(signals: Signals) -> torch.Tensor:
        heads, n = signals.heads, signals.heads.k.shape[2]
        bias = torch.full((1, 1, 1, n + 1), 0.0).index_fill(3, torch.tensor([n]), -math.inf)
        if (gone := len(case.part("weights")["blocks.0.attn.mask_predictor.proj_n"]) - n) > 0:
            bias[..., n] = math.log(gone)
        return attention_rows(heads._replace(k=F.pad(heads.k, (0, 0, 0, 1))), 0, 1, bias).squeeze(2)[..., :n]

    monkeypatch.setattr(Signals, "class_attention", property(counted))
    s = case.settings
    check_settings(s, "attn_keep_rate", "token_keep_rate", "token_pruning_layers", "reduce_n_factor", "topk")
    x, model = case.input(len(case["logits"])), case.model()
    (keep,) = set(s["attn_keep_rate"])
    patches = model.patch_embed.num_patches
    recipe = [{"method": "sparsifiner", "keep_rate": keep, "reduce_n": s["reduce_n_factor"], "coefficients": s["topk"]}]
    recipe[0]["zeros_count"] = True
    flagged = [i for i, prunes in enumerate(s["token_pruning_layers"]) if prunes]
    if flagged:
        counts = [math.ceil(s["token_keep_rate"][i] * patches) for i in flagged]
        recipe.append({"method": "topk", "layers": flagged, "tokens": counts})
    tokenzoo.patch_model(model, recipe)
    given = case.part("weights")
    weights = {key.replace("attn.mask_predictor", "tokenzoo_0_sparsifiner"): value for key, value in given.items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        tokens = model.forward_tokens(x)
        close(model(x), case["logits"], 2e-5)
    prefix, features = model.num_prefix_tokens, case["features"]
    place = tokens.original_positions()[:, prefix:] - prefix
    found, expected = tokens.x[: len(features), prefix:], features
    close(found, torch.stack([rows[at] for rows, at in zip(expected, place)]), 2e-5 if not flagged else 1e-4)
    if case.has("final_token_mask"):
        mask = torch.zeros(len(x), patches, dtype=torch.int64).scatter(1, place, 1)
        assert torch.equal(mask, case["final_token_mask"])
    n = patches + prefix
    first = (prefix * n + patches * math.ceil(keep * n)) / n**2
    assert abs(float(case["kept_attention_per_block"][0]) - first) < 1e-3
