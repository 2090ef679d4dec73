"""Models of torchvision and open_clip under every method: the checks of test_matrix.py, and the same weights in timm's
and transformers' models as judges."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import hf_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import KEEPS_LENGTH, METHODS, given
from library_cases import SIZE, TOWERS, build, clip_twin, images, open_clip, pooled, serves, timm_twin
from test_hooks import _halve
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tokenzoo
from tokenzoo.cost.trace import count_macs
from tokenzoo.evaluation.classification import evaluate
from tokenzoo.evaluation.runs import Run
from tokenzoo.evaluation.throughput import bench
from tokenzoo.view.maps import token_maps

methods = pytest.mark.parametrize("method", METHODS)
towers = pytest.mark.parametrize("name", TOWERS)
TWINS = ("torchvision", "open_clip", "open_clip_avg", "open_clip_avg_last_norm")
# in two processes: libraries, a tower of transformers in a classifier, and timm's models of several sequences
TRAINED = ("torchvision", "open_clip", "hf_vit_classes", "hiera", "crossvit")
# one of each class of block and attention layer
LAYERS = {"torchvision": "self_attention", "open_clip": "attn", "open_clip_custom": "attn"}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks, patched or not."""
    return list(model.encoder.layers if hasattr(model, "encoder") else model.transformer.resblocks)


# ---- nothing removed, and as much as the report says


@methods
@towers
@torch.no_grad()
def test_zero_reduction_changes_nothing(name, method):
    model, x = build(name), images()
    if not serves(method, name):
        with pytest.raises(ValueError, match="a stem of several convolutions"):
            tokenzoo.patch_model(model, given(method, "zero"))
        return
    plain = model(x)
    with tokenzoo.patched(model, given(method, "zero")):
        # ATS has no strength zero: the queries that it samples leave the class token what it was
        if method != "ats" or name in ("torchvision", "open_clip", "open_clip_custom"):
            torch.testing.assert_close(pooled(model(x)), pooled(plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), plain, atol=0, rtol=0)


@methods
@towers
@torch.no_grad()
def test_reduction(name, method):
    """Counts as reported, intermediates complete, batch mates without influence, names of weights, exact undoing."""
    if not serves(method, name):
        return
    model, x = build(name), images()
    plain, weights, classes = model(x), model.state_dict(), [type(m) for m in model.modules()]
    tokenzoo.patch_model(model, given(method))
    out, tokens, report = pooled(model(x)), model.forward_tokens(x, trace=True), tokenzoo.report(model)
    assert tokens.length <= report.tokens_out if report.data_dependent else tokens.length == report.tokens_out
    assert report.data_dependent or (report.tokens_out == 17) == (method in KEEPS_LENGTH)
    if name != "open_clip_all":  # without pooling the tokens that are left are the answer
        assert out.shape == pooled(plain).shape and not torch.allclose(out, pooled(plain), atol=1e-5)
        alone = torch.cat([pooled(model(image[None])) for image in x])
        torch.testing.assert_close(alone, out, atol=2e-5, rtol=1e-4)
        features = model.forward_head(model.forward_features(x))
        torch.testing.assert_close(pooled(features), out, atol=2e-5, rtol=1e-4)
    found = model.forward_intermediates(x, intermediates_only=True)
    found = found["image_intermediates"] if isinstance(found, dict) else found
    assert [tuple(y.shape) for y in found] == [(3, 32, 4, 4)] * 4
    assert list(model.state_dict()) == list(weights)
    tokenzoo.unpatch_model(model)
    torch.testing.assert_close(model(x), plain, atol=0, rtol=0)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


@methods
@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_the_same_weights_in_timm_give_the_same_answer(name, method):
    model, x = build(name), images()
    twin = timm_twin(model)
    torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-5)
    for kind in ("reduce", "static"):
        with tokenzoo.patched(model, given(method, kind)), tokenzoo.patched(twin, given(method, kind)):
            torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=1e-5)


@methods
@torch.no_grad()
def test_the_same_weights_in_transformers_give_the_same_answer(method):
    model, x = build("open_clip"), images()
    twin = clip_twin(model)
    torch.testing.assert_close(twin(x).image_embeds, model(x), atol=1e-5, rtol=1e-5)
    for kind in ("reduce", "static"):
        with tokenzoo.patched(model, given(method, kind)), tokenzoo.patched(twin, given(method, kind)):
            torch.testing.assert_close(model(x), twin(x).image_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", [None, *(given(name, "static") for name in ("tome", "evit", "mctf", "pool"))])
@towers
def test_counts_are_those_of_tracing(name, recipe):
    model = build(name)
    if recipe is not None:
        tokenzoo.patch_model(model, recipe)
    report, traced = tokenzoo.report(model), count_macs(model, SIZE)
    # a stem's norms are not counted by us, a few of its numbers are by tracing
    assert report.total == pytest.approx(traced.total, rel=0.01)
    assert traced.total > 100_000


# ---- what models go through


@methods
@pytest.mark.parametrize("name", ["torchvision_dropout", "open_clip_tokens", "open_clip_custom"])
def test_copies_after_a_training_step(name, method):
    model, x = build(name).train(), images()
    tokenzoo.patch_model(model, given(method))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pooled(model(x)).square().mean().backward()
    optimizer.step()
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        assert all(torch.equal(pooled(other(x)), pooled(model(x))) for other in copies)
        fresh = build(name)
        fresh.load_state_dict(model.state_dict())
        tokenzoo.unpatch_model(model)
        assert torch.equal(pooled(fresh(x)), pooled(model(x)))


@methods
@pytest.mark.parametrize("name", ["open_clip_attention_pool"])
def test_checkpointed_gradients_are_equal(name, method):
    grads = []
    for checkpointing in (False, True):
        model = build(name).train()
        tokenzoo.patch_model(model, given(method))
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(images()).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-5, msg=key)


@methods
@pytest.mark.parametrize("name", ["torchvision", "open_clip_attention_pool"])
def test_threads_share_one_model(name, method):
    model = tokenzoo.patch_model(build(name), given(method))
    batches = [images(batch=b, seed=s) for s, b in enumerate((1, 2, 3, 4))]

    @torch.no_grad()
    def run(x):
        return [model(x) for _ in range(3)]

    alone = [run(x)[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for expected, outs in zip(alone, pool.map(run, batches)):
            assert all(torch.equal(out, expected) for out in outs)


def _trained(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A patched model of a row of this file, of transformers' or of timm's models in stages or branches, and images."""
    if name in TOWERS:
        return tokenzoo.patch_model(build(name), "tome", r=2), images(4)
    if name.startswith("hf_"):
        return tokenzoo.patch_model(hf_cases.build(name[3:]), "tome", r=2), hf_cases.images(None, 4)
    file = import_module({"hiera": "test_stages", "crossvit": "test_crossvit"}[name])
    x = file.images(name, 4) if name == "hiera" else file.images(4)
    return tokenzoo.patch_model(file.micro(name), "tome", r=2), x


def _gradients(name: str, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Of four images in one process, or of two in each of two."""
    model, x = _trained(name)
    if rank is not None:
        model, x = DistributedDataParallel(model), x[2 * rank : 2 * rank + 2]
    out = model(x)
    (out.logits if hasattr(out, "logits") else pooled(out)).square().mean().backward()
    return {key.removeprefix("module."): p.grad for key, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        torch.save({name: _gradients(name, rank) for name in TRAINED}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for name in TRAINED:
        expected = _gradients(name)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            assert found.keys() == expected.keys() and len(found) > 10
            for key, grad in expected.items():
                torch.testing.assert_close(found[key], grad, atol=1e-6, rtol=1e-4, msg=f"{name} {key}")


@methods
@pytest.mark.parametrize("name", ["torchvision", "open_clip", "open_clip_coca"])
@torch.no_grad()
def test_lower_precision(name, method):
    """With nothing removed bfloat16 is the unpatched model within its rounding; sizes stay float32."""
    model, x = build(name), images()
    low = copy.deepcopy(model).to(torch.bfloat16)
    exact, rounded = pooled(model(x)), pooled(low(x.bfloat16()))
    bound = 4 * float((rounded.float() - exact).abs().max()) + 1e-2
    if method != "ats":
        with tokenzoo.patched(low, given(method, "zero")):
            out = pooled(low(x.bfloat16()))
            assert out.dtype == torch.bfloat16 and float((out.float() - exact).abs().max()) <= bound
    tokenzoo.patch_model(low, given(method, "static"))
    tokens = low.forward_tokens(x.bfloat16())
    assert tokens.x.dtype == torch.bfloat16 and (tokens.size is None or tokens.size.dtype == torch.float32)
    tokenzoo.patch_model(model, given(method, "static"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pooled(model(x)).isfinite().all()


@methods
@pytest.mark.parametrize("name", ["torchvision", "open_clip_attention_pool"])
@torch.no_grad()
def test_one_graph(name, method):
    model, x = build(name), images(2)
    tokenzoo.patch_model(model, given(method, "static"))
    torch._dynamo.reset()  # graphs of other cases count towards a limit
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["torchvision", "open_clip_coca"])
@torch.no_grad()
def test_exported_with_any_batch(name):
    model = tokenzoo.patch_model(build(name), "tome", r=2)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (images(2),), dynamic_shapes=((({0: batch}),)), strict=False)
    for size in (1, 3):
        torch.testing.assert_close(pooled(program.module()(images(size))), pooled(model(images(size))))


# ---- what stands around the layers


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_hooks_on_attention_act_and_fire_once(name):
    model, x = build(name), images()
    seen = []

    def changed(module, args, out):
        seen.append(len(args))
        return 0.5 * out if isinstance(out, torch.Tensor) else (0.5 * out[0], out[1])

    for block in layers_of(model):
        layer = getattr(block, LAYERS[name])
        layer.register_forward_hook(changed)
        layer.register_forward_pre_hook(lambda m, args: tuple(1.5 * arg for arg in args))
        block.ln_2.register_forward_hook(_halve)
    expected = model(x)
    inputs, count = list(seen), len(seen)
    for method in ("tome", "evit", "mctf", "tomesd", "flowcut"):
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        assert seen[-count:] == inputs and len(seen) % count == 0
    with tokenzoo.patched(model, "tome", r=2):
        fired = []
        for block in layers_of(model):
            getattr(block, LAYERS[name]).out_proj.register_forward_hook(lambda m, args, out: fired.append(out.shape))
        model(x)
        assert len(fired) == 4


@torch.no_grad()
def test_a_hook_that_makes_queries_and_keys_differ_is_refused():
    model = build("torchvision")
    layer = layers_of(model)[1].self_attention
    layer.register_forward_pre_hook(lambda m, args: (args[0], 2 * args[1], args[2]))
    tokenzoo.patch_model(model, "tome", r=2)
    with pytest.raises(ValueError, match="queries, keys and values of an attention layer different inputs"):
        model(images())


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_and_blocks_called_by_hand(name):
    model, x = build(name), images()
    z, block = torch.randn(2, 17, 32), layers_of(model)[0]
    layer = getattr(block, LAYERS[name])
    args = (z,) if name == "open_clip_custom" else (z, z, z)
    plain = layer(*args)
    tokenzoo.patch_model(model, "tome", r=2)
    torch.testing.assert_close(layer(*args), plain, atol=0, rtol=0)
    embedded = model.embed(x)[0]
    for each in layers_of(model):
        embedded = each(embedded)
    torch.testing.assert_close(embedded.shape[1], 9)
    torch.testing.assert_close(model.norm(embedded), model.forward_tokens(x).x)


def test_rows_of_reports_are_called_as_the_modules_are():
    for name, first in (("torchvision", "encoder.layers.encoder_layer_0"), ("open_clip", "transformer.resblocks.0")):
        model = tokenzoo.patch_model(build(name), "tome", r=2)
        assert tokenzoo.report(model).rows[1].name == first and model.get_submodule(first) is layers_of(model)[0]


@torch.no_grad()
def test_explained_on_the_grid():
    """What `explain` gives of a patched model that removes nothing is what it gives of the plain one."""
    for name, layer in (("torchvision", "encoder.layers.encoder_layer_1"), ("open_clip", "transformer.resblocks.1")):
        model, x, found = build(name), images(), []
        for r in (None, 0, 2):
            if r is not None:
                tokenzoo.patch_model(model, "tome", r=r)
            taken = []
            handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out, to=taken: to.append(out))
            with tokenzoo.explain(model) as seen:
                model(x)
                found.append(seen.activation(taken[0], layer))
            handle.remove()
            if r is not None:
                tokenzoo.unpatch_model(model)
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
        assert found[2].shape == found[0].shape == (3, 32, 4, 4)


@pytest.mark.parametrize("name", ["torchvision", "open_clip"])
def test_bench_evaluate_and_pictures(name):
    """Images of the model's own size, counts per run, token maps on the grid."""
    model = build(name)
    runs = [Run("tome", {"r": 2}), Run("evit", {"keep_rate": 0.6})]
    results = bench(model, runs, batch_size=2, rounds=1, warmup=1, latency=False)
    assert [speed.input_size for speed in results] == [SIZE] * 3 and results[0].tokens_out == 17
    assert results[1].tokens_out == 9 and results[1].gmacs < results[0].gmacs
    scores = evaluate(model, runs, [(images(4), torch.arange(4))], input_size=SIZE)
    assert [score.n_images for score in scores] == [4] * 3
    maps = token_maps(tokenzoo.patch_model(model, "tome", r=2), images(1))
    assert maps.grid == (4, 4) and len(maps.blocks) == 4


# ---- refused by name


@pytest.mark.parametrize(
    "name,module", [("torchvision", "encoder"), ("open_clip", "transformer"), ("open_clip_coca", "attn_pool")]
)
def test_hooks_that_would_never_fire_are_refused(name, module):
    model = build(name)
    model.get_submodule(module).register_forward_hook(_halve)
    with pytest.raises(ValueError, match=rf"VisionTransformer\.{module} has hooks.*hook (its parts|the blocks)"):
        tokenzoo.patch_model(model, "tome", r=2)


def test_settings_that_are_refused():
    for options in ({"add_zero_attn": True, "batch_first": True}, {"batch_first": False}):
        model = build("torchvision")
        layers_of(model)[2].self_attention = nn.MultiheadAttention(32, 2, **options)
        with pytest.raises(ValueError, match="self_attention is an nn.MultiheadAttention with (add_zero|batch_f)"):
            tokenzoo.patch_model(model, "tome", r=2)
    model = open_clip(patch_dropout=0.5)
    with pytest.raises(ValueError, match="patch_dropout drops random patches"):
        tokenzoo.patch_model(model, "tome", r=2)
    model = open_clip(scaled_cosine_attn=True)
    with pytest.raises(ValueError, match="scaled cosine attention"):
        tokenzoo.patch_model(model, "tome", r=2)


@torch.no_grad()
def test_images_of_another_size_are_refused_as_upstream_does():
    x = torch.randn(1, 3, 48, 48)
    for name, error, words in (
        ("torchvision", AssertionError, "Wrong image height! Expected 32 but got 48!"),
        ("open_clip", ValueError, r"positions for images of \(32, 32\), not of \(48, 48\)"),
    ):
        model = tokenzoo.patch_model(build(name), "tome", r=2)
        with pytest.raises(error, match=words):
            model(x)


# ---- what only one of the libraries has


@torch.no_grad()
def test_attention_pooling_sees_sizes():
    """Pooling of merged tokens by size is pooling of the tokens repeated as often as they stand for patches."""
    model, x = build("open_clip_attention_pool"), images(2)
    tokenzoo.patch_model(model, "tome", r=3)
    tokens, out = model.forward_tokens(x), model(x)
    assert tokens.size.max() > 1
    tokenzoo.unpatch_model(model)
    for image, found in enumerate(out):
        rows = tokens.x[image].repeat_interleave(tokens.size[image, :, 0].long(), dim=0)
        expected, _ = model._pool(rows[None])
        torch.testing.assert_close(found, (expected @ model.proj)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["open_clip", "open_clip_coca", "open_clip_tokens", "open_clip_avg_last_norm"])
@torch.no_grad()
def test_open_clip_intermediates(name):
    model, x = build(name), images()
    options = dict(indices=[1, 3], normalize_intermediates=name != "open_clip_coca", output_extra_tokens=True)
    plain = model.forward_intermediates(x, **options)
    with tokenzoo.patched(model, "tome", r=0):
        for key, value in model.forward_intermediates(x, **options).items():
            torch.testing.assert_close(value, plain[key], atol=1e-5, rtol=1e-5)
    tokenzoo.patch_model(model, "tome", r=2)
    found = model.forward_intermediates(x, **options)
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found["image_features"], pooled(model(x)), atol=1e-5, rtol=1e-5)
    assert [y.shape for y in found["image_intermediates"]] == [y.shape for y in plain["image_intermediates"]]
    short = model.forward_intermediates(x, **options, output_fmt="NLC", intermediates_only=True, stop_early=True)
    assert [y.shape[1] for y in short["image_intermediates"]] == [12, 8] and "image_features" not in short


@torch.no_grad()
def test_tokens_handed_out():
    """`output_tokens`: what is left, all of them with dense=True, and the queries of attention pooling."""
    x, model = images(), build("open_clip_tokens")
    plain = model(x)[1].shape
    for dense, count in ((False, 8), (True, 16)):
        with tokenzoo.patched(model, "tome", r=2, dense=dense):
            assert model(x)[1].shape == (3, count, 32)
    assert plain == (3, 16, 32)
    for name, count in (("open_clip_coca", 4), ("open_clip_parallel", 5)):
        model = tokenzoo.patch_model(build(name), "tome", r=2)
        assert model(x)[1].shape == (3, count, 32)


@torch.no_grad()
def test_pruned_open_clip():
    model, x = build("open_clip"), images()
    tokenzoo.patch_model(model, "tome", r=2)
    every = model.forward_intermediates(x, indices=[1], intermediates_only=True)["image_intermediates"]
    model.prune_intermediate_layers([1])
    assert len(tokenzoo.report(model).rows) == 4 and model.proj is None
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)["image_intermediates"]
    assert torch.equal(every[0], pruned[0])
