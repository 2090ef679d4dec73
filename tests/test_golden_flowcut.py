"""FlowCut against the published implementation, in a CLIP tower."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from goldens import Case, below, cases, check_settings, close, read
from timm.models.vision_transformer import VisionTransformer

import tokenzoo
from tokenzoo.core.layout import Layout
from tokenzoo.core.tokens import Tokens
from tokenzoo.methods.flowcut import FlowCut
from tokenzoo.ops.flow import evenness, flow_scores


def tower(file: str) -> VisionTransformer:
    """The recorded CLIP tower as a timm model."""
    meta, weights = read(file)[1], below(file, "weights/vision_model.")
    config = json.loads(meta["config"].replace("'", '"'))
    dim, depth = config["hidden_size"], config["num_hidden_layers"]
    assert config["hidden_act"] == "quick_gelu"
    model = VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], embed_dim=dim, depth=depth,
        num_heads=config["num_attention_heads"], mlp_ratio=config["intermediate_size"] / dim, num_classes=0,
        pre_norm=True, act_layer="quick_gelu",
        norm_layer=partial(torch.nn.LayerNorm, eps=float(meta["layer_norm_eps"])),
    )  # fmt: skip
    state = {
        "cls_token": weights["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": weights["embeddings.position_embedding.weight"].unsqueeze(0),
        "patch_embed.proj.weight": weights["embeddings.patch_embedding.weight"],
    }
    names = {"pre_layrnorm": "norm_pre", "post_layernorm": "norm"}
    state |= {f"{new}.{p}": weights[f"{old}.{p}"] for old, new in names.items() for p in ("weight", "bias")}
    layers = {
        "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "self_attn.out_proj": "attn.proj",
    }  # fmt: skip
    for i in range(depth):
        for p in ("weight", "bias"):
            own = f"encoder.layers.{i}."
            state |= {f"blocks.{i}.{new}.{p}": weights[f"{own}{old}.{p}"] for old, new in layers.items()}
            parts = [weights[f"{own}self_attn.{name}_proj.{p}"] for name in "qkv"]
            state[f"blocks.{i}.attn.qkv.{p}"] = torch.cat(parts)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"patch_embed.proj.bias"}
    if left.missing_keys:
        torch.nn.init.zeros_(model.patch_embed.proj.bias)
    return model.eval()


class Given:
    """Signals that hold what was recorded."""

    def __init__(self, importance):
        self.importance = importance


@cases("vlm", lambda c: c.has("in/semantic_attention_mean"))
def test_score_and_count(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "value_dim", "remaining_prune_layers", "target_num")
    attention, alike = case["in/cls_attention_mean"], case["in/semantic_attention_mean"]
    score = flow_scores(attention, alike, case["in/value_mean"])
    close(score, case["out/score"], 1e-5)
    if not case.has("out/prune_num"):
        return close(evenness(attention, s["N"]).max(), torch.tensor(1.0).double(), 1.0)
    scores = torch.nn.functional.pad(score, (1, 0))
    tokens = Tokens(torch.zeros(s["B"], 1 + s["N"], 4), Layout(1, True, (1, s["N"])), scores=scores)
    method = FlowCut(tokens=s["target_num"], batch_rule=True, layers=(0, s["remaining_prune_layers"]))
    step = tokenzoo.core.recipe.Recipe.parse(method).steps(s["remaining_prune_layers"] + 1)[0][0]
    keep = method.map(tokens, Given(torch.nn.functional.pad(attention, (1, 0))), step)
    assert s["N"] - (keep.n_out - 1) == case["out/prune_num"].item()


@cases("vlm", lambda c: c.has("out/keep_indices") and c.has("out/lengths") and "target_num" in c.asks)
def test_tower(case: Case):
    s = case.settings
    check_settings(s, "target_num", "image")
    model, images = tower(case.fixture()), read(case.fixture())[0]["input"]
    images = images if s["image"] is None else images[s["image"] : s["image"] + 1]
    lengths, depth = case["out/lengths"].tolist(), len(model.blocks)
    tokenzoo.patch_model(model, "flowcut", tokens=s["target_num"], batch_rule=s["image"] is None)
    with torch.no_grad():
        tokens = model.forward_tokens(images, trace=True)
        taps = model.forward_intermediates(images, indices=depth, output_fmt="NLC", intermediates_only=True)
    assert [len(images)] * depth == [len(tap) for tap in taps]
    counts = [step.map.n_out for step in tokens.trace]
    assert [n for n in sorted(set(lengths), reverse=True)][1:] == [n for n in sorted(set(counts), reverse=True)]
    held = tokens.trace[0].map.heads
    for step in tokens.trace[1:]:
        held = held.gather(1, step.map.heads)
    assert torch.equal(held[:, 1:] - 1, case["out/keep_indices"])
    close(taps[-2], case["out/tokens"], 1e-4)  # behind the last block but one, patches alone


@pytest.mark.parametrize("depth", range(3, 13))
def test_default_layers(depth):
    """An even number of blocks to the last but two, which drops down to the goal."""
    expected = [i for i in range(depth - 2) if (depth - 3 - i) % 2 == 0]
    assert list(FlowCut().default_layers(depth)) == expected and expected[-1] == depth - 3
