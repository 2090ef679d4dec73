"""Slow-fast updates (Evo-ViT) against the published light UniFormer: its blocks, and the model around them."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from goldens import MODEL, READ, below, case_names, check_settings, close, files, read, settings
from timm.models.vision_transformer import Block
from torch import nn

from tokenzoo.adapters.block import BlockPlan
from tokenzoo.adapters.vit.attention import ReducingAttention
from tokenzoo.adapters.vit.model import ReducingVitBlock
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.evo import Evo

FILES = [pytest.param(name, id=name, marks=pytest.mark.golden) for name in files("uniformer_light")]
for param in FILES:
    known = (name for name in case_names(param.values[0]) if re.fullmatch(rf"blocks[34]\.\d+|{MODEL}", name))
    READ.update((param.values[0], name) for name in known)


def part(weights, prefix):
    """Weights below a prefix."""
    return {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(prefix + ".")}


def config(meta):
    found = settings(meta["config"])
    known = ("depth", "num_classes", "embed_dim", "head_dim", "mlp_ratio", "conv_stem", "prune_ratio", "trade_off")
    check_settings(found, *known)
    return found


def slow_fast(weights, c, x, scores, head_dim, ratio, blend):
    """One attention block of the library on a class token [B, 1, C], a map and scores [B, N]; returns the same."""
    grid, dim = x.shape[2:], x.shape[1]
    x = x + F.conv2d(x, weights["pos_embed.weight"], weights["pos_embed.bias"], padding=1, groups=dim)
    hidden = weights["mlp.fc1.weight"].shape[0]
    block = Block(dim, dim // head_dim, hidden / dim, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    block.load_state_dict({k: v for k, v in weights.items() if not k.startswith("pos_embed")})
    block.__class__ = ReducingVitBlock
    block.attn.__class__ = ReducingAttention
    layout = Layout(1, True, tuple(grid))
    # the step of a block in the middle: importance arrives and is wanted afterwards
    step = Step(Evo(keep_rate=ratio, blend=blend), 1, (ratio, True))
    block.tokenzoo = BlockPlan(1, 3, (step,), False, layout)
    rows = torch.cat([c, x.flatten(2).transpose(1, 2)], dim=1)
    if scores is not None:
        scores = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1)
    out = block.eval().run(Tokens(rows, layout, scores=scores))
    return out.x[:, :1], out.x[:, 1:].transpose(1, 2).unflatten(2, grid), out.scores[:, 1:]


def pooled(scores, grid):
    """Scores on the grid of the next stage, their sum unchanged."""
    small = F.avg_pool2d(scores.unflatten(1, grid).unsqueeze(1), 2).flatten(1)
    return small * (scores.sum(1, keepdim=True) / small.sum(1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("file", FILES)
def test_blocks(file):
    tensors, meta = read(file)
    found = config(meta)
    for stage in (3, 4):
        for i, (ratio, blend) in enumerate(zip(found["prune_ratio"][stage - 1], found["trade_off"][stage - 1])):
            name = f"blocks{stage}.{i}"
            scores = tensors.get(f"{name}/score_in")
            weights = part(tensors, f"weights/{name}")
            before = tensors[f"{name}/cls_in"], tensors[f"{name}/x_in"]
            c, x, after = slow_fast(weights, *before, scores, found["head_dim"], ratio, blend)
            close(c, tensors[f"{name}/cls_out"], 1e-5)
            close(x, tensors[f"{name}/x_out"], 1e-5)
            expected = tensors[f"{name}/score_out"]
            close(after if expected.shape == after.shape else pooled(after, x.shape[2:]), expected, 1e-5)


@torch.no_grad()
def logits_of(found, w, images):
    """The whole model, its attention blocks those of the library: logits of images."""

    def conv(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def norm(x, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"])

    def embed(x, stage):
        stride = w[f"patch_embed{stage}.proj.weight"].shape[-1]  # patches do not overlap
        x = conv(x, f"patch_embed{stage}.proj", stride=stride).permute(0, 2, 3, 1)
        scale, shift = w[f"patch_embed{stage}.norm.weight"], w[f"patch_embed{stage}.norm.bias"]
        return F.layer_norm(x, scale.shape, scale, shift, eps=1e-5).permute(0, 3, 1, 2)

    def local(x, name):
        dim = x.shape[1]
        x = x + conv(x, f"{name}.pos_embed", padding=1, groups=dim)
        y = conv(conv(norm(x, f"{name}.norm1"), f"{name}.conv1"), f"{name}.attn", padding=2, groups=dim)
        x = x + conv(y, f"{name}.conv2")
        return x + conv(F.gelu(conv(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    if found["conv_stem"]:
        x = F.gelu(norm(conv(images, "patch_embed1.proj.0", stride=2, padding=1), "patch_embed1.proj.1"))
        x = norm(conv(x, "patch_embed1.proj.3", stride=2, padding=1), "patch_embed1.proj.4")
    else:
        x = embed(images, 1)
    for i in range(found["depth"][0]):
        x = local(x, f"blocks1.{i}")
    x = embed(x, 2)
    for i in range(found["depth"][1]):
        x = local(x, f"blocks2.{i}")
    x, c, scores = embed(x, 3), w["cls_token"].expand(len(x), -1, -1), None
    for stage in (3, 4):
        if stage == 4:
            scores = pooled(scores, x.shape[2:])
            x, c = embed(x, 4), F.linear(c, w["cls_upsample.weight"], w["cls_upsample.bias"])
        for i, (ratio, blend) in enumerate(zip(found["prune_ratio"][stage - 1], found["trade_off"][stage - 1])):
            weights = part(w, f"blocks{stage}.{i}")
            c, x, scores = slow_fast(weights, c, x, scores, found["head_dim"], ratio, blend)
    return F.linear(norm(x, "norm").mean((2, 3)), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("file", FILES)
def test_model(file):
    tensors, meta = read(file)
    logits = logits_of(config(meta), below(file, "weights/"), tensors["input"])
    close(logits, tensors["output/logits"], 1e-5)
