"""pytorch-grad-cam and captum on a patched model, with maps of the full grid."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import METHODS, build, given, images, serves

import tokenzoo

cam = pytest.importorskip("pytorch_grad_cam")


def by_hand(seen, out, grad, layer, size):
    """Grad-CAM: channels weighted by their mean gradient, what is positive, scaled to the image."""
    values, slopes = seen.activation(out, layer).numpy(), seen.gradient(grad, layer).numpy()
    raw = np.maximum((slopes.mean((2, 3))[:, :, None, None] * values).sum(1), 0)
    scale = cam.utils.image.scale_cam_image
    return scale(np.maximum(scale(raw, size[::-1]), 0))  # once per layer, and once their mean


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["deit", "gap", "dinov3"])
def test_maps_are_those_by_hand(method, backbone):
    model = build(backbone)
    if not serves(method, model):
        return
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    target = [cam.utils.model_targets.ClassifierOutputTarget(2)] * len(x)
    for name in ("norm2", "norm1", None):
        block = model.blocks[2]
        layer = block if name is None else getattr(block, name)
        kept = {}

        def keep(module, args, out, kept=kept):
            kept["out"] = kept.get("out", out)  # the first one where a layer runs again
            out.register_hook(lambda grad: kept.__setitem__("grad", grad))

        handle = layer.register_forward_hook(keep)
        torch.manual_seed(0)
        with tokenzoo.explain(model) as seen:
            with cam.GradCAM(model=model, target_layers=[layer], reshape_transform=seen.reshape(layer)) as explainer:
                maps = explainer(x, target)
            assert maps.shape == (len(x), 32, 32) and np.isfinite(maps).all()
            expected = by_hand(seen, kept["out"].detach(), kept["grad"], layer, (32, 32))
        handle.remove()
        np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_nothing_removed_is_the_map_of_the_plain_model():
    def grid(x):
        return x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    plain, model = build("deit"), build("deit")
    x = images(plain)
    expected = cam.GradCAM(model=plain, target_layers=[plain.blocks[-1].norm1], reshape_transform=grid)(x, None)
    tokenzoo.patch_model(model, given("tome", "zero"))
    for one in (plain, model):
        with tokenzoo.explain(one) as seen:
            layer = one.blocks[-1].norm1
            maps = cam.GradCAM(model=one, target_layers=[layer], reshape_transform=seen.reshape(layer))(x, None)
        np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert expected.max() > 0.5


def test_several_kinds_of_cam():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, given("evit"))
    layer = model.blocks[-1].norm1
    with tokenzoo.explain(model) as seen:
        for kind in (cam.GradCAM, cam.HiResCAM, cam.GradCAMPlusPlus, cam.EigenCAM, cam.LayerCAM):
            maps = kind(model=model, target_layers=[layer], reshape_transform=seen.reshape(layer))(x, None)
            assert maps.shape == (3, 32, 32) and np.isfinite(maps).all()


def test_captum_attributions_keep_their_sum():
    attr = pytest.importorskip("captum.attr")
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, given("tome"))
    layer = model.blocks[2]
    with tokenzoo.explain(model) as seen:
        activation = attr.LayerActivation(model, layer).attribute(x)
        product = attr.LayerGradientXActivation(model, layer).attribute(x, target=1)
        values, shares = seen.activation(activation, layer), seen.gradient(product, layer)
    with torch.no_grad():
        torch.testing.assert_close(values, model.forward_intermediates(x, intermediates_only=True)[2])
    torch.testing.assert_close(shares.sum((1, 2, 3)), product[:, 1:].sum((1, 2)))
    assert F.interpolate(shares.sum(1, keepdim=True), size=32).shape == (3, 1, 32, 32)


def test_the_document_runs():
    pytest.importorskip("captum")
    text = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    model = tokenzoo.patch_model(build("dinov3"), given("tome"))
    names = {"tokenzoo": tokenzoo, "model": model, "images": images(model)}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)), names)
    assert names["heat"].shape == (3, 32, 32)
    assert names["values"].shape == names["shares"].shape == (3, 32, 4, 4)
    assert [one.shape[1:] for one in names["maps"].values()] == [(2, 21, 21)] * 4
