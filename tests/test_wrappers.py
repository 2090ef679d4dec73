"""What users put around models and blocks: looked through, or refused with the module and the remedy."""

from __future__ import annotations

import copy

import cases
import pytest
import scan_cases
import torch
import torch.distributed as dist
from cases import build, images
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import tokenzoo

# model, recipe, change of options
FAMILIES = {
    "deit": ("evit", {"keep_rate": 0.6, "layers": (1, 2)}, {"keep_rate": 0.5}),
    "eva02": ("tome", {"r": 2}, {"r": 1}),
    "differential": ("topk", {"layers": (1,)}, {"keep_rate": 0.4}),
    "lv_vit": ("mctf", {"r": 2}, {"r": 1}),
    "vim": ("famba", {"r": 2}, {"r": 1}),
    "plain_mamba": ("uniform", {"layers": (1,)}, {"keep_rate": 0.5}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
REMEDY = "patch the model first and {} it afterwards"


def make(family: str) -> nn.Module:
    return (scan_cases if family in scan_cases.SCANNERS else cases).build(family)


def patched(family: str, updated: bool = False) -> nn.Module:
    method, options, change = FAMILIES[family]
    return tokenzoo.patch_model(make(family), method, **{**options, **(change if updated else {})})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    file = tmp_path_factory.mktemp("group") / "file"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, part: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if part != "model" else ():
        fully_shard(block)
    return fully_shard(model) if part != "blocks" else model


def parametrise(model: nn.Module, part: str) -> nn.Module:
    """Gives the model or its blocks a class of their own, as a parametrisation of one of their parameters does."""
    for module in (model, *model.blocks):
        if (module is model) != (part == "blocks"):
            module.register_parameter("own", nn.Parameter(torch.ones(1)))
            parametrize.register_parametrization(module, "own", nn.Identity())
    return model


@pytest.mark.parametrize("act,verb", [(shard, "shard"), (parametrise, "parametrise")])
@pytest.mark.parametrize("part", ["blocks", "model", "both"])
@each_family
@torch.no_grad()
def test_classes_that_torch_derives(family, part, act, verb, one_process):
    """Reports and updates work on a model that was patched first; what would change a class is refused."""
    model, updated = patched(family), patched(family, updated=True)
    report, recipe, x = tokenzoo.report(model), tokenzoo.recipe(model), images(model)
    expected = model(x)
    act(model, part)
    torch.testing.assert_close(model(x), expected)
    assert tokenzoo.report(model) == report and tokenzoo.recipe(model) == recipe and tokenzoo.is_patched(model)
    tokenzoo.update_method(model, **FAMILIES[family][2])
    torch.testing.assert_close(model(x), updated(x))
    assert tokenzoo.report(model).total == tokenzoo.report(updated).total
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=REMEDY.format(verb)):
        tokenzoo.unpatch_model(model)
    plain = act(make(family), part)
    with pytest.raises(TypeError, match=REMEDY.format(verb)):
        tokenzoo.patch_model(plain, FAMILIES[family][0])
    assert [type(m) for m in model.modules()] == classes and tokenzoo.is_patched(model)
    torch.testing.assert_close(model(x), updated(x))
    assert tokenzoo.report(plain).total == tokenzoo.report(model).unpatched


def around(model: nn.Module, kind: str) -> nn.Module:
    """Something around every block."""
    wrap = checkpoint_wrapper if kind == "checkpoint" else torch.compile
    layers = model.blocks if isinstance(model.blocks, nn.Sequential | nn.ModuleList) else model.layers
    for index, block in enumerate(layers):
        layers[index] = wrap(block)
    return model


@pytest.mark.parametrize("kind", ["checkpoint", "compile"])
@each_family
@torch.compiler.set_stance("force_eager")
def test_wrapped_blocks(family, kind):
    """Activation checkpointing and a compiler around blocks; an update reaches the blocks inside."""
    model, updated = patched(family), patched(family, updated=True)
    start, report, x = make(family), tokenzoo.report(model), images(model)
    expected = model(x)
    around(model, kind)
    torch.testing.assert_close(model(x), expected)
    assert tokenzoo.report(model) == report
    tokenzoo.update_method(model, **FAMILIES[family][2])
    torch.testing.assert_close(model(x), updated(x))
    assert tokenzoo.report(model) == tokenzoo.report(updated)
    model(x).sum().backward()
    tokenzoo.unpatch_model(model)
    torch.testing.assert_close(model(x), start(x))
    assert tokenzoo.report(model) == tokenzoo.report(start)
    before = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="(blocks|layers).0 is wrapped in torch.*" + REMEDY.format("wrap")):
        tokenzoo.patch_model(model, FAMILIES[family][0])
    assert [type(m) for m in model.modules()] == before


# ---- around models


def foreign(path: str, name: str, **attributes: nn.Module) -> nn.Module:
    """An object of a class that has the name of one of another library."""
    made = type(name, (nn.Module,), {"__module__": path, "forward": lambda self, x: next(self.children())(x)})()
    for key, module in attributes.items():
        setattr(made, key, module)
    return made


HUGGING = "transformers.models.timm_wrapper.modeling_timm_wrapper"
THIN = {
    "TimmWrapperModel": (HUGGING, "timm_model"),
    "TimmWrapperForImageClassification": (HUGGING, "timm_model"),
    "TimmBackbone": ("transformers.models.timm_backbone.modeling_timm_backbone", "_backbone"),
    "TimmModel": ("open_clip.timm_model", "trunk"),
}


@pytest.mark.parametrize("name", THIN)
@torch.no_grad()
def test_thin_wrappers_are_looked_through(name):
    path, attribute = THIN[name]
    model = build("deit")
    wrapper, x = foreign(path, name, **{attribute: model}), images(model)
    start = model(x)
    assert not tokenzoo.is_patched(wrapper)
    with pytest.raises(TypeError, match=rf"wrapped in {path}.{name}, which stays as it is; patch model\.{attribute}"):
        tokenzoo.patch_model(wrapper, "topk", keep_rate=0.5)
    tokenzoo.patch_model(model, "topk", keep_rate=0.5)
    assert tokenzoo.is_patched(model) and tokenzoo.recipe(wrapper) == tokenzoo.recipe(model)
    assert tokenzoo.report(wrapper) == tokenzoo.report(model)
    assert tokenzoo.update_method(wrapper, keep_rate=0.9) is wrapper
    assert tokenzoo.recipe(model)["keep_rate"] == 0.9
    assert tokenzoo.unpatch_model(wrapper) is wrapper
    assert torch.equal(wrapper(x), start)


OTHERS = {
    "a stranger with a name of theirs": (lambda m: foreign("somewhere", "TimmModel", trunk=m), r"model\.trunk"),
    "in a sequence": (lambda m: nn.Sequential(nn.Identity(), m), r"model\.get_submodule\('1'\)"),
    "deep inside": (
        lambda m: foreign("a", "Clip", visual=foreign("open_clip.timm_model", "TimmModel", trunk=m)),
        r"model\.visual\.trunk",
    ),
    "two of them": (lambda m: foreign("a", "Pair", left=m, right=copy.deepcopy(m)), r"model\.left or model\.right"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_wrappers_are_told_what_they_hold(name):
    wrap, words = OTHERS[name]
    plain, model = build("deit"), tokenzoo.patch_model(build("deit"), "tome", r=1)
    with pytest.raises(TypeError, match=words):
        tokenzoo.patch_model(wrap(plain), "tome")
    for call in (tokenzoo.report, tokenzoo.recipe, tokenzoo.unpatch_model, tokenzoo.update_method):
        with pytest.raises(TypeError, match=words):
            call(wrap(model))


@pytest.mark.parametrize("name", ["DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"])
def test_the_outermost_wrappers_say_where_the_model_is(name):
    wrapper = foreign("torch.nn.parallel", name, module=tokenzoo.patch_model(build("deit"), "tome", r=1))
    for call in (tokenzoo.report, tokenzoo.recipe, tokenzoo.unpatch_model, tokenzoo.update_method):
        with pytest.raises(TypeError, match=rf"wrapped in {name}; patch the model first .* as model\.module"):
            call(wrapper)


def test_refusals_name_full_paths():
    class VisionTransformer(nn.Module):
        """A class with the name of timm's."""

    VisionTransformer.__module__, VisionTransformer.__qualname__ = "torchvision.models", "VisionTransformer"
    words = r"torchvision\.models\.VisionTransformer is not a .* timm\.models\.vision_transformer\.VisionTransformer, "
    with pytest.raises(TypeError, match=words):
        tokenzoo.patch_model(VisionTransformer(), "tome")
    model = build("deit")
    model.blocks[1] = type("Block", (nn.Module,), {"__module__": "elsewhere"})()
    with pytest.raises(TypeError, match=r"blocks\.1 is elsewhere\.Block, .* timm\.models\.vision_transformer\.Block, "):
        tokenzoo.patch_model(model, "tome")
