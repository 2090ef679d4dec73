"""p-MoD: weights, routing and the schedule of ratios against the published implementation, in one layer of a Llama."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from goldens import Case, below, cases, check_settings, close, read
from torch import Tensor

from tokenzoo.core.schedule import decayed_keep_rates, depth_shares, truncated
from tokenzoo.layers.router import TanhRouter
from tokenzoo.maps import RoutedMap


@cases("pmod", lambda c: c.has("out/shiftedcos"))
def test_schedule(case: Case):
    s = case.settings
    check_settings(s, "average", "max_ratio", "min_ratio", "rule")
    for form, name in (("cosine", "shiftedcos"), ("linear", "shiftedlinear")):
        expected = case[f"out/{name}"]
        shares = depth_shares(len(expected), form)
        close(torch.tensor(shares, dtype=torch.float64), expected, 1e-9)
        rates = decayed_keep_rates(len(expected), form, s["max_ratio"], s["min_ratio"])
        for share, rate in zip(expected.tolist(), rates):
            assert rate == 1 if share > s["max_ratio"] else abs(rate - max(share, s["min_ratio"])) < 1e-9


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rotary positions of heads [H, N, D]."""
    width = x.shape[-1]
    angle = places[:, None] / base ** (torch.arange(0, width, 2) / width)
    angle = torch.cat([angle, angle], dim=-1)
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    return x * angle.cos() + half * angle.sin()


@cases("pmod", lambda c: c.has("in/hidden"))
def test_layer(case: Case):
    s = case.settings
    check_settings(s, "layer", "ratio", "kept", "weight")
    fixture = read("vlm/llama_micro")
    words = " ".join(fixture[1].values())
    size = {name: float(re.search(rf"{name}\W+([\d.e+-]+)", words).group(1)) for name in ("num_attention_heads",)}
    heads = int(size["num_attention_heads"])
    found = re.search(r"rms_norm_eps\W+([\d.e+-]+)", words)
    eps = float(found.group(1)) if found else 1e-6
    found = re.search(r"rope_theta\W+([\d.e+-]+)", words)
    base = float(found.group(1)) if found else 10000.0
    start = next(key for key in fixture[0] if f"layers.{s['layer']}.input_layernorm" in key).split("input_layernorm")[0]
    w = below("vlm/llama_micro", start)
    router = TanhRouter(case["in/hidden"].shape[2])
    router.load_state_dict(case.part("weights"))
    hidden, visual = case["in/hidden"], case["in/visual"].bool()
    real = case["in/attention_mask"].bool() if case.has("in/attention_mask") else torch.ones_like(visual)
    for image, (x, seen, there) in enumerate(zip(hidden, visual, real)):
        weight = torch.where(seen, router(x.unsqueeze(0))[0], torch.ones(len(x)))
        kept = truncated(s["ratio"], int(seen.sum()))
        assert kept == s["kept"][image]
        best = weight.masked_fill(~seen, -1).topk(kept).indices
        runs = (there & ~seen).index_fill(0, best, True)
        idx = runs.nonzero().flatten()[None]
        token_map = RoutedMap(idx, len(x), weight[None], x[None])
        z = token_map.apply(x[None])[0]
        n = norm(z, w["input_layernorm.weight"], eps)
        q, k, v = (
            F.linear(n, w[f"self_attn.{name}_proj.weight"]).unflatten(1, (-1, len(x[0]) // heads)).transpose(0, 1)
            for name in "qkv"
        )
        q, k = (turned(t, idx[0].float(), base) for t in (q, k))
        k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        attended = x + token_map.back(F.linear(out, w["self_attn.o_proj.weight"])[None])[0]
        z = norm(token_map.apply(attended[None])[0], w["post_attention_layernorm.weight"], eps)
        mlp = F.silu(F.linear(z, w["mlp.gate_proj.weight"])) * F.linear(z, w["mlp.up_proj.weight"])
        mlp = F.linear(mlp, w["mlp.down_proj.weight"])
        y = attended + token_map.of_branch("mlp").back(mlp[None])[0]
        close(y[there], case["out/hidden"][image][there], 1e-4)
