"""Files in the layouts that authors release: Segmenter, DINOv2's heads, EoMT, DToP."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from dense_models import TINY, dtop, shaken
from torch import nn

import tokenzoo
from tokenzoo.dense import EoMT, load_dinov2_linear, load_dtop, load_eomt, load_official_segmenter
from tokenzoo.dense.official import resize_positions

# ---- Segmenter in the authors' layout, against a forward pass written from the state dict


def slow_block(x: torch.Tensor, state: dict, name: str, heads: int) -> torch.Tensor:
    def norm(z, key):
        mean, var = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, correction=0)
        return (z - mean) / (var + 1e-5).sqrt() * state[f"{name}.{key}.weight"] + state[f"{name}.{key}.bias"]

    def linear(z, key):
        return z @ state[f"{name}.{key}.weight"].T + state[f"{name}.{key}.bias"]

    q, k, v = linear(norm(x, "norm1"), "attn.qkv").chunk(3, dim=-1)
    width, parts = x.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weights = (q[..., part] @ k[..., part].transpose(-1, -2) / width**0.5).softmax(-1)
        parts.append(weights @ v[..., part])
    x = x + linear(torch.cat(parts, -1), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def slow_segmenter(state: dict, images: torch.Tensor, patch: int, heads: int, distilled: bool) -> torch.Tensor:
    """Class maps [B, K, h, w] by the description of the official code."""
    x = F.conv2d(images, state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"], patch)
    grid, prefix = x.shape[-2:], [state[f"encoder.{name}_token"] for name in ("cls", "dist")[: 1 + distilled]]
    front = torch.cat(prefix, 1).expand(len(images), -1, -1)
    x = torch.cat([front, x.flatten(2).transpose(1, 2)], 1) + state["encoder.pos_embed"]
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.blocks."))
    for i in range(depth):
        x = slow_block(x, state, f"encoder.blocks.{i}", heads)
    width = x.shape[-1:]
    x = F.layer_norm(x, width, state["encoder.norm.weight"], state["encoder.norm.bias"], 1e-5)[:, front.shape[1] :]
    if "decoder.head.weight" in state:
        x = x @ state["decoder.head.weight"].T + state["decoder.head.bias"]
    else:
        n, classes = x.shape[1], state["decoder.cls_emb"]
        x = x @ state["decoder.proj_dec.weight"].T + state["decoder.proj_dec.bias"]
        x = torch.cat([x, classes.expand(len(x), -1, -1)], 1)
        x = slow_block(x, state, "decoder.blocks.0", max(1, width[0] // 64))
        x = F.layer_norm(x, width, state["decoder.decoder_norm.weight"], state["decoder.decoder_norm.bias"], 1e-5)
        patches, classes = x[:, :n] @ state["decoder.proj_patch"], x[:, n:] @ state["decoder.proj_classes"]
        patches, classes = (t / t.norm(dim=-1, keepdim=True) for t in (patches, classes))
        x = patches @ classes.transpose(1, 2)
        x = F.layer_norm(x, x.shape[-1:], state["decoder.mask_norm.weight"], state["decoder.mask_norm.bias"], 1e-5)
    return x.transpose(1, 2).unflatten(2, grid)


def variant_of(decoder: str, distilled: bool, size=(32, 48), classes: int = 5) -> dict:
    head = {"name": decoder, "drop_path_rate": 0.0, "dropout": 0.1, "n_layers": 1}
    return {
        "net_kwargs": {
            "backbone": "some", "image_size": size, "patch_size": 8, "d_model": 32, "n_heads": 2, "n_layers": 2,
            "n_cls": classes, "normalization": "deit" if distilled else "vit", "distilled": distilled, "decoder": head,
            "drop_path_rate": 0.1, "dropout": 0.0,
        },
        "dataset_kwargs": {"dataset": "ade20k", "normalization": "deit" if distilled else "vit"},
        "inference_kwargs": {"im_size": 32, "window_size": 32, "window_stride": 24},
    }  # fmt: skip


def official_state(decoder: str, distilled: bool, grid=(4, 6), classes: int = 5) -> dict[str, torch.Tensor]:
    """Random weights in the official names and shapes, written out here and not taken from the package."""
    torch.manual_seed(1)
    dim, prefix = 32, 1 + distilled

    def block(name):
        shapes = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
        found = {f"{name}.{k}.weight": torch.randn(s) * 0.15 for k, s in shapes.items()}
        found |= {f"{name}.{k}.bias": torch.randn(s[0]) * 0.15 for k, s in shapes.items()}
        for norm in ("norm1", "norm2"):
            found |= {f"{name}.{norm}.weight": 1 + 0.2 * torch.randn(dim), f"{name}.{norm}.bias": torch.randn(dim)}
        return found

    state = {
        "encoder.cls_token": torch.randn(1, 1, dim),
        "encoder.pos_embed": torch.randn(1, prefix + grid[0] * grid[1], dim),
        "encoder.patch_embed.proj.weight": torch.randn(dim, 3, 8, 8) * 0.1,
        "encoder.patch_embed.proj.bias": torch.randn(dim),
        **block("encoder.blocks.0"),
        **block("encoder.blocks.1"),
        "encoder.norm.weight": torch.randn(dim),
        "encoder.norm.bias": torch.randn(dim),
        "encoder.head.weight": torch.randn(1000, dim),
        "encoder.head.bias": torch.randn(1000),
    }
    if distilled:
        state["encoder.dist_token"] = torch.randn(1, 1, dim)
        state |= {"encoder.head_dist.weight": torch.randn(1000, dim), "encoder.head_dist.bias": torch.randn(1000)}
    if decoder == "linear":
        return state | {"decoder.head.weight": torch.randn(classes, dim), "decoder.head.bias": torch.randn(classes)}
    return state | {
        "decoder.cls_emb": torch.randn(1, classes, dim),
        "decoder.proj_dec.weight": torch.randn(dim, dim) * 0.2,
        "decoder.proj_dec.bias": torch.randn(dim),
        **block("decoder.blocks.0"),
        "decoder.decoder_norm.weight": torch.randn(dim),
        "decoder.decoder_norm.bias": torch.randn(dim),
        "decoder.proj_patch": torch.randn(dim, dim),
        "decoder.proj_classes": torch.randn(dim, dim),
        "decoder.mask_norm.weight": torch.randn(classes),
        "decoder.mask_norm.bias": torch.randn(classes),
    }


def write_official(folder: Path, decoder: str = "linear", distilled: bool = False, **more) -> Path:
    """A folder as released: checkpoint.pth with optimizer and all, variant.yml with Python tuples."""
    state, variant = official_state(decoder, distilled), variant_of(decoder, distilled, **more)
    saved = {"model": state, "optimizer": {"lr": 0.1}, "lr_scheduler": {}, "n_cls": 5, "epoch": 3}
    torch.save(saved, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(yaml.dump(variant))
    return folder


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@torch.no_grad()
def test_official_checkpoint(tmp_path, decoder, distilled):
    write_official(tmp_path, decoder, distilled)
    assert "python/tuple" in (tmp_path / "variant.yml").read_text()
    model = load_official_segmenter(tmp_path)
    assert not model.training and (model.window, model.stride, model.num_classes) == (32, 24, 5)
    assert model.mean == ((0.485, 0.456, 0.406) if distilled else (0.5, 0.5, 0.5))
    assert model.encoder.num_prefix_tokens == 1 + distilled
    images = torch.randn(2, 3, 32, 48)
    expected = slow_segmenter(official_state(decoder, distilled), images, 8, 2, distilled)
    torch.testing.assert_close(model.class_maps(images), expected, atol=1e-4, rtol=1e-4)
    # the parts one by one, and another window than the training crop
    same = load_official_segmenter(tmp_path / "checkpoint.pth", variant_of(decoder, distilled))
    assert torch.equal(same(images), model(images))
    other = load_official_segmenter(tmp_path, img_size=(40, 24))
    state = official_state(decoder, distilled)
    state["encoder.pos_embed"] = resize_positions(state["encoder.pos_embed"], 1 + distilled, (4, 6), (5, 3))
    images = torch.randn(2, 3, 40, 24)
    expected = slow_segmenter(state, images, 8, 2, distilled)
    torch.testing.assert_close(other.class_maps(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("new", [(4, 6), (7, 9), (2, 3), (5, 4)])
def test_positions_are_resized_bilinearly(new):
    positions, old, prefix = torch.randn(1, 2 + 24, 5), (4, 6), 2
    grid = positions[0, prefix:].reshape(*old, 5)
    expected = torch.empty(*new, 5)
    for i in range(new[0]):
        for j in range(new[1]):  # pixel centres, edges repeated
            y = max((i + 0.5) * old[0] / new[0] - 0.5, 0.0)
            x = max((j + 0.5) * old[1] / new[1] - 0.5, 0.0)
            top, left = int(y), int(x)
            below, right = min(top + 1, old[0] - 1), min(left + 1, old[1] - 1)
            v, h = y - top, x - left
            upper = (1 - h) * grid[top, left] + h * grid[top, right]
            lower = (1 - h) * grid[below, left] + h * grid[below, right]
            expected[i, j] = (1 - v) * upper + v * lower
    out = resize_positions(positions, prefix, old, new)
    assert torch.equal(out[:, :prefix], positions[:, :prefix])
    torch.testing.assert_close(out[0, prefix:], expected.flatten(0, 1))
    with pytest.raises(ValueError, match="26 rows, not 1 and 4 x 6"):
        resize_positions(positions, 1, old, new)


def test_official_errors(tmp_path):
    folder = write_official(tmp_path)
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    text = (folder / "variant.yml").read_text()

    def refuses(match: str, state=None, variant=None, saved=saved):
        torch.save({**saved, "model": state} if state is not None else saved, folder / "checkpoint.pth")
        (folder / "variant.yml").write_text(text if variant is None else variant)
        with pytest.raises(ValueError, match=match):
            load_official_segmenter(folder)

    state = saved["model"]
    refuses("missing: decoder.head.bias", {k: v for k, v in state.items() if k != "decoder.head.bias"})
    refuses("left over: decoder.extra", {**state, "decoder.extra": torch.zeros(1)})
    refuses(r"decoder.head.weight \(7, 32\) instead of \(5, 32\)", {**state, "decoder.head.weight": torch.zeros(7, 32)})
    refuses("mmsegmentation", {"backbone.layers.0.ln1.weight": torch.zeros(1)})
    refuses("pos_embed has 25 rows", variant=yaml.dump(variant_of("linear", False, size=(64, 64))))
    refuses("decoder 'upernet' is unknown", variant=yaml.dump(variant_of("upernet", False)))
    refuses("holds no state dict", saved={"epoch": 3})
    broken = variant_of("linear", False)
    del broken["net_kwargs"]["d_model"]
    refuses("net_kwargs lacks d_model", variant=yaml.dump(broken))
    broken = variant_of("linear", False)
    broken["dataset_kwargs"]["normalization"] = "clip"
    refuses("normalization 'clip' is unknown", variant=yaml.dump(broken))
    refuses("not valid YAML", variant=f"net_kwargs: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists(), "code in the YAML ran"
    refuses("holds list", variant="- 1")
    (folder / "variant.yml").write_text(text)
    torch.save({"model": state, "hook": Path("x")}, folder / "checkpoint.pth")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        load_official_segmenter(folder)
    (folder / "checkpoint.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        load_official_segmenter(folder)
    (folder / "variant.yml").unlink()
    with pytest.raises(ValueError, match="variant.yml does not exist"):
        load_official_segmenter(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_official_segmenter(folder / "other.pth", variant_of("linear", False))


# ---- the others


@pytest.mark.parametrize("layers", [1, 2, (0, 2)])
@torch.no_grad()
def test_dinov2_heads(tmp_path, layers):
    backbone = shaken(TINY(reg_tokens=2, no_embed_class=True, init_values=0.3))
    taken = {1: [2], 2: [1, 2], (0, 2): [0, 2]}[layers]
    torch.manual_seed(0)
    width = 32 * len(taken)
    bn = {"weight": torch.randn(width), "bias": torch.randn(width), "running_mean": torch.randn(width),
          "running_var": torch.rand(width) + 0.5, "num_batches_tracked": torch.tensor(3)}  # fmt: skip
    conv = {"weight": torch.randn(5, width, 1, 1), "bias": torch.randn(5)}
    state = {f"decode_head.bn.{k}": v for k, v in bn.items()}
    state |= {f"decode_head.conv_seg.{k}": v for k, v in conv.items()}
    torch.save({"state_dict": {**state, "meta.unrelated": torch.zeros(1)}}, tmp_path / "head.pth")
    model = load_dinov2_linear(backbone, tmp_path / "head.pth", layers)
    assert model.num_classes == 5 and model.pad == "center" and model.mean == (0.485, 0.456, 0.406)
    images = torch.randn(2, 3, 32, 48)
    seen = []
    hooks = [backbone.blocks[i].register_forward_hook(lambda m, a, out: seen.append(out)) for i in taken]
    maps = model.class_maps(images)
    for hook in hooks:
        hook.remove()
    features = torch.cat([backbone.norm(x)[:, 3:] for x in seen], -1).transpose(1, 2).unflatten(2, (4, 6))
    scale = bn["weight"] / (bn["running_var"] + 1e-5).sqrt()
    normed = (features - bn["running_mean"][:, None, None]) * scale[:, None, None] + bn["bias"][:, None, None]
    torch.testing.assert_close(maps, F.conv2d(normed, **conv), atol=1e-4, rtol=1e-4)
    assert model(torch.randn(2, 3, 35, 30)).shape == (2, 5, 35, 30)
    assert model.head_macs(24, (4, 6)) == 24 * 5 * width
    plain = model(images)
    with tokenzoo.patched(model, "tome", r=0):
        torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, "tome", r=3):
        assert not torch.allclose(model(images), plain, atol=1e-3) and model(images).shape == plain.shape
    with pytest.raises(ValueError, match=f"reads {width} channels, but 3 layers"):
        load_dinov2_linear(backbone, tmp_path / "head.pth", 3)
    torch.save({"state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a linear segmentation head"):
        load_dinov2_linear(backbone, tmp_path / "other.pth")


@torch.no_grad()
def test_eomt_checkpoint(tmp_path):
    model = shaken(EoMT(TINY(), 5, num_q=4, num_blocks=2))
    state = {f"network.{k}": v for k, v in model.state_dict().items()} | {"criterion.empty_weight": torch.ones(6)}
    torch.save(state, tmp_path / "model.bin")
    loaded = load_eomt(TINY(), tmp_path / "model.bin")
    images = torch.randn(2, 3, 30, 45)  # no whole patches
    assert loaded(images).shape == (2, 5, 30, 45)
    assert torch.equal(loaded(images), model(images)) and loaded.num_blocks == 2 and not loaded.training
    assert loaded.mean == pytest.approx(model.encoder.pixel_mean.flatten().tolist()) and len(loaded.std) == 3
    for drop in ("network.attn_mask_probs", "network.encoder.pixel_mean", "network.encoder.pixel_std"):
        state.pop(drop)
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="pass num_blocks"):
        load_eomt(TINY(), tmp_path / "model.bin")
    torch.testing.assert_close(load_eomt(TINY(), tmp_path / "model.bin", 2)(images), model(images))
    with pytest.raises(ValueError, match=r"encoder.backbone.pos_embed \(1, 17, 32\) instead of \(1, 65, 32\)"):
        load_eomt(TINY(img_size=64), tmp_path / "model.bin", 2)
    with pytest.raises(ValueError, match="left over: encoder.backbone.blocks.2"):
        load_eomt(TINY(depth=2), tmp_path / "model.bin", 2)
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="it lacks .*q.weight"):
        load_eomt(TINY(), tmp_path / "other.pth")


@torch.no_grad()
def test_dtop_checkpoint(tmp_path):
    """An encoder in mmsegmentation's names, written with torch's own attention module."""
    model, state = dtop(), {}
    for i, block in enumerate(model.backbone.blocks):
        attention = nn.MultiheadAttention(32, 2, batch_first=True)
        attention.in_proj_weight.copy_(block.attn.qkv.weight)
        attention.in_proj_bias.copy_(block.attn.qkv.bias)
        attention.out_proj.load_state_dict(block.attn.proj.state_dict())
        z = torch.randn(2, 5, 32)
        torch.testing.assert_close(attention(z, z, z)[0], block.attn(z), atol=1e-5, rtol=1e-4)
        parts = {"attn.attn": attention, "ln1": block.norm1, "ln2": block.norm2, "ffn.layers.0.0": block.mlp.fc1,
                 "ffn.layers.1": block.mlp.fc2}  # fmt: skip
        for name, part in parts.items():
            state |= {f"backbone.layers.{i}.{name}.{k}": v for k, v in part.state_dict().items()}
    projection = model.backbone.patch_embed.proj.state_dict()
    state |= {f"backbone.patch_embed.projection.{k}": v for k, v in projection.items()}
    state |= {f"backbone.{k}": getattr(model.backbone, k).detach() for k in ("cls_token", "pos_embed")}
    state |= {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "iter.pth")
    loaded = load_dtop(TINY(), tmp_path / "iter.pth", (0, 2), 2, 0.3)
    images = torch.randn(2, 3, 32, 48)
    loaded.context = 2
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match="no auxiliary_head.1"):
        load_dtop(TINY(), tmp_path / "iter.pth", (0, 1, 2), 2)
    state.pop("backbone.layers.1.ln1.weight")
    torch.save({"state_dict": state}, tmp_path / "iter.pth")
    with pytest.raises(ValueError, match="missing: backbone.blocks.1.norm1.weight"):
        load_dtop(TINY(), tmp_path / "iter.pth", (0, 2), 2)
