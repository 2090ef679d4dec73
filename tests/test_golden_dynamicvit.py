"""DynamicViT against the published implementation: predictor, inference, training with given draws, and losses."""

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.apply.released import rename_released
from tokenzoo.core.gate import Gate
from tokenzoo.core.learned import Decision, Teaching
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.layers.token_predictor import TokenPredictor
from tokenzoo.maps import GateMap
from tokenzoo.methods.dynamicvit import DynamicViT
from tokenzoo.training.losses import distillation
from tokenzoo.training.token_distillation import score_distillation, token_distillation


@cases("dynamicvit", lambda c: c.has("out/log_prob"))
def test_predictor(case: Case):
    check_settings(case.settings, "dim")
    predictor = TokenPredictor(case.settings["dim"])
    predictor.load_state_dict(case.part("in/weights"))
    close(predictor(case["in/x"], case["in/policy"]), case["out/log_prob"], 1e-5)


@cases("dynamicvit", lambda c: c.has("out/attn"))
def test_softmax_with_policy(case: Case):
    check_settings(case.settings, "eps")
    assert case.settings["eps"] == 1e-6  # which the library does without
    bias = Gate(case["in/policy"].squeeze(2), sees_itself=True).bias(itself=True)
    close((case["in/attn_logits"] + bias).softmax(3), case["out/attn"], 1e-5)


def patched(case: Case, **options) -> torch.nn.Module:
    """The model of a case with its released weights."""
    s, model = case.settings, case.model()
    check_settings(s, "pruning_loc", "token_ratio")
    rates = [b / a for a, b in zip([1.0, *s["token_ratio"]], s["token_ratio"])]
    tokenzoo.patch_model(model, "dynamicvit", layers=s["pruning_loc"], keep_rate=rates, **options)
    state = {key: value for key, value in model.state_dict().items() if "tokenzoo" not in key}
    model.load_state_dict(rename_released(model, {"model": state | case.part("weights")}))
    return model


@cases("dynamicvit", lambda c: c.has("token_counts"))
@torch.no_grad()
def test_inference(case: Case):
    x, model = case.input(len(case["logits"])), patched(case)
    close(model(x), case["logits"], 1e-5)
    close(model.forward_tokens(x).x[: len(case["features"])], case["features"], 1e-5)
    rows = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    assert [row.tokens_out for row in rows if row.block is not None] == case["token_counts"].tolist()


@cases("dynamicvit", lambda c: c.has("train/forced_keep"))
@torch.no_grad()
def test_training(case: Case, monkeypatch):
    """With the recorded draws in place of Gumbel noise."""
    stages = {block: number for number, block in enumerate(case.settings["pruning_loc"])}
    forced = case["train/forced_keep"]
    monkeypatch.setattr(DynamicViT, "draw", lambda method, scores, tokens, step: forced[stages[step.block]])
    x, model = case.input(len(case["train/logits"])), patched(case).train()
    tokens = model.forward_tokens(x)
    close(model.forward_head(tokens), case["train/logits"], 1e-5)
    features = case["train/features"]
    close(tokens.x[: len(features), 1:], features, 1e-5)
    assert torch.equal(torch.stack([record.after for record in tokens.records]), case["train/keep_per_stage"])
    assert torch.equal(tokens.gate.open[:, 1:], case["train/final_mask"].squeeze(2))
    assert [record.share for record in tokens.records] == case.settings["token_ratio"]


@cases("dynamicvit", lambda c: c.has("in/teacher_token"))
def test_losses(case: Case):
    s, scores, mask = case.settings, case["in/scores"], case["in/mask"]
    check_settings(s, "keep_ratio", "ratio_weight", "distill_weight", "clf_weight", "mse_token")
    open_before = torch.ones_like(scores[0])
    records = [Decision(0, i, d, open_before, share) for i, (d, share) in enumerate(zip(scores, s["keep_ratio"]))]
    ratio = DynamicViT(ratio_weight=s["ratio_weight"]).losses(tuple(records), Teaching())["ratio"]
    close(ratio / s["ratio_weight"] * len(records), case["out/ratio"].squeeze(), 1e-5)
    close(distillation(case["in/pred"], case["in/teacher_pred"]), case["out/cls_kl"].squeeze(), 1e-5)
    student = case["in/token_pred"]
    tokens = Tokens(student, Layout(0, False, (1, student.shape[1])), trace=())
    tokens = tokens.reduce(GateMap(mask.squeeze(2)), 0, "dynamicvit")
    far = token_distillation if s["mse_token"] else score_distillation
    apart = far(tokens, case["in/teacher_token"])
    close(apart, case["out/token"].squeeze(), 1e-5)
    task = F.cross_entropy(case["in/pred"], case["in/labels"])
    close(task, case["out/cls"].squeeze(), 1e-5)
    kl = distillation(case["in/pred"], case["in/teacher_pred"])
    loss = s["clf_weight"] * task + ratio + s["distill_weight"] * (kl + apart)
    close(loss, case["out/loss"].squeeze(), 1e-5)
