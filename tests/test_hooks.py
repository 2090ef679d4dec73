"""Sub-modules run as modules: hooks see every attention layer once, with tensors, and what they change has effect."""

import gc

import pytest
import torch
from cases import METHODS, backbone_names, build, given, images, serves
from torch import nn

import tokenzoo
from tokenzoo.adapters.attending import Attending
from tokenzoo.models import SViT

LAYERS = (
    "Attention", "RelPosAttention", "DiffAttention", "EvaAttention", "AttentionRope", "SuperTokenAttention",
    "MapAttention", "TalkingHeadAttn", "XCA", "GPSA", "MHSA",
)  # fmt: skip
# one row for every class of block and attention layer
BACKBONES = [
    name
    for name in (
        "deit", "gated", "res_post", "parallel_things", "differential", "eva02", "eva_post_norm", "pe_like", "beit",
        "relpos_mlp", "cait", "xcit", "convit",
    )
    if name in backbone_names()
]  # fmt: skip


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """All attention layers inside of the blocks, patched or not."""
    found = {}
    for index, block in enumerate(model.blocks):
        for name, module in block.named_modules():
            if any(cls.__name__ in LAYERS for cls in type(module).__mro__):
                found[f"blocks.{index}.{name}"] = module
    return found


def svit() -> nn.Module:
    torch.manual_seed(0)
    options = {"embed_dim": (8, 12, 16, 24), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
    return SViT(**options, stoken_size=(4, 2, 1, 1), projection=32, num_classes=7, img_size=128).eval()


def written_out(model: nn.Module) -> nn.Module:
    """Attention maps written out, as with timm's fused attention switched off."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


class Calls:
    """Counts the calls of modules and keeps what they gave."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.count, self.out = dict.fromkeys(modules, 0), {}
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def _hook(self, name):
        def hook(module, args, out):
            assert all(isinstance(x, torch.Tensor) for x in (*args, out))
            self.count[name] += 1
            self.out[name] = out

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


def acts(method: str, backbone: str, model: nn.Module) -> bool:
    return method not in ("cts", "ats", "reconstruct") if backbone == "svit" else serves(method, model)


def make(backbone: str) -> tuple[nn.Module, torch.Tensor]:
    """A tiny model and two images."""
    if backbone == "svit":
        return svit(), torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    model = build(backbone)
    return model, images(model, batch=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", [*BACKBONES, "svit"])
@torch.no_grad()
def test_every_attention_layer_runs_once(method, backbone):
    model, x = make(backbone)
    if not acts(method, backbone, model):
        return
    calls = Calls(attentions(model))
    model, x = model.double(), x.double()  # in float32 the ways differ by up to 3e-4 on some processors
    tokenzoo.patch_model(model, given(method))
    expected = model(x)
    assert set(calls.count.values()) == {1} and len(calls.count) >= len(model.blocks)
    assert all(out.dim() == 3 and out.shape[0] == len(x) for out in calls.out.values())
    written_out(model)
    dropped = Calls({name: m for name, m in model.named_modules() if name.endswith("attn_drop")})
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert set(calls.count.values()) == {2} and set(dropped.count.values()) <= {1}
    assert dropped.count or backbone == "svit"
    assert all(out.dim() == 4 for out in dropped.out.values())


def _halve(module, args, out):
    return 0.5 * out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ats"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_what_hooks_change_has_effect(method, backbone, fused):
    """With nothing removed: the unpatched model with the same hooks."""
    model, x = make(backbone)
    if not acts(method, backbone, model):
        return
    if not fused:
        written_out(model)
        for module in (m for name, m in model.named_modules() if name.endswith("attn_drop")):
            module.register_forward_hook(_halve)
    plain = model(x)
    for module in attentions(model).values():
        module.register_forward_hook(_halve)
        module.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))
    expected = model(x)
    assert not torch.allclose(plain, expected, atol=1e-3)
    tokenzoo.patch_model(model, given(method, "zero"))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [n for n in ("parallel_scaling", "diff_parallel") if n in backbone_names()])
@torch.no_grad()
def test_dropout_of_blocks_that_attend_themselves(backbone):
    model = written_out(build(backbone))
    tokenzoo.patch_model(model, "evit", layers=(1, 2))
    calls = Calls({name: m for name, m in model.named_modules() if name.endswith("attn_drop")})
    model(images(model))
    assert list(calls.count.values()) == [1] * len(model.blocks)
    assert all(out.dim() == 4 for out in calls.out.values())


@pytest.mark.parametrize("backbone", ["deit", "parallel_things", "dinov3"])
def test_gradients_with_backward_hooks_and_checkpointed_layers(backbone):
    """Full backward hooks fire, and a layer whose activations are recomputed gives the same gradients."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    grads, fired = [], []
    for wrapped in (False, True):
        model = build(backbone).train()
        tokenzoo.patch_model(model, [{"method": "mctf", "r": 1, "layers": [0, 2]}, {"method": "evit", "layers": [1]}])
        for module in attentions(model).values():
            module.register_full_backward_hook(lambda m, gi, go: fired.append(go[0].shape))
        if wrapped:
            for block in model.blocks:
                for parent in (block, *getattr(block, "attns", ())):
                    if "attn" in parent._modules:
                        parent.attn = checkpoint_wrapper(parent.attn)
        torch.manual_seed(3)
        model(images(model)).square().mean().backward()
        named = model.named_parameters()
        grads.append({n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in named if p.grad is not None})
    assert len(fired) == 2 * len(attentions(build(backbone)))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)


@torch.no_grad()
def test_long_sequences_are_sliced_for_hidden_values_only_where_nobody_looks():
    """The MLP of a long sequence runs in slices, but a hook on it, or inside of it, sees all tokens at once."""
    model = build("dynamic")
    tokenzoo.patch_model(model, "random", layers=(2,), keep_rate=0.9)
    x = torch.randn(1, 3, 400, 400, generator=torch.Generator().manual_seed(1))  # 2500 patches
    plain, seen = model(x), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    assert seen == [2501]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_an_attention_outlives_it(method):
    model = build("deit")
    tokenzoo.patch_model(model, given(method))
    gc.collect()
    before = [found for found in gc.get_objects() if type(found) is Attending]  # of other tests
    gc.disable()
    try:
        model(images(model)).mean().backward()
        assert sum(type(found) is Attending for found in gc.get_objects()) == len(before)
    finally:
        gc.enable()


@torch.no_grad()
def test_layers_called_by_hand_are_those_of_before():
    for backbone in ("deit", "eva02"):
        model = build(backbone)
        z = torch.randn(2, 17, model.embed_dim)
        plain = model.blocks[0].attn(z)
        with tokenzoo.patched(model, "tome", r=1):
            assert torch.equal(model.blocks[0].attn(z, attn_mask=None), plain)


# ---- what would be dropped is refused


def _wrapped_forward(module):
    old = module.forward
    return lambda *args, **kwargs: old(*args, **kwargs)


PARTS = {
    "model": lambda model: model,
    "block": lambda model: model.blocks[1],
    "attention": lambda model: next(iter(attentions(model).values())),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backbone", [*BACKBONES, "svit"])
def test_a_forward_of_its_own_is_refused_before_and_after(backbone, part):
    model, x = make(backbone)
    with torch.no_grad():
        plain = model(x)
    module = PARTS[part](model)
    module.forward = _wrapped_forward(module)
    with pytest.raises(ValueError, match=r"forward was set on the instance \(_wrapped_forward.*del model.*\.forward"):
        tokenzoo.patch_model(model, "tome", r=1)
    assert not tokenzoo.is_patched(model)
    del module.forward
    tokenzoo.patch_model(model, "tome", r=1)
    module.forward = _wrapped_forward(module)
    with pytest.raises(ValueError, match="after patching .*would go on reducing tokens"):
        tokenzoo.unpatch_model(model)
    assert tokenzoo.is_patched(model)
    del module.forward
    tokenzoo.unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_a_compiled_forward_and_other_methods_are_refused():
    model = build("deit")
    model.forward = torch.compile(model.forward)
    with pytest.raises(ValueError, match=r"VisionTransformer\.forward was set on the instance"):
        tokenzoo.patch_model(model, "tome", r=1)
    for name in ("forward_features", "forward_head", "forward_intermediates", "pool"):
        model = build("deit")
        setattr(model, name, getattr(model, name))
        with pytest.raises(ValueError, match=rf"\.{name} was set on the instance .*del model\.{name}\)"):
            tokenzoo.patch_model(model, "tome", r=1)


@torch.no_grad()
def test_a_method_that_stays_in_use_is_honoured():
    model = build("deit")
    old = model._pos_embed
    model._pos_embed = lambda x: 2 * old(x)
    expected = model(images(model))
    with tokenzoo.patched(model, given("tome", "zero")):
        torch.testing.assert_close(model(images(model)), expected, atol=1e-5, rtol=1e-5)


def test_hooks_that_would_never_fire_are_refused():
    for backbone, name, instead in (
        ("deit", "blocks", "one by one"),
        ("parallel_things", "blocks.1.attns.0", "its parts"),
        ("prr", "attn_pool", "its norms"),
    ):
        model = build(backbone)
        handle = model.get_submodule(name).register_forward_hook(_halve)
        with pytest.raises(ValueError, match=rf"VisionTransformer\.{name} has hooks.*{instead}"):
            tokenzoo.patch_model(model, "tome", r=1)
        handle.remove()
        tokenzoo.patch_model(model, "tome", r=1)
    model = svit()
    model.blocks[0].mlp2.register_forward_hook(_halve)
    with pytest.raises(ValueError, match=r"SViT\.blocks\.0\.mlp2 has hooks.*mlp2\.fc1"):
        tokenzoo.patch_model(model, "tome", r=1)
