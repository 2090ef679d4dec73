"""captum's layer attributions at a patched block: its hooks meet tensors."""

import pytest
import torch
from cases import build, images

import tokenzoo

captum = pytest.importorskip("captum.attr")


@pytest.mark.parametrize("method, options", [("tome", {"r": 2}), ("evit", {"keep_rate": 0.6}), ("tomesd", {})])
@pytest.mark.parametrize("backbone", ["deit", "dinov3"])
def test_layer_attributions(method, options, backbone):
    model = build(backbone)
    x = images(model)
    tokenzoo.patch_model(model, method, **options)
    length = list(model.walk(x))[2].length
    activation = captum.LayerActivation(model, model.blocks[1]).attribute(x)
    assert activation.shape == (len(x), length, 32)
    for layer in (model.blocks[1], model.blocks[1].norm2):
        assert captum.LayerGradCam(model, layer).attribute(x, target=1).isfinite().all()
    with torch.no_grad():
        assert torch.equal(activation, list(model.walk(x))[2].x)
