"""Batches of no images, graphs that outlive their example, the meta device, and gradients on or off: all methods."""

import copy
import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import cases
import pytest
import scan_cases
import torch
from dense_models import TINY, dtop, shaken
from test_sam import CLUSTER
from test_sam import micro as sam
from test_svit_adapter import SERVED
from test_svit_adapter import micro as svit
from torch.utils.flop_counter import FlopCounterMode

import tokenzoo
from tokenzoo.adapters import block
from tokenzoo.core.selection import host_ranges
from tokenzoo.dense import DToP, DToPHead, EoMT, LinearHead, MaskTransformer, Segmenter
from tokenzoo.layers import chunks
from tokenzoo.ops.rows import split_dim

FIXED = partial(TINY, dynamic_img_size=False)  # timm alone fails without images where sizes are dynamic
DENSE: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: shaken(Segmenter(FIXED(), LinearHead(32, 5), 5)),
    "mask": lambda: shaken(Segmenter(FIXED(), MaskTransformer(32, 4), 4)),
    "eomt": lambda: shaken(EoMT(FIXED(), 5, 4, 2)),
}
# methods whose maps differ in kind: a dense model adds nothing that depends on the others
FEW = ("cluster", "evit", "evo", "sta", "tome", "tomesd")
DENSE_METHODS = ("algm", "ats", "cluster", "evit", "tome", "tomesd")
SIZES = {"svit": (128, 128), "sam": (80, 80)}
ATTENDING = ("deit", "pe_like", "dinov3", "differential", "beit")


def rows() -> list[tuple[str, str]]:
    """(model, method) of every family."""
    attending = [(name, method) for name in ATTENDING if name in cases.backbone_names() for method in cases.METHODS]
    attending = [(name, method) for name, method in attending if cases.serves(method, plain(name))]
    scanning = [(name, method) for name in scan_cases.CORE for method in scan_cases.SCAN_METHODS]
    dense = [(name, method) for name in DENSE for method in DENSE_METHODS]
    others = [("svit", method) for method in SERVED] + [("sam", "cluster"), ("sam", "reconstruct")]
    return [*attending, *scanning, *others, *dense]


@cache
def plain(name: str) -> torch.nn.Module:
    if name in DENSE:
        return DENSE[name]()
    if name in scan_cases.SCANNERS:
        return scan_cases.build(name)
    return {"svit": svit, "sam": sam}[name]() if name in ("svit", "sam") else cases.build(name)


def recipe(name: str, method: str, kind: str) -> Any:
    if name == "sam":
        return CLUSTER if method == "cluster" else [CLUSTER, {"method": "reconstruct", "k": 4}]
    return (scan_cases if name in scan_cases.SCANNERS else cases).given(method, kind)


def images(name: str, batch: int = 2, seed: int = 1) -> torch.Tensor:
    size = SIZES[name] if name in SIZES else getattr(getattr(plain(name), "patch_embed", None), "img_size", (32, 32))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in tensors(part)]


# timm alone fails without images where windows are cut
filled = pytest.mark.parametrize("name", list(dict.fromkeys(name for name, _ in rows() if name != "sam")))
CORE = ("deit", "dinov3", *scan_cases.CORE, "svit", "sam", "linear")
every = pytest.mark.parametrize("name", CORE)


def methods_of(name: str, few: bool = False) -> list[str]:
    """Methods of a model; with `few` one of every kind of map, where the family adds nothing of its own to others."""
    found = [method for other, method in rows() if other == name]
    return [method for method in found if method in FEW] if few and name not in ("deit", *scan_cases.CORE) else found


# ---- no images


@filled
@torch.no_grad()
def test_no_images(name):
    """Empty outputs of the shapes that images would give, but for counts that only images can tell."""
    model = plain(name)
    for method in methods_of(name):
        with tokenzoo.patched(model, recipe(name, method, "reduce")):
            for call in ("forward", "forward_features", "forward_intermediates"):
                run = getattr(model, call, None)
                if run is None:
                    continue
                empty = tensors(run(images(name)[:0]))
                assert empty and all(t.shape[0] == 0 for t in empty), (method, call)
                if call == "forward" or not tokenzoo.create_method(method).pads:
                    full = tensors(run(images(name)))
                    assert [t.shape[1:] for t in empty] == [t.shape[1:] for t in full], (method, call)
                    assert [t.dtype for t in empty] == [t.dtype for t in full], (method, call)
            model.train()
            assert model(images(name)[:0]).shape[0] == 0
            model.eval()
        assert all(value.isfinite().all() for value in model.state_dict().values()), method


@torch.no_grad()
def test_no_images_through_early_exits():
    heads = [DToPHead(32, 4, 16, 2, depth=2) for _ in range(2)]
    model = shaken(DToP(FIXED(), heads, (0, 2), 0.3))
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 4, 32, 32)


def test_no_gradients_of_no_images():
    model = cases.build("deit").train()
    for method in cases.METHODS:
        with tokenzoo.patched(model, cases.given(method)):
            model(images("deit")[:0]).sum().backward()


def test_sizes_are_split_as_unflatten_does():
    x = torch.arange(2 * 12 * 5).reshape(2, 12, 5)
    for dim, sizes in ((1, (3, 4)), (1, (-1, 4)), (-2, (3, -1)), (1, (2, -1, 3)), (0, (1, 2)), (2, (-1,))):
        assert torch.equal(split_dim(x, dim, *sizes), x.unflatten(dim, sizes))
        assert split_dim(x[:0], dim, *(sizes if dim else (0, 7))).shape[0] == 0


def test_ranges_of_counts():
    left, merged = torch.tensor([[3], [7]]), torch.tensor([[5], [1]])
    assert host_ranges(left, merged) == [(3, 7), (1, 5)] and host_ranges(left[:0], merged[:0]) is None


# ---- graphs that outlive their example


def small(family: str, method: str, kind: str = "static") -> torch.nn.Module:
    """Two blocks, the second of which meets what the first leaves."""
    torch.manual_seed(0)
    model = (cases.VIT if family == "vit" else cases.EVA)(
        depth=2, **({} if family == "vit" else {"use_rot_pos_emb": True, "num_reg_tokens": 2})
    ).eval()
    layers = {"cluster": (0,), "evo": (1,), "kmedoids": (1,), "pool": (0,), "reconstruct": (1,)}.get(method, (0, 1))
    more = {} if tokenzoo.create_method(method).place == "embed" else {"layers": layers}
    return tokenzoo.patch_model(model, cases.given(method, kind, **more))


FAMILIES = [*(("vit", m) for m in cases.METHODS), *(("eva", m) for m in ("tome", "evo", "sta"))]
families = pytest.mark.parametrize("family,method", FAMILIES)


@families
@torch.no_grad()
def test_traced_as_usual(family, method):
    """`torch.jit.trace` with its own check, and the right answer at other batch sizes."""
    model = small(family, method)
    with torch.enable_grad():  # the check of the tracer runs without gradients: the graph must not depend on them
        traced = torch.jit.trace(model, cases.images(model, 2))
    for batch in (3, 1):
        x = cases.images(model, batch, seed=7)
        torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vim", "plain_mamba_depthwise"])
def test_others_are_traced_too(name):
    model = plain(name)
    with tokenzoo.patched(model, recipe(name, "tome", "static")):
        traced, x = torch.jit.trace(model, images(name)), images(name, 3, seed=7)
        torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-5)


HOLDS_ON = ("ia_red2", "thresholds")  # to the batch, in the exporter of old, see docs/export.md


@pytest.mark.parametrize("family,method", [pair for pair in FAMILIES if pair[1] not in HOLDS_ON])
@torch.no_grad()
def test_torchscript_onnx_keeps_the_batch_open(family, method):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = small(family, method), io.BytesIO()
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        model, (cases.images(model, 2),), file, dynamo=False, input_names=["images"], output_names=["logits"],
        dynamic_axes=axes,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (2, 3, 1):
        x = cases.images(model, batch, seed=7)
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method,option", [("algm", "r="), ("ats", "max_tokens=")])
def test_counts_of_the_example_are_refused(method, option):
    model = small("vit", method, "reduce").requires_grad_(False)  # a traced function holds weights as constants
    x = cases.images(model, 2)
    refused = pytest.raises(ValueError, match=f"{method} at block .*fix at those of the example.*such as {option}")
    with refused:
        torch.jit.trace(model, x)
    with refused:
        torch.jit.trace(lambda x: model(x), x)
    pytest.importorskip("onnx")
    with refused:
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    with pytest.raises(ValueError, match=f"{method} at block .*meta device.*such as {option}"):
        small("vit", method, "reduce").to("meta")(x.to("meta"))
    assert tokenzoo.count_macs(model, (3, 32, 32)).total > 0  # the cost of one image is that of its own counts


def test_early_exits_are_refused():
    model, x = dtop(), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="DToP.*fix at those of the example"):
        torch.jit.trace(model, x)
    with pytest.raises(ValueError, match="DToP.*meta device"):
        model.to("meta")(x.to("meta"))


@pytest.mark.parametrize("name", ["dynamic", "vim_dynamic", "svit"])
@torch.no_grad()
def test_open_sizes_are_refused(name):
    model = plain(name)
    sides = {2: torch.export.Dim("height", min=32, max=512), 3: torch.export.Dim("width", min=32, max=512)}
    with tokenzoo.patched(model, recipe(name, "tome", "static")):
        with pytest.raises(ValueError, match="height and width.*file per size"):
            torch.export.export(model, (images(name),), dynamic_shapes=(sides,), strict=False)


# ---- tensors without values, gradients on or off


@every
def test_meta_device(name):
    """Shapes and costs without values: FLOP counters, empty weights, summaries."""
    model = plain(name)
    real, meta = images(name), images(name).to("meta")
    empty = copy.deepcopy(model).to("meta")
    for method in methods_of(name, few=True):
        with tokenzoo.patched(model, recipe(name, method, "static")), torch.no_grad():
            expected = model(real)
        with tokenzoo.patched(empty, recipe(name, method, "static")):
            out = empty(meta)
        assert out.is_meta and out.shape == expected.shape and out.dtype == expected.dtype, method
    with tokenzoo.patched(empty, recipe(name, methods_of(name)[0], "static")):
        with FlopCounterMode(display=False) as counter:
            empty(meta)
    assert counter.get_total_flops() > 0


@every
def test_nothing_depends_on_gradients(name, monkeypatch):
    """The same numbers whether gradients are on, off or asked for; slices that are taken without them included."""
    monkeypatch.setattr(block, "_SLICE", 3)
    monkeypatch.setattr(chunks, "_CPU_NUMBERS", 1)
    model, x = plain(name), images(name)
    for method in methods_of(name, few=True):
        with tokenzoo.patched(model, recipe(name, method, "reduce")):
            expected = model(x).detach()
            assert model(x.clone().requires_grad_()).requires_grad
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    found = model(x)
                assert found.shape == expected.shape and not found.requires_grad
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(x.clone().requires_grad_()).detach(), expected, atol=1e-5, rtol=1e-5)
