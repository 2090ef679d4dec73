"""SiT against the published implementation: both layers, inference, training, and the loss."""

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.apply.released import rename_released
from tokenzoo.core.learned import Note, Teaching
from tokenzoo.layers.slimming import ReverseSlimming, TokenSlimming
from tokenzoo.maps import MixMap
from tokenzoo.methods.sit import SiT
from tokenzoo.training.losses import distillation


@cases("sit", lambda c: c.has("out/weight"))
def test_slimming(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "dim", "keep", "ratio")
    layer = TokenSlimming(s["dim"], s["keep"], s["ratio"])
    layer.load_state_dict(case.part("in/weights"))
    weights = layer(x)
    close(weights, case["out/weight"], 1e-5)
    close(MixMap(weights).apply(x), case["out/x"], 1e-5)


@cases("sit", lambda c: "recovered" in c.asks)
def test_rebuilding(case: Case):
    s = case.settings
    check_settings(s, "dim", "keep", "recovered", "ratio")
    layer = ReverseSlimming(s["dim"], s["keep"], s["recovered"], s["ratio"])
    layer.load_state_dict(case.part("in/weights"))
    close(layer(case["in/x"]), case["out/x"], 1e-5)


@cases("sit", lambda c: c.has("in/student_tokens"))
def test_losses(case: Case):
    s = case.settings
    check_settings(s, "lambda_token", "lambda_logits", "tau")
    notes = tuple(Note(0, block, tokens) for block, tokens in enumerate(case["in/student_tokens"]))
    taught = Teaching(layers=tuple(case["in/teacher_tokens"]))
    feature = SiT(feature_weight=s["lambda_token"]).losses(notes, taught)["feature"]
    close(feature, case["out/loss_token"].squeeze(), 1e-5)
    logits = s["lambda_logits"] * distillation(case["in/student_logits"], case["in/teacher_logits"], s["tau"])
    close(logits, case["out/loss_logits"].squeeze(), 1e-5)
    task = F.cross_entropy(case["in/student_logits"], case["in/labels"])
    close(task, case["out/loss_cls"].squeeze(), 1e-5)
    close(task + feature + logits, case["out/loss"].squeeze(), 1e-5)


def patched(case: Case) -> torch.nn.Module:
    """The model of a case with its released weights; layers that rebuild where the file has some."""
    s, model = case.settings, case.model()
    check_settings(s, "stage_blocks", "keeping_ratio", "skip_lam", "keep")
    assert s["skip_lam"] == 1
    ends = [sum(s["stage_blocks"][: i + 1]) - 1 for i in range(len(s["stage_blocks"]) - 1)]
    weight = 2.0 if case.has("weights/rtsm.0.norm1.weight") else 0.0
    tokenzoo.patch_model(model, "sit", layers=ends, keep_rate=s["keeping_ratio"], feature_weight=weight)
    state = {key: value for key, value in model.state_dict().items() if "tokenzoo" not in key}
    model.load_state_dict(rename_released(model, state | case.part("weights")))
    return model


@cases("sit", lambda c: c.has("tokens_last"))
@torch.no_grad()
def test_inference(case: Case):
    x, model = case.input(len(case["logits"])), patched(case)
    close(model(x), case["logits"], 2e-5)
    last = case["tokens_last"]
    rows = model.forward_intermediates(x, [len(model.blocks) - 1], output_fmt="NLC", intermediates_only=True)
    close(rows[0][: len(last)], last, 2e-5)
    rows = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    # as recorded: what a block gives before tokens are slimmed behind it
    assert [row.tokens_in for row in rows if row.block is not None] == case["token_counts"].tolist()
    assert sorted({row.tokens_in - 1 for row in rows if row.block is not None}, reverse=True) == case.settings["keep"]


@cases("sit", lambda c: c.has("train/logits"))
@torch.no_grad()
def test_training(case: Case):
    model = patched(case).train()
    tokens = model.forward_tokens(case.input(len(case["train/logits"])))
    close(model.forward_head(tokens), case["train/logits"], 2e-5)
    recorded = case.matching(r"train/layer_tokens\d+")
    assert len(recorded) == len(tokens.records) == len(model.blocks)
    for note in tokens.records:
        close(note.value, recorded[f"train/layer_tokens{note.block}"], 2e-5)
