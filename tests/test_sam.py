"""SAM image encoders with clustering inside their windows."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

import tokenzoo
from tokenzoo.adapters.sam.blocks import from_windows, to_windows
from tokenzoo.ops.cells.kmeans import cluster
from tokenzoo.ops.cells.reconstruct import reconstruct

CLUSTER = {"method": "cluster", "layers": 1, "grid": (3, 3), "temperature": 0.5}


def micro(img_size=80, **changes):
    torch.manual_seed(0)
    options = {"img_size": img_size, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
    options |= {"window_size": 5, "global_attn_indexes": (1, 3), "use_rel_pos": True, "neck_chans": 16}
    model = VisionTransformerSAM(**{**options, "num_classes": 7, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:  # zeros at first; tokens that differ keep centres apart
                parameter.normal_(std=0.3 if "rel_pos" in name else 1.0)
    return model


# (height, width): windows fit, border windows are filled up in one or both directions
sizes = pytest.mark.parametrize("size", [(80, 80), (60, 80), (44, 72)])


@sizes
def test_windows_come_back(size):
    x = torch.randn(2, size[0] // 4, size[1] // 4, 3)
    windows = to_windows(x, (5, 5))
    assert windows.shape[0] == 2 * -(-x.shape[1] // 5) * -(-x.shape[2] // 5)
    assert torch.equal(from_windows(windows, x.shape[1:3]), x)
    assert torch.equal(windows[0], x[0, :5, :5])


@sizes
@pytest.mark.parametrize("cells", [(3, 3), (2, 4)])
def test_is_the_obvious_loop(size, cells):
    """Timm's own blocks on every window by itself, and on the whole shrunken map."""
    model, x = micro(size), torch.randn(2, 3, *size)
    with torch.no_grad():
        y = model.norm_pre(model.pos_drop(model.patch_embed(x) + model.pos_embed))
        y = model.blocks[1](model.blocks[0](y))
        whole, (high, wide) = tuple(y.shape[1:3]), (-(-n // 5) for n in y.shape[1:3])
        padded = torch.zeros(2, 5 * high, 5 * wide, 32)
        padded[:, : whole[0], : whole[1]] = y
        fewer = torch.zeros(2, high * cells[0], wide * cells[1], 32)
        known = {}
        for i in range(high):
            for j in range(wide):
                tokens = padded[:, 5 * i : 5 * i + 5, 5 * j : 5 * j + 5].flatten(1, 2)
                centers = cluster(tokens, (5, 5), cells, temperature=0.5).centers
                known[i, j] = tokens, centers
                rows, columns = slice(i * cells[0], (i + 1) * cells[0]), slice(j * cells[1], (j + 1) * cells[1])
                fewer[:, rows, columns] = centers.unflatten(1, cells)
        block = model.blocks[2]
        attended = torch.zeros_like(fewer)
        for i in range(high):
            for j in range(wide):
                rows, columns = slice(i * cells[0], (i + 1) * cells[0]), slice(j * cells[1], (j + 1) * cells[1])
                attended[:, rows, columns] = block.attn(block.norm1(fewer[:, rows, columns]))
        fewer = fewer + attended
        fewer = model.blocks[3](fewer + block.mlp(block.norm2(fewer)))
        back = torch.zeros_like(padded)
        for (i, j), (tokens, centers) in known.items():
            values = fewer[:, i * cells[0] : (i + 1) * cells[0], j * cells[1] : (j + 1) * cells[1]].flatten(1, 2)
            lifted = reconstruct(values, tokens, centers, 0.5, 4, "l1")
            back[:, 5 * i : 5 * i + 5, 5 * j : 5 * j + 5] = lifted.unflatten(1, (5, 5))
        expected = model.neck(back[:, : whole[0], : whole[1]].permute(0, 3, 1, 2))
        grouped = {**CLUSTER, "grid": cells}
        tokenzoo.patch_model(model, [grouped, {"method": "reconstruct", "k": 4}])
        torch.testing.assert_close(model.forward_features(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(x), model.forward_head(expected), atol=1e-4, rtol=1e-4)


@sizes
@pytest.mark.parametrize("recipe", ["cluster", {"method": "cluster", "grid": 5}, {"method": "cluster", "scale": 1.0}])
def test_shapes_and_zero_reduction(size, recipe):
    model, x = micro(size), torch.randn(2, 3, *size)
    with torch.no_grad():
        before = model(x), model.forward_features(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        tokenzoo.patch_model(model, [recipe, "reconstruct"])
        after = model(x), model.forward_features(x)
        last, lifted = model.forward_intermediates(x)
        assert torch.equal(last, after[1])
        for old, new in zip((*before, *maps), (*after, *lifted)):
            assert old.shape == new.shape
            same = torch.equal(old, new)
            assert same if recipe != "cluster" else (same or not torch.allclose(old, new, atol=1e-3))
        if recipe == "cluster":
            assert not torch.equal(before[1], after[1])


def test_patch_and_unpatch_leave_no_trace():
    model, x = micro(), torch.randn(2, 3, 80, 80)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    names = set(vars(model)) | {name for block in model.blocks for name in vars(block)}
    with torch.no_grad():
        before = model(x)
        tokenzoo.patch_model(model, [CLUSTER, "reconstruct"])
        patched = model(x)
        assert list(model.state_dict()) == list(weights)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), patched)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), patched)
        assert torch.equal(model(x[:1]), patched[:1]) or torch.allclose(model(x[:1]), patched[:1], atol=1e-5)
        assert tokenzoo.recipe(model)["method"][0]["grid"] == [3, 3]
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(x), before)
    assert type(model) is VisionTransformerSAM
    assert set(vars(model)) | {name for block in model.blocks for name in vars(block)} == names
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_where_and_how_to_rebuild():
    x = torch.randn(2, 3, 80, 80)

    def features(*recipe):
        with tokenzoo.patched(micro(), list(recipe)) as model, torch.no_grad():
            return model.forward_intermediates(x, [3], intermediates_only=True)[0]  # the neck would hide a factor

    grouped = {**CLUSTER, "k": 4}
    expected = features(grouped, {"method": "reconstruct", "k": 4})
    torch.testing.assert_close(features(grouped), expected)  # rebuilt at the end in any case
    torch.testing.assert_close(features({**grouped, "where": "before", "layers": 2}), expected)
    torch.testing.assert_close(features(grouped, {"method": "reconstruct", "k": 4, "layers": 3}), expected)
    for other in ({"k": 1}, {"k": 4, "norm": "l2"}, {"norm": "copy"}, {"k": 4, "layers": 2}):
        assert not torch.allclose(features(grouped, {"method": "reconstruct", **other}), expected, atol=1e-3)
    copied = features(grouped, {"method": "reconstruct", "norm": "copy"})
    torch.testing.assert_close(features(grouped, {"method": "reconstruct", "k": 1}), copied)  # one centre: its value


def test_blocks_by_hand():
    model, x = micro(), torch.randn(2, 3, 80, 80)
    tokenzoo.patch_model(model, [CLUSTER, "reconstruct"])
    with torch.no_grad():
        y = model.pos_drop(model.patch_embed(x) + model.pos_embed)
        assert torch.equal(model.neck(model.blocks(y).permute(0, 3, 1, 2)), model.forward_features(x))
        stopped = model.forward_intermediates(x, [2], stop_early=True, intermediates_only=True)
        assert torch.equal(stopped[0], model.forward_intermediates(x, [2], intermediates_only=True)[0])
        normed = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)
        assert torch.equal(normed[0], model.forward_features(x))


def test_gradients_with_checkpointing():
    model, x = micro(), torch.randn(2, 3, 80, 80)
    tokenzoo.patch_model(model.train(), [CLUSTER, "reconstruct"])
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    copy.deepcopy(model)


@pytest.mark.slow
def test_compiled_and_exported():
    size = (44, 72)
    model, x = micro(size, depth=2, global_attn_indexes=(1,)), torch.randn(2, 3, *size)
    # all centres: where border windows are filled up with zeros, which are nearest is a matter of rounding
    tokenzoo.patch_model(model, [{**CLUSTER, "layers": 0, "iterations": 2}, {"method": "reconstruct", "k": -1}])
    with torch.no_grad():
        compiled = torch.compile(model.forward_features, fullgraph=True)
        torch.testing.assert_close(compiled(x), model.forward_features(x), atol=1e-4, rtol=0)
        batch = torch.export.Dim("batch", min=1, max=16)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        more = torch.randn(3, 3, *size)
        torch.testing.assert_close(program(more), model(more), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(80, 80), (44, 72)])
@pytest.mark.parametrize("fused", [True, False])
def test_macs_are_those_of_a_trace(size, fused):
    model = micro(size)
    for block in model.blocks:
        block.attn.fused_attn = fused
    plain, traced = tokenzoo.report(model), tokenzoo.count_macs(model, (3, *size))
    assert plain.total == pytest.approx(traced.total, rel=1e-3)
    tokenzoo.patch_model(model, [CLUSTER, {"method": "reconstruct", "k": 4}])
    report, traced = tokenzoo.report(model), tokenzoo.count_macs(model, (3, *size))
    assert report.unpatched == plain.total
    for row, (name, macs) in zip(report.rows[1:-1], traced.rows):
        assert row.name == name
        assert row.macs == pytest.approx(macs, rel=2e-2)
    assert ("unfused" if not fused else "fused") == report.attn_impl


def test_budget_and_other_sizes():
    model = timm.create_model("samvit_base_patch16_224", num_classes=5).eval()
    tokenzoo.patch_model(model, "cluster", layers=3, flops=0.6)
    assert tokenzoo.report(model).ratio == pytest.approx(0.6, abs=0.02)
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, ["cluster", "reconstruct"])
    report = tokenzoo.report(model, 336)  # 21 x 21 tokens: border windows are filled up
    assert report.rows[1].tokens_in == 441 and report.rows[-2].tokens_out == 441
    assert 400 in [row.tokens_out for row in report.rows]  # 2 x 2 windows of 10 x 10 centres


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("tome", ["VisionTransformerSAM", "tome", "cluster, reconstruct"]),
        (["cluster", "tome"], ["VisionTransformerSAM", "tome"]),
        ([CLUSTER, {**CLUSTER, "layers": 2}], ["once", "2 times"]),
        ({**CLUSTER, "grid": 6}, ["grid=(6, 6)", "5 x 5"]),
        ({**CLUSTER, "prop_attn": True}, ["prop_attn=False"]),
        ([CLUSTER, {"method": "reconstruct", "layers": "maps"}], ["reconstruct", "maps"]),
        ([{**CLUSTER, "layers": 2}, {"method": "reconstruct", "layers": 1}], ["reconstruct at block 1"]),
    ],
)
def test_recipes_that_are_refused(recipe, words):
    model = micro()
    with pytest.raises(ValueError) as caught:
        tokenzoo.patch_model(model, recipe)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(model) is VisionTransformerSAM and not tokenzoo.is_patched(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_rel_pos": False, "use_rope": True}, "rotary"),
        ({"patch_drop_rate": 0.1}, "patch_drop"),
        ({"window_size": 0}, "windows of no size"),
    ],
)
def test_models_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tokenzoo.patch_model(micro(**changes), CLUSTER)
    model = micro()
    model.blocks[1].attn = torch.nn.Identity()
    with pytest.raises((TypeError, ValueError), match="Identity"):
        tokenzoo.patch_model(model, CLUSTER)
