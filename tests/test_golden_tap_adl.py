"""Token-aware pooling and the attention diversification loss against the published implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from goldens import Case, below, cases, check_settings, close, models, read, settings
from torch import Tensor, nn

from tokenzoo.layers.token_pooling import TokenAveragePooling
from tokenzoo.ops.diversification import attention_diversification


class RvtBlock(nn.Module):
    """A block of RVT around the library's pooling: the carrier that the numbers were recorded in."""

    def __init__(self, weights: dict[str, Tensor], heads: int, scales: int, eps: float) -> None:
        super().__init__()
        self.weights, self.heads, self.eps = weights, heads, eps
        self.pool = TokenAveragePooling(weights["norm1.weight"].shape[0], scales).eval()
        own = {k: v for k, v in weights.items() if k.startswith("dilation_predictor")}
        missing = self.pool.load_state_dict(own, strict=False).missing_keys
        assert all(key.endswith("num_batches_tracked") for key in missing)

    def norm(self, name: str, x: Tensor) -> Tensor:
        w = self.weights
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self.eps)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        w = self.weights
        running = (w[f"{name}.running_mean"], w[f"{name}.running_var"])
        return F.batch_norm(x, *running, w[f"{name}.weight"], w[f"{name}.bias"])

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        w = self.weights
        pooled = self.pool(x, grid)
        qkv = F.linear(self.norm("norm1", pooled), w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + F.linear((attn @ v).transpose(1, 2).flatten(2), w["attn.proj.weight"], w["attn.proj.bias"])
        h = self.norm("norm2", x).transpose(1, 2).unflatten(2, grid)
        h = F.gelu(self.batch_norm("mlp.bn1", F.conv2d(h, w["mlp.fc1.weight"], w["mlp.fc1.bias"])))
        deep = F.conv2d(h, w["mlp.dwconv.weight"], w["mlp.dwconv.bias"], padding=1, groups=h.shape[1])
        h = F.gelu(self.batch_norm("mlp.bn2", deep))
        h = self.batch_norm("mlp.bn3", F.conv2d(h, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))
        return x + h.flatten(2).transpose(1, 2), pooled, attn


@cases("tap_adl", lambda c: c.has("pooled"))
def test_block(case: Case):
    s = case.settings
    check_settings(s, "B", "C", "num_scales", "heads", "mlp_ratio", "grid", "norm_eps")
    block, grid = RvtBlock(case.part("weights"), s["heads"], s["num_scales"], s["norm_eps"]), tuple(s["grid"])
    with torch.no_grad():
        shaped = case["x"].transpose(1, 2).unflatten(2, grid)
        for i, scale in enumerate(block.pool.scales(shaped)):
            close(scale, case[f"pool_scale{i}"], 1e-5)
        close(block.pool.dilation_predictor(shaped).permute(0, 2, 3, 1), case["scale_probs"], 1e-5)
        y, pooled, attn = block(case["x"], grid)
        close(pooled, case["pooled"], 1e-5)
        close(attn, case["attn"], 1e-5)
        close(y, case["y"], 1e-5)


@cases("tap_adl", lambda c: c.has("attn0") and c.has("loss"))
def test_loss_and_gradients(case: Case):
    s = case.settings
    check_settings(s, "layers", "B", "heads", "N", "threshold")
    maps = [case[f"attn{i}"].clone().requires_grad_() for i in range(s["layers"])]
    loss = attention_diversification(maps, s["threshold"])
    close(loss.reshape(1), case["loss"], 1e-5)
    loss.backward()
    for i, each in enumerate(maps):
        close(each.grad, case[f"grad{i}"], 1e-5)


@models("tap_adl", "logits")
def test_model(file: str):
    tensors, meta = read(file)
    config, w = settings(meta["config"]), below(file, "weights/")
    norm = [w[f"patch_embed.proj.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
    with torch.no_grad():
        conv = F.conv2d(tensors["input"], w["patch_embed.proj.0.weight"], w["patch_embed.proj.0.bias"], 2, 2)
        x = F.max_pool2d(F.batch_norm(conv, *norm), 3, 2, 1)
        kernel = w["patch_embed.proj.3.weight"]
        x = F.conv2d(x, kernel, w["patch_embed.proj.3.bias"], stride=kernel.shape[-1])
        close(x, tensors["output/stem"], 1e-5)
        number = 0
        for stage, depth in enumerate(config["depth"]):
            if stage:
                pool = w[f"pools.{stage - 1}.conv.weight"]
                x = F.conv2d(x, pool, w[f"pools.{stage - 1}.conv.bias"], 2, pool.shape[-1] // 2, groups=x.shape[1])
            grid, x = tuple(x.shape[-2:]), x.flatten(2).transpose(1, 2)
            for index in range(depth):
                own = below(file, f"weights/transformers.{stage}.blocks.{index}.")
                block = RvtBlock(own, config["heads"][stage], config["num_scales"], config["norm_eps"])
                x, _, attn = block(x, grid)
                close(attn.mean(1), tensors[f"output/attn{number}"], 1e-5)
                number += 1
            x = x.transpose(1, 2).unflatten(2, grid)
        x = F.layer_norm(x.mean((2, 3)), w["norm.weight"].shape, w["norm.weight"], w["norm.bias"], config["norm_eps"])
        close(F.linear(x, w["head.weight"], w["head.bias"]), tensors["output/logits"], 1e-5)
