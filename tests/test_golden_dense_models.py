"""Decoders against the official code: Segmenter's linear and mask-transformer heads, EoMT."""

from functools import partial

import pytest
import torch
from goldens import Case, cases, close, fixture_model, micro_decoder, read

import tokenzoo
from tokenzoo.dense import EoMT, Segmenter


@cases("segmentation_eval", lambda c: c.has("logits_lowres"))
@torch.no_grad()
def test_segmenter(case: Case):
    encoder = case.model(norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    decoder = micro_decoder(case.name, case.file)
    model = Segmenter(encoder, decoder, case["logits_lowres"].shape[1]).eval()
    x = case.input(len(case["labels"]))
    close(model.class_maps(x), case["logits_lowres"])
    assert torch.equal(model(x).argmax(1), case["labels"].long())
    # at zero reduction nothing changes, whichever way features come back
    for recipe in ({"method": "tome", "r": 0}, {"method": "topk", "keep_rate": 1.0}, "cluster"):
        options = {"scale": 1.0} if recipe == "cluster" else {}
        with tokenzoo.patched(model, recipe, **options):
            close(model.class_maps(x), case["logits_lowres"])


@cases("segmentation_eval", lambda c: "num_q" in read(c.file)[1])
@torch.no_grad()
def test_eomt(case: Case):
    tensors, meta = read(case.file)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    backbone = fixture_model(case.fixture())
    model = EoMT(
        backbone, int(meta["num_classes"]), int(meta["num_q"]), int(meta["num_blocks"]), (0, 0, 0), (1, 1, 1)
    ).eval()
    model.load_state_dict(weights, strict=False)
    unread = set(weights) - set(model.state_dict())
    assert not unread, f"the model has no place for {unread}"
    x = case.input(len(tensors["mask_logits"]))
    for recipe in (None, {"method": "tome", "r": 0}, {"method": "evit", "keep_rate": 1.0}):
        if recipe is not None:
            tokenzoo.patch_model(model, recipe)
        masks, classes = model.predict(x)
        close(masks, tensors["mask_logits"])
        close(classes, tensors["class_logits"])
        assert torch.equal(model(x).argmax(1), tensors["semantic_argmax"].long())
        if recipe is not None:
            tokenzoo.unpatch_model(model)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 1), (2, 3)])
@torch.no_grad()
def test_eomt_never_touches_queries(layers):
    torch.manual_seed(0)
    from timm.models.vision_transformer import VisionTransformer

    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    model = EoMT(VisionTransformer(**options, reg_tokens=2), 3, num_q=5, num_blocks=2).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model.predict(x)
    for method in (tokenzoo.ToMe(r=2, layers=layers), tokenzoo.EViT(keep_rate=0.6, layers=layers)):
        tokenzoo.patch_model(model, method)
        masks, classes = model.predict(x)
        assert masks.shape == plain[0].shape and classes.shape == plain[1].shape
        assert not torch.allclose(masks, plain[0], atol=1e-5)
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(alone, model(x), atol=1e-5, rtol=1e-4)
        tokenzoo.unpatch_model(model)
    assert torch.equal(model.predict(x)[0], plain[0])
