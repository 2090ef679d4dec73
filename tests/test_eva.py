"""timm's eva.py: zero reduction is exact, and rotary rows follow the tokens."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent, LayerNorm, RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from torch import Tensor

import tokenzoo
from tokenzoo.adapters.eva import model as eva
from tokenzoo.adapters.eva.rope import Rope, check_rebuild, rotations, waves_of
from tokenzoo.core.method import Method
from tokenzoo.core.tokens import Layout, Tokens, trace_assign
from tokenzoo.core.traits import Place, Traits
from tokenzoo.maps import FuseMap, KeepMap, MergeMap

try:  # timm >= 1.0.20
    from timm.layers.pos_embed_sincos import make_coords_dinov3
except ImportError:
    make_coords_dinov3 = None

KNOWN, POST_NORM = inspect.signature(Eva).parameters, inspect.signature(EvaBlockPostNorm).parameters
EVA02 = {"swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (3, 3), "mlp_ratio": 8 / 3}
DINOV3 = {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 3,
    "init_values": 1e-5,
    "qkv_bias": False,
    "dynamic_img_size": True,
    "use_fc_norm": False,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
ROPE_VIT = {"use_rot_pos_emb": True, "rope_grid_indexing": "xy", "rope_temperature": 10.0, "init_values": 1e-5}
PE = {
    "attn_type": "rope",
    "use_rot_pos_emb": True,
    "rope_grid_offset": 1.0,
    "rope_grid_indexing": "xy",
    "use_pre_transformer_norm": True,
    "use_fc_norm": False,
    "global_pool": "map",
    "attn_pool_num_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "eva02": EVA02,
    "eva02_separate_qkv_subnorm": {**EVA02, "qkv_fused": False, "scale_attn_inner": True},
    "eva02_dropped_class": {**EVA02, "class_token": False, "no_embed_class": True},
    "giant": {"qkv_fused": True, "global_pool": "avgmax"},
    "giant_layer_scale_token": {"init_values": 1e-5, "global_pool": "token"},
    "post_norm": {"use_post_norm": True, "swiglu_mlp": True, "use_rot_pos_emb": True},
    "post_norm_gated": {"use_post_norm": True, "gated_attn": True, "scale_attn_inner": True, "use_rot_pos_emb": True},
    "dinov3": DINOV3,
    "dinov3_swiglu_bias": {**DINOV3, "qkv_bias": True, "swiglu_mlp": True, "swiglu_align_to": 8, "global_pool": "max"},
    "mixed_registers": {**ROPE_VIT, "rope_type": "mixed", "num_reg_tokens": 2, "no_embed_class": True},
    "axial_no_class": {**ROPE_VIT, "num_reg_tokens": 1, "class_token": False, "no_embed_class": True},
    "pe_map": PE,
    "pe_no_class": {**PE, "class_token": False, "no_embed_class": True, "qkv_fused": False},
    "grouped_half": {**DINOV3, "attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "qk_norm": True},
    "gated": {"gated_attn": True, "use_rot_pos_emb": True, "init_values": 1e-5, "attn_only_layer_scale": True},
    "gated_grouped": {"attn_type": "rope", "num_kv_heads": 2, "num_heads": 4, "qkv_fused": False, "gated_attn": True},
    "mrope": {"rope_type": "mrope", "use_rot_pos_emb": True, "rope_mrope_section": (2, 3, 3), "qk_norm": True},
    "head": {"global_pool": "", "use_rot_pos_emb": True},
}
ROPES = ("eva02", "dinov3", "mixed_registers", "axial_no_class", "pe_map", "grouped_half", "mrope")


def build(config: str | dict[str, Any], size: tuple[int, int] = (32, 48), depth: int = 3, **extra: Any) -> Eva:
    """A tiny model with random weights, norms and layer scales; skips what the installed timm does not know."""
    options = {**(CONFIGS[config] if isinstance(config, str) else config), **extra}
    if "rope_type" not in KNOWN and options.get("rope_type") in ("cat", "mixed"):  # timm < 1.0.20
        options["rope_mixed_mode"] = options.pop("rope_type") == "mixed"
    gated = options.pop("gated_attn", False)  # an option of the layers that `Eva` does not pass on
    unknown = set(options) - set(KNOWN)
    if unknown or (gated and "gated" not in inspect.signature(EvaAttention).parameters):
        pytest.skip(f"timm {timm.__version__} does not know {sorted(unknown)} or gates")
    if options.get("use_post_norm") and "swiglu_align_to" in set(KNOWN) - set(POST_NORM):
        pytest.skip(f"timm {timm.__version__} cannot build post-norm blocks")
    torch.manual_seed(0)
    options = {"embed_dim": 32, "num_heads": 2, "num_classes": 7, "patch_size": 8, **options}
    model = Eva(img_size=size, depth=depth, **options)
    if gated:
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(32, 32)
    return randomise(model)


def randomise(model: Eva) -> Eva:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name:
                p.uniform_(0.1, 0.5)
            elif p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif name != "rope.freqs":
                p.copy_(torch.randn_like(p) * (1.0 if "token" in name or "pos" in name else p.shape[-1] ** -0.5))
    return model.eval()


def images(model: Eva, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


# ---- zero reduction


@pytest.mark.parametrize("config", CONFIGS)
def test_zero_reduction(config: str) -> None:
    model = build(config)
    x = images(model)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        tokenzoo.patch_model(model, "tome", r=0)
        assert type(model) is eva.ReducingEva
        torch.testing.assert_close(model.forward_features(x), features, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.forward_head(model.forward_tokens(x)), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", ["eva02_separate_qkv_subnorm", "grouped_half", "gated_grouped"])
def test_zero_reduction_without_fused_attention(config: str) -> None:
    model = build(config)
    for block in model.blocks:
        block.attn.fused_attn = False
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(tokenzoo.patch_model(model, "tome", r=0)(x), logits, atol=1e-5, rtol=0)


def test_separate_bias() -> None:
    model = build("eva02")
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(tokenzoo.patch_model(model, "tome", r=0)(x), logits, atol=1e-5, rtol=0)


def test_norms_and_head_width_of_the_attention_layer() -> None:
    """Options that `Eva` itself does not pass on."""
    model = build("eva02")
    for block in model.blocks:
        torch.manual_seed(3)
        block.attn = EvaAttention(
            32, num_heads=4, attn_head_dim=8, norm_layer=LayerNorm, qk_norm=False, scale_norm=True, qkv_fused=False
        )
        block.attn.q_norm, block.attn.k_norm = LayerNorm(8), LayerNorm(8)
    model.rope = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[4, 6])
    randomise(model)
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(tokenzoo.patch_model(model, "tome", r=0)(x), logits, atol=1e-5, rtol=0)
        assert model.blocks[0].shape()[:3] == (32, 4, 8)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch16_dinov3", 64),
        ("eva02_tiny_patch14_224", 56),
        ("vit_small_patch16_rope_224", 64),
        ("vit_small_patch16_rope_mixed_224", 64),
        ("vit_medium_patch16_rope_reg1_gap_256", 64),
        ("vit_pe_core_tiny_patch16_384", 64),
    ],
)
def test_zero_reduction_of_timm_models(name: str, size: int) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, depth=2, img_size=size))
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(tokenzoo.patch_model(model, "tome", r=0)(x), logits, atol=1e-5, rtol=0)
        assert tokenzoo.update_method(model, r=2)(x).isfinite().all()


@pytest.mark.parametrize("size", [(48, 32), (40, 64)])
@pytest.mark.parametrize("config", ["dinov3", "eva02", "mixed_registers"])
def test_dynamic_image_size(config: str, size: tuple[int, int]) -> None:
    model = build(config, dynamic_img_size=True)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(tokenzoo.patch_model(model, "tome", r=0)(x), logits, atol=1e-5, rtol=0)
        for positions in ("destination", "mean"):
            tokenzoo.unpatch_model(model)
            tokenzoo.patch_model(model, "tome", r=4, merged_positions=positions)
            patches = size[0] * size[1] // 64
            assert model.forward_tokens(x).num_patches == patches - 12


# ---- rotary rows follow the tokens: held against the unpatched model


@dataclass(frozen=True, kw_only=True)
class Given(Method):
    """Applies maps that the test gives, in order, one per block from `first` on."""

    maps: tuple[Any, ...] = ()
    first: int = 1
    where: str = "after"

    name = "given"
    traits = Traits(place=lambda m: Place(m.where))

    def strengths(self, depth: int) -> dict[int, int]:
        return {self.first + i: i for i in range(len(self.maps))}

    def tokens_out(self, n: int, step: Any, layout: Layout) -> int:
        return self.maps[step.strength].n_out

    def map(self, tokens: Tokens, signals: Any, step: Any) -> Any:
        return self.maps[step.strength]


def by_hand(model: Eva, x: Tensor, start: int, stop: int, table: Any = None, mask: Tensor | None = None) -> Tensor:
    """Blocks start..stop-1 of an unpatched model; `table(i)` overrides the rotary table of block i."""
    rope = model._pos_embed(model.patch_embed(images(model)))[1]
    for i in range(start, stop):
        rows = table(i) if table is not None else rope[i] if rope is not None and model.rope_mixed else rope
        x = model.blocks[i](x, rope=rows, attn_mask=mask)
    return x


def embedded(model: Eva, x: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(x))[0])


def shuffled_keep(model: Eva, batch: int, kept: int) -> Tensor:
    """Other patches in another order for every image, prefix first [B, num_prefix + kept]."""
    prefix, count = model.num_prefix_tokens, model.patch_embed.num_patches
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randperm(count, generator=generator)[:kept] + prefix for _ in range(batch)]
    return torch.cat([torch.arange(prefix).expand(batch, -1), torch.stack(rows)], dim=1)


@pytest.mark.parametrize("positions", ["destination", "mean"])
@pytest.mark.parametrize("where", ["before", "queries", "between", "after"])
@pytest.mark.parametrize("config", ROPES)
def test_kept_tokens_equal_masked_model(config: str, where: str, positions: str) -> None:
    """Keeping tokens is the same as masking the keys of the others, only with right rotations."""
    model = build(config, depth=4)
    plain, x = copy.deepcopy(model), images(model)
    idx = shuffled_keep(model, 2, 9)
    length = model.num_prefix_tokens + 24
    gone = torch.ones(2, length, dtype=torch.bool).scatter(1, idx, False)
    mask = torch.zeros(2, 1, length, length).masked_fill(gone[:, None, None, :], float("-inf"))
    with torch.no_grad():
        first = 1 if where == "before" else 2  # block from which the tokens are missing
        full = by_hand(plain, embedded(plain, x), 0, first)
        full = plain.norm(by_hand(plain, full, first, 4, mask=mask))
        expected = full.gather(1, idx.unsqueeze(-1).expand(-1, -1, 32))
        method = Given(maps=(KeepMap(idx, length),), where=where)
        tokenzoo.patch_model(model, method, merged_positions=positions)
        torch.testing.assert_close(model.forward_features(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", ["eva02", "mixed_registers"])
def test_two_reductions_compose(config: str) -> None:
    model = build(config, depth=4)
    plain, x = copy.deepcopy(model), images(model)
    prefix, length = model.num_prefix_tokens, model.num_prefix_tokens + 24
    idx = shuffled_keep(model, 2, 9)
    again = torch.cat([torch.arange(prefix), torch.tensor([7, 2, 5, 0]) + prefix]).expand(2, -1)
    mask1, mask2 = (torch.full((2, 1, length, length), float("-inf")) for _ in range(2))
    final = idx.gather(1, again)
    for b in range(2):
        mask1[b, :, :, idx[b]] = 0
        mask2[b, :, :, final[b]] = 0
    with torch.no_grad():
        full = by_hand(plain, embedded(plain, x), 0, 2)
        full = by_hand(plain, by_hand(plain, full, 2, 3, mask=mask1), 3, 4, mask=mask2)
        expected = plain.norm(full).gather(1, final.unsqueeze(-1).expand(-1, -1, 32))
        tokenzoo.patch_model(model, Given(maps=(KeepMap(idx, length), KeepMap(again, 9 + prefix))))
        torch.testing.assert_close(model.forward_features(x), expected, atol=1e-4, rtol=0)


def rows_of(model: Eva, patches: list[int | None]) -> Callable[[int], Tensor]:
    """Rotary table of block i with the rows of the patches named; None rotates nothing."""

    def table(i: int) -> Tensor:
        rope = model._pos_embed(model.patch_embed(images(model)))[1]
        rope = rope[i] if model.rope_mixed else rope
        still = torch.cat([torch.zeros(rope.shape[-1] // 2), torch.ones(rope.shape[-1] // 2)])
        rows = [still.expand_as(rope[..., 0, :]) if p is None else rope[..., p, :] for p in patches]
        return torch.stack(rows, dim=-2)

    return table


@pytest.mark.parametrize("config", ROPES)
def test_merged_tokens(config: str) -> None:
    """Patches (0, 0) and (0, 1) merge, then (0, 2) joins them: destination (0, 0), mass-weighted mean (0, 1)."""
    model = build(config, depth=4)
    plain, x = copy.deepcopy(model), images(model)
    prefix, length = model.num_prefix_tokens, model.num_prefix_tokens + 24

    def merge(source: int, n: int) -> MergeMap:
        order = torch.tensor([i for i in range(n) if i != source]).expand(2, -1)
        return MergeMap(order, torch.tensor([[source]] * 2), torch.tensor([[prefix]] * 2), n)

    method = Given(maps=(merge(prefix + 1, length), merge(prefix + 1, length - 1)))
    with torch.no_grad():
        start = by_hand(plain, embedded(plain, x), 0, 2)
        once = torch.cat([start[:, :prefix], start[:, prefix : prefix + 2].mean(1, True), start[:, prefix + 2 :]], 1)
        rest = list(range(3, 24))
        for positions, patch in (("destination", 0), ("mean", 1)):
            tokenzoo.patch_model(model, method, merged_positions=positions)
            out = model.forward_tokens(x, trace=True)
            if positions == "mean":  # half a patch: no row of the table to compare with in block 2
                middle = out_after(model, x, 2)
            else:
                middle = by_hand(plain, once, 2, 3, rows_of(plain, [0, 2, *rest]))
                pair = middle[:, prefix : prefix + 2].mean(1, True)
                middle = torch.cat([middle[:, :prefix], pair, middle[:, prefix + 2 :]], 1)
            expected = plain.norm(by_hand(plain, middle, 3, 4, rows_of(plain, [patch, *rest])))
            torch.testing.assert_close(out.x, expected, atol=1e-4, rtol=0)
            went = trace_assign(out.trace, 2, length, x.device)[0, prefix : prefix + 4] - prefix
            assert went.tolist() == [0, 0, 0, 1]
            tokenzoo.unpatch_model(model)


def out_after(model: Eva, x: Tensor, block: int) -> Tensor:
    """Values after a block of a patched model."""
    return [t.x for t in model.walk(x, None)][block + 1]


@pytest.mark.parametrize("config", ROPES)
def test_token_without_a_place(config: str) -> None:
    """The first of rows of seven patches fuses but for its middle: no rotation, or that of the mean (0, 3)."""
    model = build(config, size=(32, 56), depth=3)
    plain, x = copy.deepcopy(model), images(model)
    prefix, length = model.num_prefix_tokens, model.num_prefix_tokens + 28
    left_out = torch.zeros(2, length, dtype=torch.bool)
    left_out[:, [prefix + p for p in (0, 1, 2, 4, 5, 6)]] = True
    idx = (~left_out[0]).nonzero().T.expand(2, -1)
    method = Given(maps=(FuseMap(idx, left_out.float() / 6, left_out),))
    with torch.no_grad():
        start = by_hand(plain, embedded(plain, x), 0, 2)
        fused = torch.cat([start[:, idx[0]], start[:, left_out[0]].mean(1, True)], dim=1)
        kept = [3, *range(7, 28)]
        for positions, patch in (("destination", None), ("mean", 3)):
            tokenzoo.patch_model(model, method, merged_positions=positions)
            expected = plain.norm(by_hand(plain, fused, 2, 3, rows_of(plain, [*kept, patch])))
            torch.testing.assert_close(model.forward_features(x), expected, atol=1e-4, rtol=0)
            tokenzoo.unpatch_model(model)


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (5, 3)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["cat", "cat_half", "cat_offset", "dinov3", "dinov3_interleaved", "mixed", "mrope"])
def test_rebuilt_table_equals_timms(kind: str, dynamic: bool, grid: tuple[int, int], indexing: str) -> None:
    options: dict[str, Any] = {"rope_type": kind.split("_")[0], "use_rot_pos_emb": True, "dynamic_img_size": dynamic}
    options["rope_grid_indexing"] = indexing
    if kind == "cat_half" or kind == "dinov3":
        options["rope_rotate_half"] = True
    if kind == "cat_offset":
        options |= {"rope_grid_offset": 1.0, "ref_feat_shape": (3, 7)}
    if kind == "mrope":
        options["rope_mrope_section"] = (2, 3, 3)
        if indexing == "xy":
            pytest.skip("timm's MRope is 'ij' only")
    model = build(options, size=(8 * grid[0], 8 * grid[1]))
    if "dinov3" in kind and indexing == "xy" and make_coords_dinov3(1, 2, grid_indexing="xy")[0, 0] == 0:
        with pytest.raises(ValueError, match="installed timm builds"):  # older ones swap no channels
            check_rebuild(model.rope, grid)
        return
    own = model.rope.get_embed(grid).detach()
    waves = waves_of(model.rope, grid)
    coords = torch.tensor([(r, c) for r in range(grid[0]) for c in range(grid[1])]).float()
    coords = torch.cat([torch.full((2, 2), 9.0), coords])[None]  # what prefix tokens hold must not matter
    for i in range(3):
        one = waves._replace(freqs=waves.freqs[:, i]) if kind == "mixed" else waves
        table = own[i] if kind == "mixed" else own
        rebuilt = rotations(one, coords, num_prefix=2)[0].detach()
        torch.testing.assert_close(rebuilt[:, 2:], table.expand_as(rebuilt[:, 2:]), atol=1e-5, rtol=0)
        assert rebuilt[:, :2].equal(torch.tensor([0.0, 1.0]).repeat_interleave(16).expand_as(rebuilt[:, :2]))
    check_rebuild(model.rope, grid)


@pytest.mark.parametrize("config", ["eva02", "mixed_registers"])
def test_rows(config: str) -> None:
    """Gathered rows against a loop."""
    model = build(config)
    prefix = model.num_prefix_tokens
    table = model._pos_embed(model.patch_embed(images(model)))[1].detach()
    table = table[1] if model.rope_mixed else table
    positions = torch.tensor([[*range(prefix), prefix + 5, -1, prefix + 23], [*range(prefix), prefix, prefix, -1]])
    tokens = Tokens(torch.zeros(2, prefix + 3, 32), Layout(prefix, True, (4, 6)), positions=positions)
    rows = Rope.of(table, prefix).rows(tokens)
    heads = rows.shape[1]
    assert heads == (2 if model.rope_mixed else 1)
    for b in range(2):
        for n, position in enumerate(positions[b].tolist()):
            still = torch.tensor([0.0, 1.0]).repeat_interleave(16).expand(heads, -1)
            expected = still if position < prefix else table[..., position - prefix, :].expand(heads, -1)
            assert rows[b, :, n].equal(expected)


def test_mixed_frequencies_learn() -> None:
    model = build("mixed_registers").train()
    plain, x = copy.deepcopy(model), images(model)
    plain(x).square().sum().backward()
    tokenzoo.patch_model(model, "tome", r=0)
    model(x).square().sum().backward()
    torch.testing.assert_close(model.rope.freqs.grad, plain.rope.freqs.grad, atol=1e-4, rtol=1e-4)
    for positions in ("destination", "mean"):
        tokenzoo.unpatch_model(model)
        tokenzoo.patch_model(model, "tome", r=3, merged_positions=positions)
        model.zero_grad()
        model(x).square().sum().backward()
        assert (model.rope.freqs.grad.abs().amax(dim=(2, 3)) > 0).all()


# ---- the model around the blocks


@pytest.mark.parametrize("config", ["dinov3", "mixed_registers", "pe_map"])
def test_intermediates(config: str) -> None:
    model = build(config)
    x = images(model)
    with torch.no_grad():
        plain = model.forward_intermediates(x, indices=[0, 2], return_prefix_tokens=True, intermediates_only=True)
        tokenzoo.patch_model(model, "tome", r=0)
        same = model.forward_intermediates(x, indices=[0, 2], return_prefix_tokens=True, intermediates_only=True)
        torch.testing.assert_close(same, plain, atol=1e-5, rtol=0)
        tokenzoo.update_method(model, r=3)
        last, maps = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
        assert [m.shape for m in maps] == [spatial.shape for spatial, _ in plain] == [(2, 32, 4, 6)] * 2
        # attention pooling weighs tokens by size: its features are all tokens, in their places
        gone = 0 if config == "pe_map" else 9
        assert last.shape[1] == model.num_prefix_tokens + 24 - gone
        lists = model.forward_intermediates(x, indices=[0, 2], output_fmt="NLC", intermediates_only=True)
        assert [y.shape[1] for y in lists] == [21, 15]
        assert model.prune_intermediate_layers([1]) == [1] and len(model.blocks) == 2
        assert model.forward_features(x).shape[1] == model.num_prefix_tokens + 18


def test_map_pooling_weighs_tokens() -> None:
    """Two equal tokens merged into one of size 2 pool like the two."""
    torch.manual_seed(0)
    model = tokenzoo.patch_model(build("pe_map"), "tome", r=1)
    x = torch.randn(2, 6, 32)
    x[:, 3] = x[:, 5]
    layout = Layout(1, True, (1, 5), track_size=True)
    order, one = torch.arange(5).expand(2, -1), torch.full((2, 1), 5)
    merged = Tokens(x, layout).reduce(MergeMap(order, one, one - 2, 6))
    assert type(model.attn_pool) is AttentionPoolLatent
    with torch.no_grad():
        torch.testing.assert_close(model.pool(merged), model.attn_pool(x), atol=1e-5, rtol=0)
        padded = Tokens(torch.cat([x, x[:, :2]], 1), layout, valid=(torch.arange(8) < 6).expand(2, -1))
        torch.testing.assert_close(model.pool(padded), model.attn_pool(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", ["eva02", "mixed_registers"])
def test_unpatch_restores(config: str) -> None:
    model = build(config)
    x, keys = images(model), list(model.state_dict())
    with torch.no_grad():
        logits = model(x)
        tokenzoo.patch_model(model, "tome", r=3)
        assert list(model.state_dict()) == keys
        assert not model(x).equal(logits)
        clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert clone(x).equal(model(x))
        tokenzoo.unpatch_model(model)
        assert type(model) is Eva and model(x).equal(logits)


@pytest.mark.parametrize("positions", ["destination", "mean"])
@pytest.mark.parametrize("config", ["dinov3", "mixed_registers"])
def test_checkpointing(config: str, positions: str) -> None:
    model = tokenzoo.patch_model(build(config), "tome", r=3, merged_positions=positions).train()
    other, x = copy.deepcopy(model), images(model)
    other.set_grad_checkpointing()
    for m in (model, other):
        m(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize(("config", "positions"), [("dinov3", "destination"), ("mixed_registers", "mean")])
def test_compile(config: str, positions: str) -> None:
    model = tokenzoo.patch_model(build(config, depth=2), "tome", r=3, merged_positions=positions)
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=0)


def test_threads() -> None:
    model = tokenzoo.patch_model(build("mixed_registers"), "tome", r=3, merged_positions="mean")
    batches = [torch.randn(2, 3, 32, 48) for _ in range(8)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    alone = [run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(a.equal(b) for a, b in zip(alone, pool.map(run, batches)))


@pytest.mark.parametrize("config", ["eva02", "dinov3", "mixed_registers"])
def test_images_do_not_meet(config: str) -> None:
    model = tokenzoo.patch_model(build(config), "tome", r=4)
    x = images(model, 3)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x[1:2]), together[1:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["destination", "mean"])
def test_low_precision(dtype: torch.dtype, positions: str) -> None:
    model = tokenzoo.patch_model(build("dinov3"), "tome", r=3, merged_positions=positions)
    x = images(model)
    with torch.no_grad():
        assert model.to(dtype)(x.to(dtype)).dtype == dtype
        model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).isfinite().all()


def test_attention_mask_in_original_positions() -> None:
    """Patches that are masked from the start leave the others as they are without them."""
    model = build("eva02")
    tokenzoo.patch_model(model, "tome", r=3)
    x = images(model)
    mask = torch.ones(25, 25, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(x, attn_mask=mask), model(x), atol=1e-5, rtol=0)
        mask[:, 7] = False
        assert not model(x, attn_mask=mask).allclose(model(x), atol=1e-4)


@pytest.mark.parametrize("config", ["eva02", "mixed_registers"])
def test_blocks_called_by_hand(config: str) -> None:
    """Blocks take timm's own table and plain tensors; the last one hands a tensor back."""
    model = build(config)
    x = images(model)
    with torch.no_grad():
        tokenzoo.patch_model(model, "tome", r=3)
        y = by_hand(model, embedded(model, x), 0, 3)
        assert isinstance(y, Tensor)
        torch.testing.assert_close(model.norm(y), model.forward_features(x), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="rope has shape"):
            model.blocks[0](y, rope=torch.zeros(2, 1, 24, 32))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_projections_in_parts(config: str, separate: bool) -> None:
    """Queries and keys alone, and values alone, are those of the whole projection."""
    model = tokenzoo.patch_model(build(config, depth=1), "tome", r=1)
    block, prefix = model.blocks[0], model.num_prefix_tokens
    if separate and getattr(block.attn, "q_bias", None) is None:
        pytest.skip("no separate bias")
    block.attn.qkv_bias_separate = separate
    with torch.no_grad():
        rope = model.rope_of(model.embed(images(model))[1], 0)
        tokens = Tokens(torch.randn(2, prefix + 24, 32), Layout(prefix, True, (4, 6)))
        whole, part = block.heads(tokens, rope), block.query_keys(tokens, rope)
        torch.testing.assert_close((part.q, part.k), (whole.q, whole.k), atol=1e-6, rtol=0)
        torch.testing.assert_close(block.values(tokens.x), whole.v, atol=1e-6, rtol=0)
        assert part.v is None and whole.v.shape == whole.k.shape


@pytest.mark.parametrize("config", CONFIGS)
def test_macs_cover_every_weight(config: str) -> None:
    model = build(config, depth=1)
    weights = sum(m.weight.numel() for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear))
    tokenzoo.patch_model(model, "tome", r=1)
    qk, v, pair, out, mlp = model.blocks[0].macs()
    assert qk + v + out + mlp == weights
    assert pair == 2 * model.blocks[0].attn.proj.in_features


# ---- refusals


class OtherAttention(EvaAttention):
    """Not exactly known."""


class OtherRope(RotaryEmbeddingCat):
    """Not exactly known."""


def test_refuses_by_name() -> None:
    model = build("eva02")
    model.blocks[1].attn.__class__ = OtherAttention
    with pytest.raises(TypeError, match="blocks.1 attends with .*OtherAttention"):
        tokenzoo.patch_model(model, "tome", r=1)
    with pytest.raises(ValueError, match="Eva.patch_drop"):
        tokenzoo.patch_model(build("eva02", patch_drop_rate=0.5), "tome", r=1)
    model = tokenzoo.patch_model(build("eva02"), "tome", r=1)
    with pytest.raises(ValueError, match="is_causal"):
        model(images(model), is_causal=True)


def refused(model: Eva, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenzoo.patch_model(model, "tome", r=1, merged_positions="mean")(images(model))


def test_refuses_to_rebuild_by_name() -> None:
    model = build("eva02")
    model.rope.__class__ = OtherRope
    refused(model, "cannot rebuild the tables of OtherRope")
    model = build("eva02")
    model.rope = RotaryEmbeddingCat(16, in_pixels=True, feat_shape=[4, 6])
    refused(model, "'pixel' grid")


def test_refuses_random_coordinates() -> None:
    model = build("dinov3", rope_rescale_coords=2.0, rope_shift_coords=0.5)
    refused(model, "shift_coords': 0.5, 'rescale_coords': 2.0")


def test_refuses_tables_that_timm_builds_otherwise() -> None:
    model = build("eva02")
    with torch.no_grad():
        model.rope.pos_embed.mul_(1.5)
    with pytest.raises(ValueError, match="installed timm builds RotaryEmbeddingCat"):
        check_rebuild(model.rope, (4, 6))
