"""`forward_head(forward_features(x))` is `model(x)`: every method, head and family; and what other heads see."""

from functools import partial

import pytest
import timm
import torch
from cases import BACKBONES, EVA, METHODS, VIT, backbone_names, build, given, images, serves, shaken
from scan_cases import SCAN_METHODS, SCANNERS
from scan_cases import build as build_scanner
from scan_cases import given as given_scan
from torch import nn

import tokenzoo
from tokenzoo.maps import MixMap
from tokenzoo.models import LVViT, SViT

SOFT = {"method": "cluster", "layers": 0, "where": "before", "scale": 0.5}
# every method, and what comes together: sizes here and not there, dropped and padded tokens, soft sizes
RECIPES = {
    **{method: given(method) for method in METHODS},
    "tome_by_mass": given("tome", mass_pool=True),
    "tome_by_mass_alone": given("tome", mass_pool=True, prop_attn=False),
    "tome_plain": given("tome", prop_attn=False),
    "mctf_by_mass_alone": given("mctf", prop_attn=False),
    "algm_prop": given("algm", prop_attn=True),
    "pool_prop": given("pool", prop_attn=True),
    "cluster_prop": {**SOFT, "prop_attn": True},
    "cluster_tome": [{**SOFT, "scale": 0.75, "prop_attn": True}, {"method": "tome", "r": 1, "layers": (1, 2)}],
    "cluster_ats": [{**SOFT, "scale": 0.75, "prop_attn": True}, {"method": "ats", "layers": 2}],
    "topk_mctf": [given("topk", layers=0), given("mctf", r=2, layers=(1, 2))],
    "mctf_topk": [given("topk", layers=2), given("mctf", r=2, layers=(0, 1))],
    "evit_mctf": [given("evit", layers=0), given("mctf", r=1, layers=(1, 2))],
    "ats_mctf": [given("ats", layers=0, max_tokens=12), given("mctf", r=1, layers=(1, 2))],
    "ats_tome": [given("ats", layers=0, max_tokens=12), given("tome", r=1, layers=(1, 2), mass_pool=True)],
    "ats_evit": [given("ats", layers=0, max_tokens=12), given("evit", layers=(1, 2))],
}
PRUNED = {"topk", "evit", "ppt", "topk_mctf", "mctf_topk"}
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2, "num_classes": 7}
SVIT = partial(
    SViT, img_size=128, embed_dim=(8, 12, 16, 24), depths=(1, 1, 4, 2), num_heads=(1, 2, 2, 4),
    stoken_size=(4, 2, 1, 1), projection=32, num_classes=7,
)  # fmt: skip
# every kind of head in every family; the rest of the table of backbones differs in the blocks alone
HEADS = {
    **{name: BACKBONES[name] for name in backbone_names() if name in (
        "deit", "distilled", "registers_only", "gap", "gap_with_class", "avgmax", "max", "map", "map_with_class", "prr",
        "prr_gap", "no_head", "dinov3", "eva_giant", "pe_like", "t2t_vit", "lv_vit", "cait", "cait_avg", "convit",
        "convit_avg",
    )},
    "prefix_too": partial(VIT, global_pool="avg", pool_include_prefix=True),
    "prefix_too_map": partial(VIT, global_pool="map", pool_include_prefix=True, reg_tokens=2),
    "no_fc_norm": partial(VIT, global_pool="avgmax", fc_norm=False),
    "eva_avgmax": partial(EVA, global_pool="avgmax", num_reg_tokens=1),
    "lv_vit_avg": partial(LVViT, global_pool="avg", **SMALL),
    **{f"svit_{kind}": partial(SVIT, global_pool=kind) for kind in ("avg", "catavgmax")},
}  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(name):
    torch.manual_seed(0)
    model = shaken(HEADS[name]())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:  # statistics that keep values small
        model.train()(images(model, seed=5))
    return model.eval()


def agrees(model, x, pre_logits=True):
    """Checks features against the model, with and without the classifier, and returns them with the logits."""
    features, expected = model.forward_features(x), model(x)
    assert type(features) is torch.Tensor
    torch.testing.assert_close(model.forward_head(features), expected, **CLOSE)
    if pre_logits:
        pooled = model.forward_head(model.forward_tokens(x), pre_logits=True)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled, **CLOSE)
    return features, expected


def taken(name, model, recipe):
    """Whether the model takes the recipe; if not, it has to be one of the refusals that have tests of their own."""
    methods = [part["method"] for part in (recipe if isinstance(recipe, list) else [recipe])]
    if isinstance(model, SViT):
        return not {"ats", "cts"} & {*methods}
    return all(serves(method, model) for method in methods)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_head_reads_features_as_the_model_does(name):
    """So do heads outside of the model: means and maxima always, attention pooling where nothing is missing."""
    model, outside = make(name), make(name)  # the same weights; one is never patched
    x = images(model)
    for number, (key, recipe) in enumerate(RECIPES.items()):
        if not taken(name, model, recipe):
            continue
        with tokenzoo.patched(model, recipe):
            features, expected = agrees(model, x, number % 3 == 0)
            fmt = {} if number % 2 or isinstance(model, SViT) else {"output_fmt": "NLC"}
            final, _ = model.forward_intermediates(x, **fmt)
            torch.testing.assert_close(final, features, **CLOSE, equal_nan=True, msg=f"{key} {fmt}")
            attends = model.head_reads().attends
            soft = not all(step.map.whole for step in model.forward_tokens(x, trace=True).trace)
        found, missing = outside.forward_head(features), key in PRUNED or "ats" in key or "algm" in key
        if features.isnan().any():  # sizes have rows of their own: no number is better than a wrong one
            assert found.isnan().any(1).all() and (soft or name == "prr_gap"), key
        elif not (missing and attends):
            torch.testing.assert_close(found, expected, **CLOSE, msg=f"{name} {key}")


@pytest.mark.parametrize("fill", ["stash", "zero"])
@pytest.mark.parametrize("name", ["deit", "gap", "avgmax", "siglip_like", "prr_gap", "no_head", "lv_vit", "svit_avg"])
@torch.no_grad()
def test_dense_features_are_what_the_head_pools(name, fill):
    if name not in {*HEADS, "siglip_like"}:
        pytest.skip(f"the installed timm has no {name}")
    model = build(name) if name == "siglip_like" else make(name)
    x = images(model)
    full = model.forward_features(x).shape
    for key in ("tome", "mctf", "evit", "topk", "ats", "cluster", "algm", "mctf_topk"):
        if taken(name, model, RECIPES[key]):
            with tokenzoo.patched(model, RECIPES[key], dense=True, fill=fill):
                assert agrees(model, x)[0].shape == full
                final, _ = model.forward_intermediates(x)
                torch.testing.assert_close(final, model.forward_features(x), **CLOSE)


@pytest.mark.parametrize("name", SCANNERS)
@torch.no_grad()
def test_scanning_models(name):
    model = build_scanner(name)
    x, scans = images(model), {method: given_scan(method) for method in SCAN_METHODS}
    scans["tome_by_mass"] = given_scan("tome", mass_pool=True)
    scans["pruned_and_merged"] = [given_scan("uniform", layers=0), given_scan("tome", r=1, layers=1, mass_pool=True)]
    for recipe in scans.values():
        for dense in (False, True):
            with tokenzoo.patched(model, recipe, dense=dense):
                features, expected = agrees(model, x)
                # the unpatched head finds the class tokens as well
                if model.global_pool:
                    plain = next(c for c in type(model).__mro__ if c.__module__.startswith("tokenzoo.models"))
                    torch.testing.assert_close(plain.forward_head(model, features), expected, **CLOSE)


@torch.no_grad()
def test_tokens_that_are_left_stay_what_features_are():
    """No head that reads tokens one by one, or all alike, gets another shape."""
    for name, method, count in (
        ("deit", "mctf", None), ("deit", "algm", None), ("gap", "tome", None), ("gap", "evit", None),
        ("max", "mctf", None), ("map", "topk", None), ("map", "pool", None), ("no_head", "mctf", None),
        ("gap", "mctf", 16), ("map", "tome", 16), ("gap", "pool", 16),
    ):  # fmt: skip
        model = make(name)
        x = images(model)
        with tokenzoo.patched(model, given(method)):
            tokens = model.forward_tokens(x, trace=True)
            features = model.forward_features(x)
            assert features.shape[1] == (tokens.length if count is None else count)
            if count is None:
                assert torch.equal(features, tokens.x)
            else:  # every patch reads its token, in its place
                assign = tokenzoo.core.tokens.trace_assign(tokens.trace, len(x), count, x.device)
                assert torch.equal(features, tokens.x.gather(1, assign.unsqueeze(2).expand(-1, -1, 32)))


@torch.no_grad()
def test_another_pooling_by_hand():
    """Features answer every pooling that asks for no sizes, and are refused by name where it does."""
    for method in ("topk", "tome", "ats"):
        model = make("gap_with_class") if method != "ats" else make("deit")
        x = images(model)
        with tokenzoo.patched(model, given(method)):
            features, tokens = model.forward_features(x), model.forward_tokens(x)
            for kind in ("token", "avg", "max", "avgmax", ""):
                expected = model.pool(tokens, kind) if kind else features
                torch.testing.assert_close(model.pool(features, kind), expected, **CLOSE)
    model = make("deit")
    with tokenzoo.patched(model, given("mctf")):
        features = model.forward_features(images(model))
        with pytest.raises(ValueError, match=r"VisionTransformer.pool.*'token'.*'avg'.*model.forward_tokens\(images\)"):
            model.pool(features, "avg")


class Apart(nn.Module):
    """Features and head one after the other."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_head(self.model.forward_features(x))


APART = [("map_with_class", "ats_mctf"), ("avgmax", "cluster_prop"), ("gap", "mctf_topk"), ("map", "tome")]


@pytest.mark.parametrize("name,key", APART)
def test_gradients_and_narrow_numbers(name, key):
    """Equal gradients, and bfloat16 within rounding."""
    model = make(name)
    x = images(model)
    tokenzoo.patch_model(model, RECIPES[key])
    grads = []
    for call in (model, Apart(model)):
        grads.append(torch.autograd.grad(call(x).square().sum(), list(model.parameters()), allow_unused=True))
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        model.to(torch.bfloat16)
        found, wanted = Apart(model)(x.bfloat16()).float(), model(x.bfloat16()).float()
        torch.testing.assert_close(found, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("name,key", APART[:2])
@torch.no_grad()
def test_one_graph_and_one_program(name, key):
    model = make(name)
    x = images(model)
    tokenzoo.patch_model(model, RECIPES[key])
    torch._dynamo.reset()
    compiled = torch.compile(Apart(model), fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    program = torch.export.export(Apart(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


@torch.no_grad()
def test_a_map_of_the_users_own_may_share_tokens_out():
    """Maps that say nothing about whole masses are taken as soft: right, if only for the model's own head."""

    class Mixing(tokenzoo.ToMe):
        def map(self, tokens, signals, step):
            if step.block:
                return None
            weight = torch.rand(len(tokens.x), tokens.length - 3, tokens.length, generator=torch.manual_seed(0)) ** 8
            return MixMap(weight / weight.sum(2, keepdim=True))

    for name in ("gap", "avgmax", "map", "prr_gap"):
        if name in HEADS:
            model = make(name)
            with tokenzoo.patched(model, Mixing(r=1, mass_pool=True)):
                assert agrees(model, images(model))[0].shape[1] != 16


def test_distillation_of_features_as_timm_does_it():
    """timm's FeatureDistillationTask calls the two apart, in training: same loss as with the model whole."""
    task = pytest.importorskip("timm.task")
    if not hasattr(task, "FeatureDistillationTask"):
        pytest.skip("the installed timm has no FeatureDistillationTask")
    for name, key in (("gap", "mctf"), ("map", "tome"), ("gap_with_class", "ats")):
        student, teacher = make(name), make("deit")
        teacher.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        student.pretrained_cfg = teacher.pretrained_cfg
        tokenzoo.patch_model(student, RECIPES[key])
        trainer = task.FeatureDistillationTask(
            student, teacher, criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False
        )
        x, target = images(student), torch.tensor([0, 1, 2])
        out = trainer(x, target)
        torch.testing.assert_close(out["output"], student(x), **CLOSE)
        out["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@torch.no_grad()
def test_wrapper_of_transformers():
    """Logits with and without hidden states: the wrapper takes features and head apart, as open_clip's does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="vit_base_patch16_siglip_gap_224", num_labels=5,
        model_args={"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3},
    )  # fmt: skip
    model = transformers.TimmWrapperForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    tokenzoo.patch_model(model.timm_model, "mctf", r=2, min_tokens=4)
    expected = model.timm_model(x)
    torch.testing.assert_close(model(x).logits, expected, **CLOSE)
    out = model(x, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert all(h.shape == (2, 48, 4, 4) for h in out.hidden_states)


@torch.no_grad()
def test_released_names_of_timm():
    """SigLIP's and PE's real heads, cut down."""
    for name in ("vit_base_patch16_siglip_224", "vit_pe_core_base_patch16_224", "vit_base_patch16_siglip_gap_224"):
        options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        model = timm.create_model(name, **options).eval()
        for method in ("tome", "mctf", "topk"):
            with tokenzoo.patched(model, given(method)):
                agrees(model, images(model))
