"""User errors: one sentence that names the method or module, the value, and what to do."""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from cases import VIT, build, images
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

import tokenzoo


class Subclass(VisionTransformer):
    """A class that no family names."""


class ForeignAttention(timm.layers.Attention):
    """An attention layer that no family names."""


def _foreign_attention():
    model = VIT()
    model.blocks[2].attn.__class__ = ForeignAttention
    return model


def _gap():
    return VIT(class_token=False, global_pool="avg")


# what is asked -> (model, method, options, error, words that the message must hold)
REFUSED = {
    "unknown method": (VIT, "tomee", {}, ValueError, ["tomee", "did you mean 'tome'"]),
    "unknown option": (VIT, "tome", {"rr": 3}, ValueError, ["tome", "'rr'", "Options"]),
    "near option": (VIT, "evit", {"keep_rates": 0.7}, ValueError, ["keep_rates", "did you mean 'keep_rate'"]),
    "layers out of range": (VIT, "tome", {"layers": [1, 4]}, ValueError, ["tome", "block 4", "0 to 3"]),
    "negative layer": (VIT, "evit", {"layers": [-1]}, ValueError, ["evit", "block -1", "0 to 3"]),
    "layer twice": (VIT, "evit", {"layers": [1, 1]}, ValueError, ["evit", "(1, 1)", "twice"]),
    "layers as text": (VIT, "evit", {"layers": "all"}, TypeError, ["evit", "'all'", "give"]),
    "no layer": (VIT, "tome", {"layers": []}, ValueError, ["acts in no block", "name layers"]),
    "r too large": (VIT, "tome", {"r": 9}, ValueError, ["tome at block 0", "r=9", "at most 8", "clip=True"]),
    "r too large later": (VIT, "tome", {"r": 5}, ValueError, ["tome at block 2", "r=5", "at most 3"]),
    "r negative": (VIT, "tome", {"r": -1}, ValueError, ["r=-1", "negative"]),
    "r too long": (VIT, "tome", {"r": [1] * 5}, ValueError, ["5 entries", "4 blocks"]),
    "r as text": (VIT, "tome", {"r": "many"}, TypeError, ["'many'", "give"]),
    "slope": (VIT, "tome", {"r": (4, 1.5)}, ValueError, ["1.5", "[-1, 1]"]),
    "mctf keeps ten": (VIT, "mctf", {"r": 4}, ValueError, ["mctf at block 2", "r=4", "at most 3", "clip=True"]),
    "mctf pooling": (VIT, "mctf", {"pooling": "sum"}, ValueError, ["mctf", "'sum'", "attention"]),
    "mctf share": (VIT, "mctf", {"r": 1.5}, ValueError, ["mctf", "1.5", "[0, 1)"]),
    "mctf temperature": (VIT, "mctf", {"tau_info": -1}, ValueError, ["tau_info=-1", "use 0"]),
    "atc linkage": (VIT, "atc", {"linkage": "ward"}, ValueError, ["atc", "'ward'", "'average'"]),
    "atc tokens": (VIT, "atc", {"tokens": 20}, ValueError, ["atc at block 1", "tokens=20", "16 patches"]),
    "atc sizes": (VIT, "atc", {"prop_attn": "yes"}, TypeError, ["atc", "prop_attn='yes'", "True"]),
    "dpcknn neighbours": (VIT, "dpcknn", {"neighbours": 1}, ValueError, ["dpcknn", "neighbours=1", "below 2"]),
    "dpcknn neighbours as text": (VIT, "dpcknn", {"neighbours": "a"}, TypeError, ["dpcknn", "'a'", "patches"]),
    "dpcknn tokens": (VIT, "dpcknn", {"tokens": 20}, ValueError, ["dpcknn at block 1", "tokens=20", "16 patches"]),
    "gtp selection": (VIT, "gtp", {"selection": "Random"}, ValueError, ["gtp", "'Random'", "'MixedAttnMax'"]),
    "gtp class attention": (_gap, "gtp", {"selection": "CLSAttnMax"}, ValueError, ["gtp", "CLSAttnMax", "Mixed"]),
    "gtp graph": (VIT, "gtp", {"graph": "full"}, ValueError, ["gtp", "'full'", "'spatial'"]),
    "gtp propagation": (VIT, "gtp", {"propagation": "max"}, ValueError, ["gtp", "'max'", "'graph'"]),
    "gtp neighbours": (VIT, "gtp", {"neighbours": 0}, ValueError, ["gtp", "neighbours=0", "below 1"]),
    "gtp alpha": (VIT, "gtp", {"alpha": -0.1}, ValueError, ["gtp", "alpha=-0.1", "negative"]),
    "gtp sparsity": (VIT, "gtp", {"sparsity": 0}, ValueError, ["gtp", "sparsity=0", "(0, 1]"]),
    "gtp sparsity as text": (VIT, "gtp", {"sparsity": "all"}, TypeError, ["gtp", "'all'", "1 keeps"]),
    "gtp token scale": (VIT, "gtp", {"token_scale": 1}, TypeError, ["gtp", "token_scale=1", "True"]),
    "gtp removes all": (VIT, "gtp", {"r": 16}, ValueError, ["gtp at block 0", "r=16", "at most 15", "clip=True"]),
    "gtp inside of attention": (
        VIT, [{"method": "gtp", "r": 1, "sparsity": 0.5}, {"method": "mctf", "r": 1, "min_tokens": 4}], {}, ValueError,
        ["gtp", "sparsity=0.5", "mctf", "set it to 1"],
    ),
    "kmedoids start": (VIT, "kmedoids", {"start": "random"}, ValueError, ["kmedoids", "'random'", "'farthest'"]),
    "kmedoids cost": (VIT, "kmedoids", {"cost": "all"}, ValueError, ["kmedoids", "'all'", "'cluster'"]),
    "kmedoids space": (VIT, "kmedoids", {"space": "spectral"}, ValueError, ["kmedoids", "start='farthest'"]),
    "kmedoids sigma": (VIT, "kmedoids", {"sigma": 0}, ValueError, ["kmedoids", "sigma=0"]),
    "kmedoids graph": (VIT, "kmedoids", {"graph": 0}, ValueError, ["kmedoids", "graph=0"]),
    "kmedoids rounds": (VIT, "kmedoids", {"iterations": -1}, ValueError, ["kmedoids", "iterations=-1", "0 keeps"]),
    "kmedoids mean": (VIT, "kmedoids", {"mean": 1}, TypeError, ["kmedoids", "mean=1", "True"]),
    "kmedoids at block 0": (VIT, "kmedoids", {"layers": [0]}, ValueError, ["kmedoids", "block 0", "start='farthest'"]),
    "kmedoids tokens": (VIT, "kmedoids", {"tokens": 20}, ValueError, ["kmedoids at block 1", "tokens=20", "16"]),
    "radial pattern": (VIT, "radial", {"pattern": "l3"}, ValueError, ["radial", "'l3'", "'linf'"]),
    "radial tokens": (VIT, "radial", {"tokens": 20}, ValueError, ["radial at block 1", "tokens=20", "16 patches"]),
    "keep nothing": (VIT, "evit", {"keep_rate": 0}, ValueError, ["evit", "keep_rate=0", "(0, 1]"]),
    "keep more": (VIT, "topk", {"keep_rate": 1.5}, ValueError, ["topk", "keep_rate=1.5", "(0, 1]"]),
    "keep text": (VIT, "uniform", {"keep_rate": "a"}, TypeError, ["uniform", "'a'", "give"]),
    "rates and layers": (VIT, "evit", {"keep_rate": [0.5], "layers": [1, 2]}, ValueError, ["1 entries", "2 layers"]),
    "tokens too many": (VIT, "evit", {"tokens": 20}, ValueError, ["evit at block 1", "tokens=20", "16 patches"]),
    "cluster grid too large": (VIT, "cluster", {"grid": [5, 4]}, ValueError, ["cluster at block 1", "(5, 4)", "4 x 4"]),
    "cluster grid as text": (VIT, "cluster", {"grid": "big"}, TypeError, ["cluster", "'big'", "whole numbers"]),
    "cluster window": (VIT, "cluster", {"window": 4}, ValueError, ["cluster", "window=4", "odd"]),
    "cluster scale": (VIT, "cluster", {"scale": 0}, ValueError, ["cluster", "scale=0", "(0, 1]"]),
    "cluster iterations": (VIT, "cluster", {"iterations": -1}, ValueError, ["cluster", "iterations=-1"]),
    "cluster temperature": (VIT, "cluster", {"temperature": 0}, ValueError, ["cluster", "temperature=0", "positive"]),
    "cluster where": (VIT, "cluster", {"where": "beside"}, ValueError, ["cluster", "'beside'", "before"]),
    "cluster twice": (VIT, "cluster", {"layers": [1, 2]}, ValueError, ["cluster", "(1, 2)", "one block"]),
    "cluster after another": (
        VIT, [{"method": "tome", "r": 2, "layers": [0]}, {"method": "cluster", "layers": 1}], {}, ValueError,
        ["cluster at block 1", "14 tokens", "4 x 4", "before any other"],
    ),
    "reconstruct alone": (VIT, "reconstruct", {}, ValueError, ["reconstruct", "nothing to rebuild", "cluster"]),
    "reconstruct too early": (
        VIT, [{"method": "cluster", "layers": 2}, {"method": "reconstruct", "layers": 1}], {}, ValueError,
        ["block 1", "before the clustering at block 2", "swap"],
    ),
    "reconstruct where": (VIT, "reconstruct", {"layers": "end"}, ValueError, ["reconstruct", "'end'", "'maps'"]),
    "reconstruct norm": (VIT, "reconstruct", {"norm": "l3"}, ValueError, ["reconstruct", "'l3'", "'copy'"]),
    "reconstruct k": (VIT, "reconstruct", {"k": 0}, ValueError, ["reconstruct", "k=0", "-1"]),
    "merging around no branch": (
        lambda: VIT(block_fn=ParallelScalingBlock), "tomesd", {"branches": ["mlp"]}, ValueError,
        ["tomesd at block 0", "mlp", "beside attention"],
    ),
    "fill": (VIT, "topk", {"fill": "mean"}, ValueError, ["fill='mean'", "nearest"]),
    "fill option": (VIT, "topk", {"fill": {"kinds": "zero"}}, ValueError, ["fill", "'kinds'", "'kind'"]),
    "fill k": (VIT, "topk", {"fill": {"kind": "nearest", "k": 0}}, ValueError, ["fill", "k=0"]),
    "dense": (VIT, "topk", {"dense": "yes"}, TypeError, ["dense='yes'", "True"]),
    "tokens zero": (VIT, "random", {"tokens": 0}, ValueError, ["random", "tokens=0", "at least 1"]),
    "grid too large": (VIT, "pool", {"grid": [5, 4]}, ValueError, ["pool at block 1", "(5, 4)", "4 x 4"]),
    "stride": (VIT, "pool", {"stride": 0}, ValueError, ["pool", "stride=(0, 0)", "at least 1"]),
    "ats without class token": (_gap, "ats", {}, ValueError, ["ats", "class token", "VisionTransformer", "evit"]),
    "ats budget": (VIT, "ats", {"max_tokens": 2}, ValueError, ["ats", "max_tokens=2", "at least 3"]),
    "flops zero": (VIT, "tome", {"flops": 0}, ValueError, ["flops=0", "(0, 1]"]),
    "flops two": (VIT, "tome", {"flops": 2}, ValueError, ["flops=2", "(0, 1]"]),
    "flops unreachable": (VIT, "evit", {"flops": 0.05}, ValueError, ["flops=0.05", "evit", "leaves"]),
    "merged positions": (VIT, "tome", {"merged_positions": "best"}, ValueError, ["'best'", "destination"]),
    "no method": (VIT, [], {}, ValueError, ["at least one method"]),
    "dict without method": (VIT, {"r": 3}, {}, ValueError, ["'method'", "'r'"]),
    "number": (VIT, 3, {}, TypeError, ["3", "int", "give a name"]),
    "options beside an object": (VIT, tokenzoo.ToMe(), {"r": 3}, ValueError, ["'r'", "tome"]),
    "missing file": (VIT, "nowhere.yaml", {}, ValueError, ["nowhere.yaml", "does not exist"]),
    "patch dropout": (lambda: VIT(patch_drop_rate=0.5), "tome", {"r": 1}, ValueError, ["patch_drop", "Identity"]),
    "foreign attention": (_foreign_attention, "tome", {"r": 1}, TypeError, ["blocks.2", "ForeignAttention"]),
    "subclass": (
        lambda: Subclass(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        "tome", {"r": 1}, TypeError, ["Subclass", "VisionTransformer", "list_backbones"],
    ),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"), "tome", {}, TypeError, ["SwinTransformer", "patch"]
    ),
    "cnn": (lambda: timm.create_model("resnet18"), "tome", {}, TypeError, ["ResNet", "convolutional", "nearest"]),
    "torchvision": (lambda: torchvision.models.swin_t(), "tome", {}, TypeError, ["torchvision", "SwinTransformer"]),
    "no module": (lambda: "deit", "tome", {}, TypeError, ["str", "torch.nn.Module"]),
    "compiled": (lambda: torch.compile(VIT()), "tome", {"r": 1}, TypeError, ["OptimizedModule", "first"]),
    "data parallel": (lambda: nn.DataParallel(VIT()), "tome", {"r": 1}, TypeError, ["DataParallel", "afterwards"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case):
    make, method, options, error, words = REFUSED[case]
    model = make()
    before = type(model)
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, method, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert type(model) is before


@pytest.mark.parametrize("text,words", [
    ("method: [", ["broken.yaml", "not valid YAML"]),
    ("- tome\n- evit", ["broken.yaml", "list", "mapping"]),
    ("method: tome\nradius: 3", ["tome", "'radius'"]),
    ("method: tome\nr: 2\nflops: 3", ["flops=3"]),
])  # fmt: skip
def test_broken_files(text, words, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        tokenzoo.patch_model(VIT(), file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_patched_models_say_what_they_cannot_do():
    model = build("gap")
    x = images(model)
    for call in (tokenzoo.unpatch_model, tokenzoo.recipe, tokenzoo.update_method):
        with pytest.raises(ValueError, match="not patched"):
            call(model)
    tokenzoo.patch_model(model, "mctf", r=2, min_tokens=4)
    with pytest.raises(ValueError, match="patched already.*unpatch_model"):
        tokenzoo.patch_model(model, "tome")
    with pytest.raises(ValueError, match="is_causal.*order"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match=r"\(3, 3\).*N = 16"):
        model(x, attn_mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="'avg' do not tell pooling 'max'.*forward_tokens"):
        model.pool(model.forward_features(x), "max")
    torch.testing.assert_close(model.forward_head(model.forward_tokens(x)), model(x))
    with pytest.raises(ValueError, match="no option 'strength'"):
        tokenzoo.update_method(model, strength=1)
    with pytest.raises(ValueError, match="'evit' does not name"):
        tokenzoo.update_method(model, method="evit", keep_rate=0.5)


def test_a_strength_that_fits_no_smaller_image_is_refused_there():
    model = VIT(dynamic_img_size=True)
    tokenzoo.patch_model(model, "tome", r=3)
    with pytest.raises(ValueError, match="tome at block 1: r=3.*at most"):
        model(torch.randn(1, 3, 16, 24))


def test_budgets_given_twice():
    with pytest.raises(ValueError, match="flops is given twice"):
        tokenzoo.patch_model(VIT(), {"method": "tome", "flops": 0.6}, flops=0.7)


def test_names_are_taken_once():
    class Other(tokenzoo.Method):
        name = "tome"

    with pytest.raises(ValueError, match="'tome' is taken"):
        tokenzoo.register(Other)
    assert tokenzoo.method_class("tome") is tokenzoo.ToMe


def test_importing_alters_nothing_of_timm_and_loads_nothing_heavy():
    script = """
import sys, timm, timm.layers, timm.models.eva, timm.models.deit, timm.models.vision_transformer as vit
def snapshot():
    found = {}
    for module in (timm, timm.layers, timm.models.eva, timm.models.deit, vit):
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                found.update({(module.__name__, name, k): id(v) for k, v in vars(value).items()})
    return found
before = snapshot()
heavy = {m for m in ("matplotlib", "onnx", "onnxruntime", "sklearn", "fvcore.nn") if m in sys.modules}
import tokenzoo, tokenzoo.cli
assert snapshot() == before, "timm was altered"
new = {m for m in ("matplotlib", "onnx", "onnxruntime", "sklearn", "fvcore.nn") if m in sys.modules} - heavy
assert not new, f"import loads {new}"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
