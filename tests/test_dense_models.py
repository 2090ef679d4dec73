"""Segmentation models: sizes, padding, files of our own, costs, and errors that say what is wrong."""

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_models import TINY, shaken, traced

import tokenzoo
from tokenzoo.dense import (
    BNLinearHead,
    LayersSegmenter,
    LinearHead,
    MaskTransformer,
    Segmenter,
    create_segmenter,
    load_segmenter,
    save_segmenter,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


# ---- sizes


@pytest.mark.parametrize("size", [(30, 45), (32, 32), (17, 64)])
@torch.no_grad()
def test_sizes_that_no_patch_divides(size):
    model = shaken(create_segmenter("vit_tiny_patch16_224", 4, "mask", SMALL | {"patch_size": 8}))
    images = torch.randn(2, 3, *size)
    whole = -size[0] % 8, -size[1] % 8
    padded = torch.cat([images, torch.zeros(2, 3, whole[0], size[1])], 2)
    padded = torch.cat([padded, torch.zeros(2, 3, padded.shape[2], whole[1])], 3)
    maps = model.class_maps(padded)
    assert maps.shape[-2:] == (padded.shape[2] // 8, padded.shape[3] // 8)
    expected = F.interpolate(maps, scale_factor=8, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    torch.testing.assert_close(model(images), expected)
    # zeros all around instead: the same as an image that had them
    centred = Segmenter(model.encoder, model.decoder, 4, pad="center").eval()
    top, left = whole[0] // 2, whole[1] // 2
    around = torch.zeros_like(padded)
    around[:, :, top : top + size[0], left : left + size[1]] = images
    torch.testing.assert_close(centred(images), centred(around)[..., top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("head", ["linear", "bn_linear", "mask"])
@torch.no_grad()
def test_patched_segmenter(head):
    model = shaken(create_segmenter("vit_tiny_patch16_224", 4, head, SMALL))
    images = torch.randn(2, 3, 30, 45)
    plain = model(images)
    with tokenzoo.patched(model, "tome", r=0):
        torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    for method in (tokenzoo.ToMe(r=3), tokenzoo.EViT(keep_rate=0.6, layers=(0, 1))):
        tokenzoo.patch_model(model, method)
        out = model(images)
        assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-4)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), out, atol=1e-5, rtol=1e-4)
        tokenzoo.unpatch_model(model)
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("head", [LinearHead, BNLinearHead, MaskTransformer])
@torch.no_grad()
def test_decoder_on_padded_tokens(head, fused):
    """Where the decoder runs on reduced tokens, padding of the batch changes nothing."""
    decoder = shaken(head(32, 4))
    for block in getattr(decoder, "blocks", ()):
        block.attn.fused_attn = fused
    x, counts = torch.randn(3, 9, 32), (9, 4, 7)
    valid = torch.arange(9) < torch.tensor(counts).unsqueeze(1)
    out = decoder(x * 100 * ~valid.unsqueeze(-1) + x, valid)
    for image, count in enumerate(counts):
        alone = decoder(x[image : image + 1, :count])
        torch.testing.assert_close(out[image : image + 1, :count], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoder_on_images_of_different_lengths():
    """ALGM decodes reduced tokens, and every image keeps its own number of them."""
    model = shaken(Segmenter(TINY(), MaskTransformer(32, 4), 4))
    noise = torch.randn(2, 3, 32, 48)
    images = torch.cat([noise[:1], noise[1:] * 0.2])
    tokenzoo.patch_model(model, "algm", threshold=0.5, layers=(0, 1))
    tokens = model.encoder.forward_tokens(images)
    assert tokens.valid is not None and len(set(tokens.valid.sum(1).tolist())) == 2, "the images keep equally many"
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-4)


# ---- files of our own


@torch.no_grad()
def test_saved_model_comes_back(tmp_path):
    model = shaken(
        create_segmenter(
            "vit_tiny_patch16_224", 3, "mask", SMALL, {"depth": 1, "mlp_dim": 40}, ["a", "b", "c"], (0.1, 0.2, 0.3),
            (0.4, 0.5, 0.6), img_size=(32, 48), window=32, stride=16,
        )
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 48)
    with tokenzoo.patched(model, "cts", shared=2, score="policy"):  # brings weights of its own
        assert any("tokenzoo" in key for key in model.state_dict())
        save_segmenter(model, tmp_path / "half.safetensors")
    save_segmenter(model, tmp_path / "full.safetensors", half=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.safetensors", "half.safetensors"]
    full, half = (load_segmenter(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert torch.equal(full(images), model(images)) and not full.training
    assert next(half.parameters()).dtype == torch.float32
    torch.testing.assert_close(half(images), model.half().float()(images))
    for name in ("num_classes", "classes", "mean", "std", "window", "stride"):
        assert getattr(half, name) == getattr(model, name)
    save_segmenter(half, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size


def test_files_that_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="does not exist"):
        load_segmenter(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_segmenter(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by save_segmenter"):
        load_segmenter(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not built by create_segmenter"):
        save_segmenter(create_segmenter(TINY(), 3), tmp_path / "x.safetensors")
    model = create_segmenter("vit_tiny_patch16_224", 3, encoder_kwargs=SMALL)
    with torch.no_grad():
        model.decoder.head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="decoder.head.weight holds values too large for float16"):
        save_segmenter(model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet18", "'resnet18' takes images of one size only"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer has no blocks"),
        ("vit_teeny", "'vit_teeny' is unknown to timm"),
    ],
)
def test_encoders_that_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        create_segmenter(name, 3)


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="head='fancy' is unknown; use one of linear"):
        create_segmenter("vit_tiny_patch16_224", 3, "fancy")
    with pytest.raises(ValueError, match="num_classes=0"):
        create_segmenter("vit_tiny_patch16_224", 0)
    with pytest.raises(ValueError, match="2 class names for num_classes=3"):
        create_segmenter(TINY(), 3, classes=["a", "b"])
    with pytest.raises(ValueError, match="need an encoder given by name"):
        create_segmenter(TINY(), 3, img_size=64)
    with pytest.raises(ValueError, match="pad='left'"):
        Segmenter(TINY(), LinearHead(32, 3), 3, pad="left")
    with pytest.raises(ValueError, match="3 heads do not divide a width of 32"):
        MaskTransformer(32, 4, num_heads=3)
    sam = timm.create_model("samvit_base_patch16", img_size=64)
    with pytest.raises(ValueError, match="VisionTransformerSAM has no num_prefix_tokens"):
        Segmenter(sam, LinearHead(768, 3), 3)


def test_layers_that_are_refused():
    for layers in ([2, 1], [0, 3], [], 4):
        with pytest.raises(ValueError, match="ascending indices of the 3 blocks"):
            LayersSegmenter(TINY(), BNLinearHead(64, 5), 5, layers)


# ---- multiply-adds


@pytest.mark.parametrize(
    "head",
    [LinearHead(32, 5), BNLinearHead(32, 5), MaskTransformer(32, 5), MaskTransformer(32, 9, 1, 2, 48, 100)],
    ids=["linear", "bn", "mask", "mask_wide"],
)
@pytest.mark.parametrize("tokens", [7, 30])
def test_head_macs(head, tokens):
    found = traced(head, torch.randn(1, tokens, 32))
    assert Segmenter(TINY(), head, 5).head_macs(tokens, (5, 6)) == sum(found.values())
