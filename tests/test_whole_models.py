"""Models around a backbone, the real ones: CLIP models of open_clip, peft, wrappers of transformers and of timm."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import METHODS, given
from library_cases import build, images, rough
from torch import nn

import tokenzoo

methods = pytest.mark.parametrize("method", METHODS)
VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 4, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 4, "mlp_ratio": 2}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 32}


def clip(kind: str) -> nn.Module:
    """A tiny model of open_clip with an image and a text tower."""
    pytest.importorskip("open_clip")
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(0)
    if kind == "coca":
        pooling = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True}
        vision, text = {**VISION, **pooling}, {**TEXT, "embed_cls": True, "output_tokens": True}
        decoder = MultimodalCfg(width=16, context_length=8, heads=2, layers=2)
        # its caption decoder reads tokens of its own width
        return rough(CoCa(16, vision_cfg=vision, text_cfg=text, multimodal_cfg=vars(decoder)))
    cls = CustomTextCLIP if kind == "custom_text" else CLIP
    model = cls(24, {"timm": TIMM}.get(kind, VISION), TEXT)
    if kind == "timm":
        model.visual.trunk = timm.create_model(**VIT, num_classes=0)
    return rough(model)


def patchable(model: nn.Module, kind: str) -> nn.Module:
    """What is given to `patch_model`: models of timm are named inside of what other libraries put around them."""
    if kind == "timm":
        with pytest.raises(TypeError, match=r"timm_model.TimmModel, which stays .*; patch model\.visual\.trunk"):
            tokenzoo.patch_model(model, "tome")
        return model.visual.trunk
    return model


def words(batch: int = 3) -> torch.Tensor:
    return torch.randint(1, 50, (batch, 8), generator=torch.Generator().manual_seed(2))


@methods
@pytest.mark.parametrize("kind", ["plain", "custom_text", "timm", "coca"])
@torch.no_grad()
def test_clip_models(kind, method):
    """The image tower is patched, alone: image features are those of the patched tower, text features bit-equal."""
    model, x, text = clip(kind), images(), words()
    image, written = model.encode_image(x), model.encode_text(text)
    classes = {name: type(module) for name, module in model.named_modules()}
    tokenzoo.patch_model(patchable(model, kind), given(method))
    assert tokenzoo.is_patched(model)
    changed = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    assert changed and all(name.startswith("visual") for name in changed)
    assert tokenzoo.report(model).total == tokenzoo.report(model.visual).total and tokenzoo.recipe(model)
    first = "blocks.0" if kind == "timm" else "visual.transformer.resblocks.0"
    assert tokenzoo.report(model.visual.trunk if kind == "timm" else model).rows[1].name == first
    assert torch.equal(model.encode_text(text), written)
    features = model.encode_image(x, normalize=kind != "coca")
    out = model.visual(x)
    out = out[0] if kind == "coca" else F.normalize(out, dim=-1)
    expected = F.normalize(out, dim=-1) if kind == "coca" else out
    torch.testing.assert_close(F.normalize(features, dim=-1), expected)
    assert features.shape == image.shape and not torch.allclose(model.encode_image(x), image, atol=1e-5)
    assert tokenzoo.unpatch_model(model) is model and torch.equal(model.encode_image(x), image)
    assert {name: type(module) for name, module in model.named_modules()} == classes


@pytest.mark.parametrize("kind", ["plain", "custom_text", "timm"])
@torch.no_grad()
def test_clip_models_give_logits_and_intermediates(kind):
    model, x, text = clip(kind), images(), words()
    options = dict(image_indices=[1, 3], output_logits=True)
    plain = model.forward_intermediates(x, text, **options)
    tokenzoo.patch_model(patchable(model, kind), "tome", r=0)
    for key, value in model.forward_intermediates(x, text, **options).items():
        torch.testing.assert_close(value, plain[key], atol=1e-4, rtol=1e-4)
    tokenzoo.update_method(model, r=2)
    found = model.forward_intermediates(x, text, **options)
    assert [y.shape for y in found["image_intermediates"]] == [y.shape for y in plain["image_intermediates"]]
    torch.testing.assert_close(found["image_features"], model.encode_image(x, normalize=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["image_logits"], model.get_logits(x, text)[0], atol=1e-4, rtol=1e-4)


def test_clip_models_learn():
    """Gradients of a contrastive loss reach both towers of a patched model."""
    model, x, text = clip("plain").train(), images(), words()
    tokenzoo.patch_model(model, "tome", r=2)
    model.set_grad_checkpointing(True)
    logits, _ = model.get_logits(x, text)
    F.cross_entropy(logits, torch.arange(3)).backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert lacking == []


def test_towers_that_do_not_attend_are_refused():
    open_clip = pytest.importorskip("open_clip.model")
    model = open_clip.CLIP(24, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}, TEXT)
    with pytest.raises(TypeError, match=r"open_clip\.modified_resnet\.ModifiedResNet is not a backbone"):
        tokenzoo.patch_model(model, "tome")


# ---- peft


def around(name: str) -> tuple[nn.Module, list[str], torch.Tensor]:
    """A model, the layers that adapters go around, and images."""
    if name != "timm":
        layer = "self_attention" if name == "torchvision" else "attn"
        model = build(name)
        targets = [n for n, m in model.named_modules() if n.endswith((f".{layer}", "mlp.0", "mlp.c_fc"))]
        return model, targets, images()
    torch.manual_seed(0)
    model = rough(timm.create_model(**VIT, num_classes=7))
    return model, ["qkv", "fc1"], images()


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("name", ["timm", "torchvision", "open_clip"])
def test_peft(name, first):
    """Adapters act in a patched model, whichever came first, and learn; the weights are those of before."""
    peft = pytest.importorskip("peft")
    model, targets, x = around(name)
    config = peft.LoraConfig(r=2, target_modules=targets, lora_alpha=8, init_lora_weights=False)
    if first == "patch":
        tokenzoo.patch_model(model, "tome", r=0)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config).eval()
    if first == "peft":
        with torch.no_grad():
            plain = wrapped(x)
        assert tokenzoo.patch_model(wrapped, "tome", r=0) is wrapped
    else:
        tokenzoo.unpatch_model(wrapped)
        with torch.no_grad():
            plain = wrapped(x)
        tokenzoo.patch_model(wrapped, "tome", r=0)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), plain, atol=1e-5, rtol=1e-4)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(x), plain, atol=1e-3)
    for recipe in ("tome", "evit", "mctf", "sta", "gtp"):
        tokenzoo.unpatch_model(wrapped)
        tokenzoo.patch_model(wrapped, given(recipe))
        plain_report = tokenzoo.report(tokenzoo.patch_model(around(name)[0], given(recipe)))
        assert tokenzoo.report(wrapped).total == plain_report.total
        wrapped.zero_grad()
        wrapped(x).square().mean().backward()
        lacking = [key for key, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == [], recipe
    tokenzoo.unpatch_model(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), plain, atol=1e-5, rtol=1e-4)


# ---- others


@torch.no_grad()
def test_timm_wrappers_of_transformers():
    pytest.importorskip("transformers")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    options = {key: value for key, value in VIT.items() if key != "model_name"}
    config = TimmWrapperConfig(architecture=VIT["model_name"], model_args=options, num_labels=7)
    for cls, key in ((TimmWrapperForImageClassification, "logits"), (TimmWrapperModel, "pooler_output")):
        torch.manual_seed(0)
        model, x = rough(cls(config)), torch.randn(2, 3, 32, 32)
        plain = model(x)[key]
        with pytest.raises(TypeError, match=r"which stays as it is; patch model\.timm_model"):
            tokenzoo.patch_model(model, "tome", r=0)
        tokenzoo.patch_model(model.timm_model, "tome", r=0)
        torch.testing.assert_close(model(x)[key], plain, atol=1e-5, rtol=1e-5)
        tokenzoo.update_method(model, r=1)
        out = model(x, output_hidden_states=True)
        assert len(out.hidden_states) >= 4 and not torch.allclose(out[key], plain, atol=1e-5)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(x)[key], plain)


@torch.no_grad()
def test_features_of_timm():
    """`features_only` as timm makes it for ViTs is looked through; a model taken apart into stages is refused."""
    model = timm.create_model(**VIT, features_only=True, out_indices=(1, 3)).eval()
    plain = model(images())
    tokenzoo.patch_model(model, "tome", r=2)
    assert [y.shape for y in model(images())] == [y.shape for y in plain]
    apart = timm.create_model("resnet18", features_only=True)
    with pytest.raises(TypeError, match="FeatureListNet is not a backbone"):
        tokenzoo.patch_model(apart, "tome", r=2)


class Lightning(nn.Module):
    """A module of the user's own around a model, such as Lightning's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss()


@pytest.mark.parametrize("name", ["torchvision", "open_clip"])
def test_modules_of_users_are_told_what_they_hold(name):
    for wrapped, words in (
        (nn.Sequential(nn.Identity(), build(name)), r"model\.get_submodule\('1'\)"),
        (Lightning(build(name)), r"model\.net"),
        (nn.Sequential(build(name), nn.Linear(7, 2)), r"model\.get_submodule\('0'\)"),
    ):
        with pytest.raises(TypeError, match=words):
            tokenzoo.patch_model(wrapped, "tome")
