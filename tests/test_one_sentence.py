"""What cannot work on a patched model says so in one sentence that names tokenzoo's remedy; hooks see tensors."""

import pickle
import traceback
import warnings

import pytest
import torch
from cases import METHODS, VIT, build, given, images, serves
from scan_cases import build as build_scan
from test_sam import micro as sam
from test_svit_adapter import micro as svit
from torch import fx, nn
from torch.func import functional_call, grad, vmap

import tokenzoo
from tokenzoo.adapters.sam.blocks import WindowedMap
from tokenzoo.apply.export import export
from tokenzoo.core.tokens import Tokens

methods = pytest.mark.parametrize("method", METHODS)
DEPENDENT = [name for name in METHODS if tokenzoo.method_class(name)().data_dependent]
# one of each family, with a recipe and images
FAMILIES = {
    "vision_transformer": (lambda: build("deit"), {"method": "tome", "r": 2}, (32, 32)),
    "eva": (lambda: build("dinov3"), {"method": "tome", "r": 2}, (32, 32)),
    "vit_stems": (lambda: build("t2t_vit"), {"method": "tome", "r": 2}, (64, 64)),
    "svit": (svit, {"method": "tome", "r": 2}, (128, 128)),
    "sam": (sam, {"method": "cluster", "layers": 1, "scale": 0.6}, (80, 80)),
    "vim": (lambda: build_scan("vim"), {"method": "tome", "r": 2}, (32, 32)),
    "plain_mamba": (lambda: build_scan("plain_mamba"), {"method": "tome", "r": 2}, (32, 32)),
}
families = pytest.mark.parametrize("family", list(FAMILIES))


def patched(family: str) -> tuple[nn.Module, torch.Tensor]:
    make, recipe, size = FAMILIES[family]
    model = tokenzoo.patch_model(make().eval(), recipe)
    return model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


class Ready(nn.Module):
    """A module that normalises images in front of a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x / 255 - 0.5).softmax(-1)


def raised_by_us(error: BaseException) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "tokenzoo" in last.filename and last.line.startswith("raise")


# ---- tokens between blocks taken for a tensor

MISUSED = {
    "shape": lambda z, norm: z.shape,
    "device": lambda z, norm: z.device,
    "cut": lambda z, norm: z[:, 1:],
    "slice": lambda z, norm: z[1:],
    "mask": lambda z, norm: z[torch.ones(2, dtype=torch.bool)],
    "method": lambda z, norm: z.mean(1),
    "norm": lambda z, norm: norm(z),
    "linear": lambda z, norm: nn.Linear(32, 3)(z),
    "function": lambda z, norm: torch.relu(z),
    "stack": lambda z, norm: torch.stack([z, z]),
    "add": lambda z, norm: z + 0.1,
    "add to": lambda z, norm: torch.zeros(1) + z,
    "scale": lambda z, norm: z * 2,
    "scaled": lambda z, norm: 2 * z,
    "subtract": lambda z, norm: z - 1.0,
    "divide": lambda z, norm: z / 2,
    "product": lambda z, norm: z @ torch.ones(32, 3),
    "negative": lambda z, norm: -z,
}


@pytest.mark.parametrize("use", list(MISUSED))
@pytest.mark.parametrize("family", ["vision_transformer", "eva", "sam"])
def test_tokens_are_no_tensor(family, use):
    model, x = patched(family)
    z = list(model.walk(x))[1]
    sentence = r"tokenzoo's (Tokens|WindowedMap).*`\.x`.*forward_"
    with pytest.raises((TypeError, AttributeError), match=sentence) as caught:
        MISUSED[use](z, nn.LayerNorm(32))
    assert raised_by_us(caught.value)


@pytest.mark.parametrize("family", ["vision_transformer", "sam"])
def test_tokens_are_still_a_tuple(family):
    model, x = patched(family)
    z = list(model.walk(x))[1]
    assert isinstance(z, Tokens if family == "vision_transformer" else WindowedMap)
    assert z[0] is z.x and z[1] is z[1] and z[-1] is tuple(z)[-1] and len(z) == len(z._fields)
    assert not hasattr(z, "detach") and not hasattr(z, "no_such_name") and z != 3
    copy = pickle.loads(pickle.dumps(z))
    assert type(copy) is type(z) and torch.equal(copy.x, z.x)
    leaves, spec = torch.utils._pytree.tree_flatten(z)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(z) and again.x is z.x


@families
def test_hooks_on_blocks_see_tensors(family):
    """With hooks the model says what it says without; the hooks see the values and may change them."""
    model, x = patched(family)
    seen, block = [], model.blocks[-1]
    with torch.no_grad():
        plain = model(x)
        for each in model.blocks:
            each.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        torch.testing.assert_close(model(x), plain, atol=0, rtol=0)
        assert len(seen) == len(model.blocks)
        assert all(isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) for a, b in seen)
        block.register_forward_hook(lambda module, args, out: 2 * out + 1)
        block.register_forward_pre_hook(lambda module, args: (3 * args[0], *args[1:]))
        assert not torch.allclose(model(x), plain)
        block.register_forward_hook(lambda module, args, out: out[:, :1])
        with pytest.raises(ValueError, match="hook behind a block.*protect=n"):
            model(x)


@pytest.mark.parametrize("backbone", ["deit", "dinov3"])
def test_gradients_pass_hooks(backbone):
    grads = []
    for hooked in (False, True):
        model = build(backbone)
        tokenzoo.patch_model(model, "tome", r=2)
        if hooked:
            model.blocks[1].register_full_backward_hook(lambda module, into, out: grads.append(out[0]))
            model.blocks[1].register_forward_hook(lambda module, args, out: None)
        model.set_grad_checkpointing(hooked)
        model(images(model)).square().sum().backward()
        grads.append(model.patch_embed.proj.weight.grad)
    assert grads[1].dim() == 3
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-5)


# ---- scripting, symbolic tracing


@families
@pytest.mark.parametrize("wrapped", [False, True])
def test_scripts_are_refused(family, wrapped):
    model = patched(family)[0]
    with warnings.catch_warnings(), pytest.raises(TypeError, match="torch.jit.script.*tokenzoo.*export") as caught:
        warnings.simplefilter("ignore")
        torch.jit.script(Ready(model) if wrapped else model)
    assert raised_by_us(caught.value)
    tokenzoo.unpatch_model(model)
    for module in (model, model.blocks[0]):  # some models have one of their own
        assert "Unscriptable" not in [cls.__name__ for cls in type(module).__mro__]


@families
@pytest.mark.parametrize("wrapped", [False, True])
def test_symbols_are_refused(family, wrapped):
    model = patched(family)[0]
    with pytest.raises(TypeError, match="torch.fx.*tokenzoo.*forward_intermediates") as caught:
        fx.symbolic_trace(Ready(model) if wrapped else model)
    assert raised_by_us(caught.value)


def test_feature_extractor_is_refused():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    with pytest.raises(TypeError, match="torch.fx.*tokenzoo.*forward_intermediates"):
        extraction.create_feature_extractor(patched("vision_transformer")[0], ["blocks.1"])


# ---- vmap, export


@methods
@pytest.mark.parametrize("backbone", ["deit", "dinov3"])
def test_gradients_of_single_images(method, backbone):
    """vmap of grad: those of every image by itself."""
    model = build(backbone)
    if not serves(method, model):
        return
    x = images(model, batch=2)
    tokenzoo.patch_model(model, given(method, "static"))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, image):
        return functional_call(model, p, (image[None],)).square().sum()

    torch.manual_seed(0)
    each = vmap(grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    for index in range(2):
        torch.manual_seed(0)
        alone = grad(loss)(parameters, x[index])
        for name, value in alone.items():
            torch.testing.assert_close(each[name][index], value, atol=1e-4, rtol=1e-3, msg=f"{name}")


@pytest.mark.parametrize("method", DEPENDENT)
def test_vmap_over_counts_of_the_image_is_refused(method):
    model = tokenzoo.patch_model(build("deit"), method)
    fixed = tokenzoo.method_class(method).traits.static.split("=")[0]
    with pytest.raises(ValueError, match=f"{method}.*vmap.*{fixed}") as caught:
        vmap(lambda image: model(image[None]))(images(model))
    assert raised_by_us(caught.value)
    assert grad(lambda image: model(image).sum())(images(model)).isfinite().all()  # no vmap, no refusal


@pytest.mark.parametrize("method", DEPENDENT)
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_looks_into_wrappers(method, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    model = tokenzoo.patch_model(build("deit"), method)
    fixed = tokenzoo.method_class(method).traits.static.split("=")[0]
    for module in (model, Ready(model), nn.Sequential(nn.Identity(), Ready(model))):
        with pytest.raises(ValueError, match=f"{method}.*{fixed}"):
            export(module.eval(), tmp_path / f"model{suffix}", images(model))
    assert not list(tmp_path.iterdir())


def test_onnx_in_bfloat16_is_refused(tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    model = tokenzoo.patch_model(VIT().eval(), "tome", r=2)
    for given_model, x in ((model, images(model).bfloat16()), (model.bfloat16(), images(model).bfloat16())):
        with pytest.raises(ValueError, match="bfloat16.*model.float"):
            export(given_model, tmp_path / "model.onnx", x)
