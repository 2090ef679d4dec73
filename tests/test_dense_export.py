"""Segmentation models with clustering and reconstruction: one graph, exported, in ONNX Runtime, at any batch size."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tokenzoo
from tokenzoo.apply.export import export
from tokenzoo.dense import LinearHead, Segmenter

# centres that nearly coincide (too low a temperature) make the k-th nearest one a matter of rounding
CLUSTER = {"method": "cluster", "layers": 0, "grid": [3, 4], "temperature": 1.0}
RECIPES = {
    "features": [CLUSTER, {"method": "reconstruct", "layers": "norm", "k": 4}],
    "maps": [CLUSTER, {"method": "reconstruct", "layers": "maps", "k": 4}],
}


def model(recipe):
    torch.manual_seed(0)
    options = dict(img_size=(40, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=0)
    net = Segmenter(VisionTransformer(**options), LinearHead(32, 5), 5).eval()
    return tokenzoo.patch_model(net, RECIPES[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_one_graph(recipe):
    net, x = model(recipe), torch.randn(2, 3, 40, 48)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@torch.no_grad()
def test_exported_at_any_batch(tmp_path, recipe, suffix):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, path = model(recipe), tmp_path / f"model.{suffix}"
    done = export(net, path, torch.randn(2, 3, 40, 48))
    assert done.difference <= 1e-4
    for batch in (1, 3):
        x = torch.randn(batch, 3, 40, 48, generator=torch.Generator().manual_seed(batch))
        if suffix == "pt2":
            out = torch.export.load(path).module()(x)
        else:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            out = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        torch.testing.assert_close(out, net(x), atol=1e-4, rtol=1e-4)
