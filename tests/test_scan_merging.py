"""Merging on models that scan (mtr, rmeeto, famba): against plain loops, what must hold, options, costs, refusals."""

import pytest
import scan_merging_reference as reference
import timm
import torch
from cases import VIT
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import build, images

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.mixer_signals import MixerSignals
from tokenzoo.core.tokens import Layout, Tokens, trace_assign
from tokenzoo.maps import KeepMap, MergeMap
from tokenzoo.methods.famba import FambaV
from tokenzoo.methods.mtr import MTR
from tokenzoo.methods.rmeeto import RMeeTo
from tokenzoo.ops.matching.by_step import group_by_score
from tokenzoo.ops.matching.ordered import alternate_pairs, sort_pairs
from tokenzoo.ops.scan_order import to_scan

REDUCE = {"famba": {"r": 3}, "mtr": {"r": 4, "layers": (0, 1)}, "rmeeto": {"r": 3, "interval": 1}}
SCANNERS = ("vim", "vim_first", "vim_both", "vim_none", "vim_stride", "vim_v1", "vim_forward", "plain_mamba_depthwise")
methods = pytest.mark.parametrize("name", sorted(REDUCE))
scanners = pytest.mark.parametrize("scanner", SCANNERS)
random_sizes = given(
    n=st.integers(4, 15), prefix=st.integers(0, 2), share=st.floats(0.05, 1), seed=st.integers(0, 10_000)
)


class FakeSignals:
    """What methods read, drawn at random."""

    def __init__(self, n, seed=0, batch=2, dim=6, directions=2):
        g = torch.Generator().manual_seed(seed)
        self.training, self.directions = False, directions
        self.hidden = torch.randn(batch, n, dim, generator=g)
        self.normed = torch.randn(batch, n, dim, generator=g)
        widths = {"delta": 5, "raw_delta": 5, "B": 3, "C": 3}
        self._scan = {k: torch.rand(directions, batch, n, w, generator=g) for k, w in widths.items()}

    def scanned(self, name, direction):
        return self._scan[name][direction]

    step_size = MixerSignals.step_size


def sequence(n, prefix, seed=0, batch=2, sizes=True):
    g = torch.Generator().manual_seed(seed + 1)
    layout = Layout(prefix, False, (1, n - prefix), True, True, scan_rows=tuple(range(prefix)))
    size = torch.randint(1, 5, (batch, n, 1), generator=g).float() if sizes else None
    return Tokens(torch.randn(batch, n, 4, generator=g), layout, size)


def act(method, tokens, signals, strength):
    step = Step(method, 1, strength)
    token_map = method.map(tokens, signals, step)
    assert token_map.n_out == step.tokens_out(tokens.length, tokens.layout)
    return token_map


def same_merges(token_map, tokens, image, groups, weighted):
    x, sizes = reference.merged(tokens.x[image], tokens.sizes()[image, :, 0].tolist(), groups, weighted)
    torch.testing.assert_close(token_map.apply(tokens.x)[image], x, atol=1e-5, rtol=1e-5)
    assert token_map.pool(tokens.sizes())[image, :, 0].tolist() == sizes
    assert token_map.heads[image].tolist() == [group[0] for group in groups]
    slots = {i: slot for slot, group in enumerate(groups) for i in group}
    assert token_map.assign[image].tolist() == [slots[i] for i in range(tokens.length)]


# ---- against plain loops


@settings(max_examples=40, deadline=None)
@random_sizes
@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
def test_rmeeto_against_loops(distance, n, prefix, share, seed):
    n += prefix
    r = max(1, int(share * ((n - prefix) // 2)))
    tokens, signals = sequence(n, prefix, seed), FakeSignals(n, seed)
    token_map = act(RMeeTo(distance=distance), tokens, signals, r)
    for image in range(2):
        groups = reference.even_odd_groups(signals.hidden[image].tolist(), r, prefix, distance)
        same_merges(token_map, tokens, image, groups, weighted=True)


@settings(max_examples=40, deadline=None)
@random_sizes
def test_famba_against_loops(n, prefix, share, seed):
    n += prefix
    r = max(1, int(share * ((n - prefix) // 2)))
    tokens, signals = sequence(n, prefix, seed), FakeSignals(n, seed)
    token_map = act(FambaV(), tokens, signals, r)
    for image in range(2):
        # the class token counts: it is the first even one
        groups = reference.even_odd_groups(signals.normed[image].tolist(), r, prefix, first_even=0)
        same_merges(token_map, tokens, image, groups, weighted=False)


@settings(max_examples=40, deadline=None)
@random_sizes
@pytest.mark.parametrize("targets, weighted", [(2.0, True), (0.5, True), (1, False), (100, True)])
def test_mtr_against_loops(targets, weighted, n, prefix, share, seed):
    n += prefix
    r = max(1, int(share * (n - prefix - 1)))
    tokens, signals = sequence(n, prefix, seed), FakeSignals(n, seed, directions=3)
    token_map = act(MTR(targets=targets, weighted=weighted), tokens, signals, r)
    count = min(-int(-targets * r // 1), n - prefix - r)
    for image in range(2):
        steps = [signals.scanned("delta", way)[image].tolist() for way in range(3)]
        scores = [sum(sum(way[i]) / len(way[i]) for way in steps) for i in range(n)]
        groups, kept, target, source = reference.step_groups(tokens.x[image].tolist(), scores, r, count, prefix)
        same_merges(token_map, tokens, image, groups, weighted)
        assert (len(kept), len(target), len(source)) == (n - prefix - r - count, count, r)
        # tokens that may not receive stay bit by bit
        new = token_map.assign[image]
        for i in [*range(prefix), *kept]:
            assert torch.equal(token_map.apply(tokens.x)[image, new[i]], tokens.x[image, i])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 10_000), data=st.data())
def test_groups_stand_in_the_order_of_their_scores(n, seed, data):
    r = data.draw(st.integers(1, n - 1))
    targets = data.draw(st.integers(1, n - r))
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    groups = group_by_score(scores, r, targets)
    assert [g.shape[1] for g in groups] == [n - r - targets, targets, r]
    assert torch.equal(torch.cat(groups, dim=1).sort(dim=1)[0], torch.arange(n).expand(2, -1))
    of = [scores.gather(1, g) for g in groups]
    for better, worse in zip(of, of[1:]):
        if better.shape[1]:
            assert (better.min(1)[0] >= worse.max(1)[0]).all()


def test_far_pairs_agree_with_and_without_a_kernel(monkeypatch):
    metric = torch.randn(2, 31, 8, generator=torch.Generator().manual_seed(0))
    plain = alternate_pairs(metric, 9, 1, "l1")
    monkeypatch.setattr("tokenzoo.ops.matching.ordered._ELEMENTS", 500)  # several slices
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for one, other in zip(plain[:3], alternate_pairs(metric, 9, 1, "l1")[:3]):
        assert torch.equal(one, other)


def test_zero_vectors_are_at_distance_zero():
    metric = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(3))
    metric[:, 2], metric[:, 5] = 0, 0
    pairs = alternate_pairs(metric, 1, 0, "l2")
    assert pairs.src.tolist() == [[2]] and pairs.order.gather(1, pairs.slot).tolist() == [[5]]
    assert alternate_pairs(metric, 4, 0).order.shape == (1, 4)


def test_sorting_keeps_the_merges():
    metric = torch.randn(3, 21, 5, generator=torch.Generator().manual_seed(0))
    pairs = alternate_pairs(metric, 6, 2)
    ordered = sort_pairs(pairs)
    assert (ordered.order.diff(dim=1) > 0).all() and not (pairs.order.diff(dim=1) > 0).all()
    assert torch.equal(ordered.src, pairs.src)
    assert torch.equal(ordered.order.gather(1, ordered.slot), pairs.order.gather(1, pairs.slot))


# ---- on models


def rows_of(tokens):
    return tokens.layout.scan_rows if tokens.rows is None else tokens.rows


@methods
@scanners
def test_what_must_hold_on_a_model(name, scanner):
    model = build(scanner)
    total = model.num_prefix_tokens + model.patch_embed.num_patches
    x = images(model)
    # someone who reads sizes, so that they are tracked
    tokenzoo.patch_model(model, [{"method": name, **REDUCE[name]}, {"method": "tome", "r": 0}])
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
    assert tokens.length < total and tokens.length == tokenzoo.report(model).tokens_out
    assert torch.equal(tokens.sizes().sum((1, 2)), torch.full((len(x),), float(total)))
    assert torch.equal(tokens.sizes()[:, :prefix], torch.ones(len(x), prefix, 1))
    assert (tokens.positions.diff(dim=1) > 0).all()
    counted = torch.zeros(len(x), tokens.length).scatter_add(
        1, trace_assign(tokens.trace, len(x), total, x.device), torch.ones(len(x), total)
    )
    assert torch.equal(counted, tokens.sizes().squeeze(-1))
    # class tokens stand where they stood, between the patches that are left of their old neighbours
    order = to_scan(tokens.positions.unsqueeze(-1), rows_of(tokens)).squeeze(-1)
    first = tokens.layout.scan_rows
    for image in order.tolist():
        for number, row in enumerate(first):
            place = image.index(number)
            behind = [i - prefix for i in image[:place] if i >= prefix]
            before = [i - prefix for i in image[place:] if i >= prefix]
            assert all(i < row - number for i in behind) and all(i >= row - number for i in before)


@methods
@scanners
def test_class_row_and_untouched_rows_stay_bit_by_bit(name, scanner, monkeypatch):
    model = build(scanner)
    prefix, seen = model.num_prefix_tokens, []
    tokenzoo.patch_model(model, name, **REDUCE[name])
    plain = Tokens.reduce

    def watched(tokens, token_map, *about):
        after = plain(tokens, token_map, *about)
        seen.append((tokens, token_map, after))
        return after

    monkeypatch.setattr(Tokens, "reduce", watched)
    with torch.no_grad():
        model(images(model))
    assert seen
    for tokens, token_map, after in seen:
        assert torch.equal(after.x[:, :prefix], tokens.x[:, :prefix])
        assert torch.equal(token_map.heads[:, :prefix], torch.arange(prefix).expand(len(tokens.x), -1))
        alone = token_map.membership().sum(2) == 1
        same = (after.x == tokens.x.gather(1, token_map.heads.unsqueeze(-1).expand_as(after.x))).all(-1)
        assert same[alone].all() and not same.all()


@methods
@scanners
def test_images_do_not_influence_each_other(name, scanner):
    model = build(scanner)
    x = images(model, 4)
    tokenzoo.patch_model(model, name, **REDUCE[name])
    with torch.no_grad():
        together, turned = model(x), model(x.flip(0)).flip(0)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, turned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


ZERO = {
    "famba": {"r": 0}, "mtr": {"keep_rate": 1.0}, "rmeeto": {"r": 0},
}  # fmt: skip


@methods
@pytest.mark.parametrize("scanner", ["vim", "vim_none", "plain_mamba_depthwise"])
def test_removing_nothing_changes_nothing(name, scanner):
    model = build(scanner)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        tokenzoo.patch_model(model, name, **ZERO[name])
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(x), expected)


def test_mtr_scores_are_the_steps_of_the_mixer(monkeypatch):
    """Each direction is read at the place of the token, not at that of its scan."""
    model = build("vim")
    mixer, scores, steps = model.layers[0].mixer, [], []
    plain_scores, plain_drive = MixerSignals.step_size.fget, mixer._drive

    def spy(signals):
        scores.append(plain_scores(signals))
        return scores[-1]

    def drive(x, conv, x_proj, dt_proj):
        found = plain_drive(x, conv, x_proj, dt_proj)
        step = torch.nn.functional.softplus(found.raw_delta + dt_proj.bias).mean(-1)  # [B, L] in the order of the scan
        steps.append(step if dt_proj is mixer.dt_proj else step.flip(1))
        return found

    monkeypatch.setattr(MixerSignals, "step_size", property(spy))
    monkeypatch.setattr(mixer, "_drive", drive)
    tokenzoo.patch_model(model, "mtr", r=4, layers=0)
    with torch.no_grad():
        model(images(model))
    assert len(steps) == 2 and len(scores) == 1
    total, row = steps[0] + steps[1], 8  # row of the class token, behind half of the 16 patches
    expected = torch.cat([total[:, row : row + 1], total[:, :row], total[:, row + 1 :]], dim=1)
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=1e-5)


def test_mtr_does_not_ask_where_patches_stand():
    tokens, signals, step = sequence(14, 1), FakeSignals(14), Step(MTR(), 1, 4)
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(13) + 1])
    moved = FakeSignals(14)
    moved._scan["delta"] = signals._scan["delta"][:, :, order]
    plain = step.method.map(tokens, signals, step).assign
    other = step.method.map(tokens._replace(x=tokens.x[:, order], size=tokens.size[:, order]), moved, step).assign

    def groups(assign):
        """Which tokens are together, for every pair of the first sequence."""
        return assign.unsqueeze(1) == assign.unsqueeze(2)

    assert torch.equal(groups(plain)[:, order][:, :, order], groups(other))


# ---- rmeeto: metrics, the class token, what is released


@pytest.mark.parametrize("metric", ["hidden", "B", "C", "delta"])
@pytest.mark.parametrize("scanner", ["vim", "vim_none", "plain_mamba_depthwise"])
def test_rmeeto_metrics(metric, scanner):
    model = build(scanner)
    x = images(model)
    seen = []
    plain = RMeeTo.likeness

    class Spy(RMeeTo):
        def likeness(self, tokens, signals):
            seen.append(plain(self, tokens, signals))
            if metric != "hidden":
                parts = [signals.scanned(metric, way) for way in range(signals.directions)]
                torch.testing.assert_close(seen[-1], torch.stack(parts).mean(0))
            return seen[-1]

    tokenzoo.patch_model(model, Spy(r=3, interval=1, metric=metric))
    with torch.no_grad():
        logits = model(x)
    assert logits.isfinite().all()
    width = {"hidden": 24, "B": 4, "C": 4, "delta": 48}[metric]
    total = model.num_prefix_tokens + 16
    assert [tuple(m.shape) for m in seen] == [(3, total, width), (3, total - 3, width)]


def released_metric(parts, row):
    """As released: the second scan in its own order with its channels turned around, the class token cut out."""
    forward, backward = (to_scan(part, (row,)) for part in parts)
    return ((forward + backward.flip(1).flip(2)) / 2)[:, [i for i in range(forward.shape[1]) if i != row]]


@pytest.mark.parametrize("metric, name", [("B", "B"), ("C", "C"), ("delta", "raw_delta")])
def test_rmeeto_released_metrics(metric, name):
    tokens, signals = sequence(11, 1), FakeSignals(11)
    tokens = tokens._replace(layout=tokens.layout._replace(scan_rows=(5,)))
    found = RMeeTo(metric=metric, released=True).likeness(tokens, signals)
    torch.testing.assert_close(found[:, 1:], released_metric(signals._scan[name], 5))
    assert not torch.allclose(found, RMeeTo(metric=metric).likeness(tokens, signals))


def test_rmeeto_class_token_stays_or_moves_in_proportion():
    model = build("vim")
    x = images(model, 8)
    rows = {}
    for released in (False, True):
        with tokenzoo.patched(model, "rmeeto", r=[5], interval=1, released=released), torch.no_grad():
            rows[released] = rows_of(model.forward_tokens(x))
    assert rows[True] == (8 * 12 // 17,)
    assert rows[False].shape == (8, 1) and len(rows[False].unique()) > 1


def test_rmeeto_moves_a_class_token_of_each_image():
    tokens = sequence(11, 1)._replace(rows=torch.tensor([[3], [7]]))
    token_map = act(RMeeTo(), tokens, FakeSignals(11), 4)
    rows = RMeeTo(released=True).scan_rows(tokens, token_map, None)
    assert rows.tolist() == [[3 * 7 // 11], [7 * 7 // 11]]
    assert RMeeTo(released=True).scan_rows(sequence(10, 0), token_map, None) is None


def test_rmeeto_prunes_instead():
    tokens, signals = sequence(12, 1), FakeSignals(12)
    merging, pruning = (act(RMeeTo(prune=prune), tokens, signals, 4) for prune in (False, True))
    assert type(pruning) is KeepMap and type(merging) is MergeMap
    assert torch.equal(pruning.heads, merging.heads)
    assert RMeeTo().merges and not RMeeTo(prune=True).merges
    model = build("vim")
    tokenzoo.patch_model(model, "rmeeto", r=3, interval=1, prune=True, dense=True)
    with torch.no_grad():
        features = model.forward_features(images(model))
    assert features.shape == (3, 17, 24) and features.isfinite().all()


@pytest.mark.parametrize("method", [RMeeTo(ordered=False), FambaV(ordered=False)], ids=lambda m: m.name)
def test_released_order(method):
    n, prefix, r = 16, 1, 4
    tokens, signals = sequence(n, prefix), FakeSignals(n)
    token_map = act(method, tokens, signals, r)
    even = range(1, n, 2) if method.name == "rmeeto" else range(2, n, 2)
    odd = [i for i in range(1, n) if i not in even]
    for heads in token_map.heads.tolist():
        split = 1 + len(even) - r
        assert heads[0] == 0 and heads[split:] == odd and set(heads[1:split]) <= set(even)
    ordered = act(tokenzoo.create_method(method.name), tokens, signals, r)
    assert torch.equal(token_map.heads.sort(dim=1)[0], ordered.heads)
    torch.testing.assert_close(token_map.lift(token_map.apply(tokens.x)), ordered.lift(ordered.apply(tokens.x)))


# ---- where and how much


def test_default_blocks():
    assert MTR().default_layers(24) == tuple(range(2, 24, 2)) and MTR().strengths(24)[2] == 11
    assert MTR(keep_rate=0.7).default_layers(24) == (6, 12, 18)
    assert RMeeTo().default_layers(24) == tuple(range(1, 22, 2))  # in front of blocks 2, 4, ... 22
    assert RMeeTo(interval=1).default_layers(4) == (0, 1, 2) and RMeeTo(interval=3).default_layers(8) == (2, 5)
    strategies = {"all": range(24), "alternate": range(1, 24, 2), "lower:5": range(5), "upper:18": range(18, 24)}
    for strategy, blocks in strategies.items():
        assert FambaV(strategy=strategy).default_layers(24) == tuple(blocks)
    assert FambaV(layers=(3, 4)).resolve_layers(24) == (3, 4)


# size -> r, tokens at the end, GMACs of the authors' repository, in its convention (one direction of the scan)
R_MEETO = {"tiny": (5, 142, 1.28), "small": (11, 76, 3.58), "base": (11, 76, 13.21)}


@pytest.mark.parametrize("size", R_MEETO)
def test_published_costs(size):
    r, left, gmacs = R_MEETO[size]
    with torch.device("meta"):
        model = timm.create_model(f"vim_{size}")
    report = tokenzoo.report(tokenzoo.patch_model(model, "rmeeto", r=r))
    assert report.tokens_out == left
    assert report.one_direction[0] / 1e9 == pytest.approx(gmacs, rel=0.015)


@methods
@pytest.mark.parametrize("backbone", ["vim_tiny", "plain_mamba_l1"])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_budget(name, backbone, share):
    with torch.device("meta"):
        model = timm.create_model(backbone)
    tokenzoo.patch_model(model, name, flops=share)
    assert tokenzoo.report(model).ratio == pytest.approx(share, abs=0.005)
    assert tokenzoo.create_method(**_named(tokenzoo.recipe(model))) == model.tokenzoo_recipe.methods[0]


def _named(recipe):
    return {"name": recipe.pop("method"), **recipe}


def test_mtr_budget_by_rate():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny")
    tokenzoo.patch_model(model, MTR(keep_rate=0.9), flops=0.7)
    assert tokenzoo.report(model).ratio == pytest.approx(0.7, abs=0.005)
    assert MTR(keep_rate=[0.5, 0.8, 1.0]).strengths(24) == {6: (0.5, None), 12: (0.8, None)}
    assert MTR(keep_rate=0.7).tokens_out(17, Step(MTR(), 0, (0.7, None)), Layout(1, True, (4, 4))) == 1 + 12


def test_costs():
    from tokenzoo.core.method import BlockShape

    shape, layout = BlockShape(24, 1, 24), Layout(1, True, (4, 4))
    step = Step(MTR(), 0, 4)
    assert FambaV().macs(17, 14, shape, layout, step) == (8 * 9 + 2 * 3) * 24
    assert RMeeTo().macs(17, 14, shape, layout, step) == (8 * 8 + 3) * 24
    assert RMeeTo(metric="B").macs(17, 14, shape, layout, step) == 8 * 8 * 16 + 3 * 24
    assert RMeeTo(metric="delta", prune=True).macs(17, 14, shape, layout, step) == 8 * 8 * 48
    assert MTR().macs(17, 13, shape, layout, step) == 4 * (8 + 1) * 24
    assert MTR().macs(17, 7, shape, layout, step) == 10 * (6 + 1) * 24  # no more than six can be targets


@pytest.mark.parametrize("name", ["famba", "rmeeto"])
def test_clip(name):
    model = build("vim")
    tokenzoo.patch_model(model, name, r=30, clip=True, layers=(0, 1))
    with torch.no_grad():
        tokens = model.forward_tokens(images(model))
    assert tokens.length == tokenzoo.report(model).tokens_out == 1 + 4


@methods
def test_gradients_reach_every_image(name):
    model = build("vim")
    x = images(model).requires_grad_()
    tokenzoo.patch_model(model, name, **REDUCE[name])
    model.train()(x).square().sum().backward()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()


# ---- refusals

REFUSED = {
    "famba attention": (VIT, "famba", {}, ValueError, ["famba", "scan"]),
    "mtr attention": (VIT, "mtr", {}, ValueError, ["mtr", "scan"]),
    "rmeeto attention": (VIT, "rmeeto", {}, ValueError, ["rmeeto", "scan"]),
    "famba strategy": ("vim", "famba", {"strategy": "middle"}, ValueError, ["famba", "'middle'", "upper:k"]),
    "famba no k": ("vim", "famba", {"strategy": "lower"}, ValueError, ["famba", "'lower'", "lower:k"]),
    "famba k zero": ("vim", "famba", {"strategy": "upper:0"}, ValueError, ["famba", "'upper:0'", "from 1"]),
    "famba k large": ("vim", "famba", {"strategy": "lower:4"}, ValueError, ["'lower:4'", "0 to 2"]),
    "famba k all": ("vim", "famba", {"strategy": "upper:3"}, ValueError, ["'upper:3'", "0 to 2"]),
    "famba both": (
        "vim",
        "famba",
        {"strategy": "alternate", "layers": [1]},
        ValueError,
        ["'alternate'", "(1,)", "one"],
    ),
    "famba r": ("vim", "famba", {"r": 9}, ValueError, ["famba at block 0", "r=9", "at most 8", "clip=True"]),
    "famba ordered": ("vim", "famba", {"ordered": 1}, TypeError, ["famba", "ordered=1", "True or False"]),
    "rmeeto clip": ("vim", "rmeeto", {"clip": "yes"}, TypeError, ["rmeeto", "clip='yes'"]),
    "rmeeto r": ("vim", "rmeeto", {"r": -1}, ValueError, ["r=-1", "negative"]),
    "rmeeto metric": ("vim", "rmeeto", {"metric": "keys"}, ValueError, ["rmeeto", "'keys'", "hidden"]),
    "rmeeto distance": ("vim", "rmeeto", {"distance": "l3"}, ValueError, ["rmeeto", "'l3'", "cosine"]),
    "rmeeto interval": ("vim", "rmeeto", {"interval": 0}, ValueError, ["rmeeto", "interval=0", "from 1"]),
    "rmeeto both": ("vim", "rmeeto", {"interval": 1, "layers": [1]}, ValueError, ["interval=1", "(1,)", "give one"]),
    "rmeeto released": ("vim_both", "rmeeto", {"released": True}, ValueError, ["released=True", "VisionMamba", "2"]),
    "mtr both": ("vim", "mtr", {"r": 3, "keep_rate": 0.5}, ValueError, ["r=3", "keep_rate=0.5", "give one"]),
    "mtr r": ("vim", "mtr", {"r": 16}, ValueError, ["mtr at block 2", "r=16", "at most 15 of 17 tokens"]),
    "mtr rate": ("vim", "mtr", {"keep_rate": 0}, ValueError, ["mtr", "keep_rate=0", "(0, 1]"]),
    "mtr rate text": ("vim", "mtr", {"keep_rate": ["a"]}, TypeError, ["mtr", "'a'", "give"]),
    "mtr rates": ("vim", "mtr", {"keep_rate": [0.5], "layers": [0, 1]}, ValueError, ["1 entries", "2 layers"]),
    "mtr targets": ("vim", "mtr", {"targets": 0}, ValueError, ["mtr", "targets=0", "such as 2"]),
    "mtr weighted": ("vim", "mtr", {"weighted": None}, TypeError, ["mtr", "weighted=None"]),
    "mtr r text": ("vim", "mtr", {"r": "many"}, TypeError, ["'many'", "give"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    model, name, options, error, words = REFUSED[case]
    model = build(model) if isinstance(model, str) else model()
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, name, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)


def test_released_metric_needs_two_directions():
    for scanner, count in (("vim_forward", 1), ("plain_mamba_depthwise", 4)):
        model = build(scanner)
        tokenzoo.patch_model(model, "rmeeto", r=2, interval=1, metric="B", released=True)
        with pytest.raises(ValueError, match=f"this one runs {count} ways"):
            model(images(model))


def test_unknown_distance_of_pairs():
    with pytest.raises(ValueError, match="distance='dot'"):
        alternate_pairs(torch.randn(1, 8, 4), 1, 0, "dot")
