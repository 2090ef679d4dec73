"""OpenVINO answers as the model does at every batch size, from an exported file and from the model itself."""

import numpy as np
import pytest
import torch
from cases import VIT, given, images

import tokenzoo
from tokenzoo.apply.export import export

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("method,way", [("evo", "onnx"), ("tome", "model")])
@torch.no_grad()
def test_answers_alike_at_any_batch(tmp_path, method, way):
    if way == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = tokenzoo.patch_model(VIT(depth=3).eval(), given(method, "static", layers=(1, 2)))
    x = images(model, 2)
    if way == "onnx":
        export(model, tmp_path / "model.onnx", x)
        converted = openvino.convert_model(tmp_path / "model.onnx")
    else:
        converted = openvino.convert_model(model, example_input=x, input=[-1, *x.shape[1:]])
    run = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    for batch in (2, 3, 1):
        y = images(model, batch, seed=batch)
        found, expected = run(y.numpy())[0], model(y).numpy()
        assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-4
