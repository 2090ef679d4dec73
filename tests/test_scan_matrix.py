"""Every method that serves scans on models that scan: identity at zero, order of tokens, exact undoing, copies."""

import copy
import io
import json
import pickle
from itertools import product

import pytest
import torch
import yaml
from cases import METHODS as ALL_METHODS
from scan_cases import CORE, SCAN_KEEPS_LENGTH, SCAN_METHODS, SCANNERS, build, given, images, shaken, total

import tokenzoo
from tokenzoo.core.mixins import Scanning
from tokenzoo.models import VisionMamba
from tokenzoo.models.plain_mamba.mixer import on_grid
from tokenzoo.ops.scan_order import from_scan, to_scan

pairs = pytest.mark.parametrize("method", SCAN_METHODS)
scanners = pytest.mark.parametrize("scanner", SCANNERS)
cores = pytest.mark.parametrize("scanner", CORE)


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in SCANNERS}


def test_the_table_has_a_row_for_every_method_that_serves_scans():
    serving = [name for name in tokenzoo.list_methods() if tokenzoo.create_method(name).serves_scans]
    assert SCAN_METHODS == serving


@pairs
@scanners
@torch.no_grad()
def test_zero_reduction_changes_nothing(models, method, scanner):
    model = models[scanner]
    x = images(model)
    plain, features = model(x), model.forward_features(x)
    final, maps = model.forward_intermediates(x)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC")
    with tokenzoo.patched(model, given(method, "zero")):
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.forward_features(x), features, atol=1e-5, rtol=1e-5)
        got, found = model.forward_intermediates(x)
        torch.testing.assert_close(got, final, atol=1e-5, rtol=1e-5)
        for a, b in zip(found, maps, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        tokens = model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC")
        for a, b in zip(tokens, normed, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), plain)


@pairs
@scanners
@torch.no_grad()
def test_reduction(models, method, scanner):
    """Counts as reported, order and class token kept, intermediates complete, no influence of batch mates, undoing."""
    model = models[scanner]
    x = images(model)
    plain, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    full = model.forward_intermediates(x, intermediates_only=True)
    tokenzoo.patch_model(model, given(method))
    try:
        walked = list(model.walk(x, trace=True))
        tokens, report, out = walked[-1], tokenzoo.report(model), model(x)
        assert tokens.length == report.tokens_out
        # a mean weighted by size is read off all tokens
        weighs = model.tokenzoo_recipe.mass_weighted_pool and model.global_pool == "avg"
        assert model.forward_features(x).shape[1] == (total(model) if weighs else tokens.length)
        assert (tokens.length < total(model)) != (method in SCAN_KEEPS_LENGTH)
        assert out.isfinite().all() and out.shape[0] == plain.shape[0] and out.shape[-1] == plain.shape[-1]
        assert out.shape != plain.shape or not torch.allclose(out, plain, atol=1e-4)
        for after in walked:
            check_order(model, after)
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(alone, out, atol=2e-5, rtol=1e-4)
        lifted = model.forward_intermediates(x, intermediates_only=True)
        assert [y.shape for y in lifted] == [y.shape for y in full] and all(y.isfinite().all() for y in lifted)
        short = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        assert short[-1].shape[1] == tokens.num_patches
        assert list(model.state_dict()) == list(state)
    finally:
        tokenzoo.unpatch_model(model)
    assert torch.equal(model(x), plain)
    assert type(model) in tokenzoo.apply.patch.find_family(model).models
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("tokenzoo" in key for module in model.modules() for key in vars(module))


def check_order(model, tokens):
    """Patches ascend in original positions, prefix tokens are themselves, and rows name places in the sequence."""
    prefix, positions = model.num_prefix_tokens, tokens.original_positions()
    assert (positions.diff(dim=1) > 0).all() and positions[:, prefix:].max() < total(model)
    assert torch.equal(positions[:, :prefix], torch.arange(prefix).expand(len(positions), -1))
    for step in tokens.trace:
        assert torch.equal(step.map.heads[:, :prefix], torch.arange(prefix).expand(len(positions), -1))
        assert torch.equal(step.map.assign[:, :prefix], torch.arange(prefix).expand(len(positions), -1))
    composed = torch.arange(total(model)).expand(len(positions), -1)
    for step in tokens.trace:
        composed = composed.gather(1, step.map.heads)
    assert torch.equal(composed, positions)
    rows = tokens.layout.scan_rows if tokens.rows is None else tokens.rows
    numbers = torch.arange(tokens.length).expand(len(positions), -1).unsqueeze(-1)
    there = to_scan(numbers, rows)
    assert torch.equal(from_scan(there, rows), numbers)
    at = torch.as_tensor(rows).expand(len(positions), -1)
    assert torch.equal(there.squeeze(-1).gather(1, at), torch.arange(prefix).expand(len(positions), -1))


@pairs
@pytest.mark.parametrize("scanner", ["vim", "vim_both", "vim_stride", "plain_mamba", "plain_mamba_odd"])
@torch.no_grad()
def test_the_flow_is_that_of_the_plain_blocks(models, method, scanner):
    """The unpatched blocks, called one by one on both of their tensors, with the maps that were decided as matrices."""
    model = models[scanner]
    x = images(model)
    with tokenzoo.patched(model, given(method)):
        methods, walked, out = model.tokenzoo_recipe.methods, list(model.walk(x, trace=True)), model(x)
    if any(m.gap_rule is not None for m in methods):
        pytest.skip("the plain blocks have no gaps to decay over")
    places, trace = {m.name: m.place for m in methods}, walked[-1].trace
    first, layout = walked[0], walked[0].layout
    h, res = torch.zeros_like(first.x), first.x  # what a block adds to the stream, and the stream
    for index, block in enumerate(model.layers):
        maps = {place: [] for place in ("before", "ahead", "behind")}
        for step in (s for s in trace if s.block == index):
            place = places[step.method]
            maps[place if place in maps else "behind"].append(step.map.matrix().float())
        before, after = walked[index], walked[index + 1]
        assert not (maps["behind"] and (maps["before"] or maps["ahead"])), "rows in between are not recorded"
        at = before if maps["behind"] else after  # whose sequence is scanned
        for w in maps["before"]:
            h, res = w @ h, w @ res
        res, h = res + h, None
        z = block.norm(res)
        for w in maps["ahead"]:
            res, z = w @ res, w @ z
        if isinstance(model, VisionMamba):
            rows = layout.scan_rows if at.rows is None else at.rows
            h = from_scan(block.mixer(to_scan(z, rows)), rows)
        else:
            h = block.mamba(z, layout.grid, at.positions)
            if block.dw is not None:
                h, res = on_grid(block.dw, res + h, layout.grid, at.positions), torch.zeros_like(res)
        for w in maps["behind"]:
            h, res = w @ h, w @ res
        torch.testing.assert_close(res + h, after.x, atol=1e-4, rtol=1e-4)
    norm = model.norm_f if isinstance(model, VisionMamba) else model.ln1
    pooled = norm(res + h)
    prefix = model.num_prefix_tokens
    if prefix:
        pooled = pooled[:, :prefix].mean(1)
    elif any(m.mass_weighted_pool for m in methods) and walked[-1].size is not None:
        size = walked[-1].size
        pooled = (pooled * size).sum(1) / size.sum(1)
    else:
        pooled = pooled.mean(1)
    torch.testing.assert_close(model.head(pooled), out, atol=1e-4, rtol=1e-4)


@pairs
@torch.no_grad()
def test_a_class_token_left_to_itself_stays_between_its_neighbours(models, method):
    """Unless a method puts it elsewhere, as many patches stand before it as had been there."""
    model = models["vim_odd"]
    with tokenzoo.patched(model, given(method)):
        walked = list(model.walk(images(model)))
        steps = {index: steps for index, block in enumerate(model.layers) if (steps := block.tokenzoo.steps)}
    for index, after in enumerate(walked[1:]):
        if after.rows is None:
            continue
        done = [step for at in range(index + 1) for step in steps.get(at, ())]
        moved = [
            step.method.scan_rows(walked[0], _kept_map(after), step)
            for step in done
            if isinstance(step.method, Scanning)
        ]
        if all(rows is None for rows in moved):
            patches = after.positions[:, 1:] - 1
            assert torch.equal(torch.as_tensor(after.rows), (patches < 7).sum(1, keepdim=True))


def _kept_map(tokens):
    return tokenzoo.maps.KeepMap(tokens.original_positions(), tokens.layout.num_patches + tokens.layout.num_prefix)


@pairs
@cores
def test_survives_copies_after_a_training_step(method, scanner):
    model = build(scanner).train()
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(x), model(x))
            assert tokenzoo.recipe(other) == tokenzoo.recipe(model)
        plain, patched = build(scanner, seed=1), tokenzoo.patch_model(build(scanner, seed=1), given(method))
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        plain.load_state_dict(model.state_dict())  # a checkpoint of the patched model fits the plain one
        out = model(x)
        tokenzoo.unpatch_model(model)
        assert torch.equal(plain(x), model(x))
        patched.load_state_dict(plain.state_dict())  # and the reverse
        assert torch.equal(patched(x), out)
        patched.load_state_dict(before)
        assert not torch.equal(patched(x), out)


@pairs
@pytest.mark.parametrize("scanner", ["vim_odd", "plain_mamba_late_depthwise"])
def test_checkpointed_gradients_are_equal(method, scanner):
    """With stochastic depth on, which has to draw the same both times."""
    grads = []
    for checkpointing in (False, True):
        model = build(scanner).train()
        tokenzoo.patch_model(model, given(method))
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(images(model)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)


@pairs
@cores
def test_threads_share_one_model(models, method, scanner):
    from concurrent.futures import ThreadPoolExecutor

    model = models[scanner]
    batches = [images(model, batch=b, seed=s) for s, b in enumerate((1, 2, 3, 4))]

    @torch.no_grad()
    def run(x):
        return [model(x) for _ in range(3)]

    with tokenzoo.patched(model, given(method)):
        alone = [run(x)[0] for x in batches]
        with ThreadPoolExecutor(4) as pool:
            for expected, outs in zip(alone, pool.map(run, batches)):
                assert all(torch.equal(out, expected) for out in outs)


@pairs
@cores
@torch.no_grad()
def test_number_formats(method, scanner):
    model = build(scanner)
    x = images(model)
    tokenzoo.patch_model(model, given(method, "static"))
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.forward_tokens(x)
        assert tokens.size is None or tokens.size.dtype == torch.float32
        assert (model(x).float() - exact).abs().mean() < 0.3 * exact.abs().mean()
    for dtype in (torch.bfloat16, torch.float16):
        small = copy.deepcopy(model).to(dtype)
        out = small(x.to(dtype))
        assert out.dtype == dtype and out.isfinite().all()
        maps = small.forward_intermediates(x.to(dtype), intermediates_only=True)
        tokenzoo.unpatch_model(small)
        plain = small.forward_intermediates(x.to(dtype), intermediates_only=True)
        assert [y.dtype for y in maps] == [y.dtype for y in plain]
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double()).float(), exact, atol=1e-4, rtol=1e-4)


@pairs
@cores
@pytest.mark.parametrize("fill", ["stash", "nearest", "zero"])
@torch.no_grad()
def test_lifting_on_an_uneven_grid(method, scanner, fill):
    """15 x 20 patches; PlainMamba's image is not a whole number of them."""
    torch.manual_seed(0)
    model = shaken(SCANNERS[scanner](img_size=(60, 80), patch_size=4, depth=2))
    x = torch.randn(2, 3, *((58, 77) if scanner.startswith("plain") else (60, 80)))
    plain, maps = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    with tokenzoo.patched(model, given(method, "zero"), dense=True, fill=fill):
        torch.testing.assert_close(model.forward_features(x), plain, atol=1e-5, rtol=1e-5)
    tokenzoo.patch_model(model, given(method), dense=True, fill=fill)
    dense = model.forward_features(x)
    assert dense.shape == plain.shape and dense.isfinite().all()
    lifted = model.forward_intermediates(x, intermediates_only=True, norm=True)
    assert [y.shape for y in lifted] == [y.shape for y in maps]
    patches = from_scan(dense, model.scan_rows((15, 20)))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(lifted[-1].flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model.forward_features(image[None]) for image in x])
    torch.testing.assert_close(alone, dense, atol=2e-5, rtol=1e-4)


@pairs
@cores
@torch.no_grad()
def test_tokens_that_stand_for_themselves_come_back_unchanged(models, method, scanner):
    model = models[scanner]
    x = images(model)
    with tokenzoo.patched(model, given(method)):
        tokens = model.forward_tokens(x, dense=True)
        back = model.lift_features(tokens)
    assign = tokenzoo.core.tokens.trace_assign(tokens.trace, len(x), total(model), x.device)
    single = 0
    for image in range(len(x)):
        members = torch.bincount(assign[image][assign[image] >= 0], minlength=tokens.length)
        own = (assign[image] >= 0) & (members[assign[image].clamp(min=0)] == 1)
        single += int(own.sum())
        assert torch.equal(back[image, own], tokens.x[image, assign[image][own]])
    assert single > 0 or tokens.num_patches < 5


@pairs
@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
@torch.no_grad()
def test_features_only(method, name):
    import timm

    options = dict(img_size=64, depth=3, embed_dim=24, d_state=4, features_only=True, out_indices=(0, 2))
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    tokenzoo.patch_model(model, given(method))
    assert [f.shape for f in model(x)] == [f.shape for f in plain]
    assert not torch.allclose(model(x)[-1], plain[-1])
    tokenzoo.unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain))


@pairs
@cores
@torch.no_grad()
def test_pruned_and_stopped_early(method, scanner):
    model = build(scanner)
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    stopped = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    every = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(stopped, every, strict=True))
    final, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    model.prune_intermediate_layers([0, 1], prune_head=False)
    assert len(model.blocks) == 2
    pruned = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, every, strict=True))
    assert torch.equal(model.forward_features(x), final)
    assert len(tokenzoo.report(model).rows) == 4


@pytest.mark.parametrize("first,second", list(product(SCAN_METHODS, SCAN_METHODS)))
@cores
def test_two_methods(first, second, scanner, tmp_path):
    """Counts, gradients, order and positions, and a recipe that survives JSON and YAML."""
    model = build(scanner)
    x = images(model)
    tokenzoo.patch_model(model, _together(first, second))
    walked = list(model.walk(x, trace=True))
    for after in walked:
        check_order(model, after)
    names = {step.method for step in walked[-1].trace}
    assert names == {first, second} - SCAN_KEEPS_LENGTH
    assert walked[-1].length == tokenzoo.report(model).tokens_out
    out = model(x)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    weights = [model.patch_embed.stem[0] if hasattr(model.patch_embed, "stem") else model.patch_embed.proj, model.head]
    assert all(layer.weight.grad.abs().sum() > 0 for layer in weights)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(alone, out, atol=3e-5, rtol=1e-4)
        saved = tokenzoo.recipe(model)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(saved))
        for again in (json.loads(json.dumps(saved)), str(file)):
            other = tokenzoo.patch_model(build(scanner), again)
            assert tokenzoo.recipe(other) == saved and torch.equal(other(x), out)


def _together(first, second):
    """Both methods with their reducing options, at strengths that leave something for the other."""
    out = []
    for name in (first, second):
        rows = given(name)
        for options in rows if isinstance(rows, list) else [dict(rows)]:
            if type(options.get("r")) is int:
                options.update(r=1)
            out.append(options)
    return out


@pytest.mark.parametrize("method", [name for name in ALL_METHODS if name not in SCAN_METHODS])
@cores
def test_methods_that_look_at_attention_are_refused_by_name(models, method, scanner):
    model = models[scanner]
    x = images(model)
    with torch.no_grad():
        plain = model(x)
        with pytest.raises(ValueError) as refusal:
            tokenzoo.patch_model(model, method)
        assert torch.equal(model(x), plain)
    message = str(refusal.value)
    assert method in message and type(model).__name__ in message and "uniform" in message
    assert not tokenzoo.apply.patch.is_patched(model)


@pairs
@cores
@torch.no_grad()
def test_what_a_scan_cannot_do_is_refused(models, method, scanner):
    model = models[scanner]
    x = images(model)
    features = model.forward_features(x)
    with tokenzoo.patched(model, given(method)):
        with pytest.raises(ValueError, match="no attention that an attn_mask could act on; leave it out"):
            model.forward_tokens(x, attn_mask=torch.ones(total(model), total(model), dtype=torch.bool))
        with pytest.raises(ValueError, match="no attention that an attn_mask could act on; leave it out"):
            model.forward_intermediates(x, attn_mask=torch.ones(total(model), total(model), dtype=torch.bool))
        with pytest.raises(TypeError, match="called without its model; call the model, or unpatch it"):
            model.layers[0](features)
        torch.testing.assert_close(model.forward_head(model.forward_tokens(x)), model(x))
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
