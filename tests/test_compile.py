"""Compiled in one graph, forward and backward, with static shapes."""

import pytest
import torch
from cases import EVERY, VIT, build, given, images

import tokenzoo


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


PAPERS = [(backbone, method) for backbone in ("t2t_vit", "lv_vit") for method in ("tome", "evit", "mctf", "ats")]


@pytest.mark.parametrize("backbone,method", [
    *((backbone, method) for backbone in ("registers", "rope_mixed") for method in EVERY), *PAPERS,
    ("dinov2_like", "sta"), ("beit", "evit"), ("beit_shared", "tome"), ("relpos_mlp", "mctf"), ("naflex_mixed", "tome"),
])  # fmt: skip
def test_one_graph(method, backbone):
    model = build(backbone)
    if method == "ats" and model.cls_token is None:
        model = build("eva02")
    x = images(model)
    tokenzoo.patch_model(model, given(method, "static"))
    # tracing finds breaks in the graph; one backbone goes through the rest of the compiler, which takes as long again
    backend = "aot_eager" if backbone == "registers" else "eager"
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)


def test_compiled_gradients():
    model = build("deit").train()
    x = images(model)
    tokenzoo.patch_model(model, ["evit", {"method": "tome", "r": 1, "layers": [0]}])
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_inductor_agrees():
    """The default backend, on one model: generated kernels give the same numbers."""
    model = VIT(depth=1).eval()
    x = images(model)
    tokenzoo.patch_model(model, "tome", r=2)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, atol=1e-4, rtol=1e-4)
