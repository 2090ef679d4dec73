"""Pruning by the scan: counts, order, both ways of alignment against the scan at full length, refusals."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from plain_mamba_reference import arrivals, filtered_path, mix

import tokenzoo
from tokenzoo.layers import selective_scan
from tokenzoo.models import PlainMamba, VisionMamba


def vim(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 4, "d_state": 4, "num_classes": 5}
    return lively(VisionMamba(**{**sizes, **options}))


def plain(**options):
    torch.manual_seed(0)
    sizes = {"img_size": (40, 48), "patch_size": 8, "embed_dim": 24, "depth": 4, "d_state": 4, "num_classes": 5}
    return lively(PlainMamba(**{**sizes, "conv_size": 3, **options}))


def lively(model):
    """Random weights that let mistakes show: long steps, strong positions."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
                p.uniform_(-2, 0.5)
            elif "token" in name or "pos_embed" in name or "direction_Bs" in name:
                p.normal_(std=0.5)
            elif p.dim() > 1 and "log" not in name:
                p.normal_(std=1.5 / p[0].numel() ** 0.5)
    return model.eval()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


# ---- counts


@pytest.mark.parametrize("rate,counts", [
    (0.8, (157, 125, 101, 81)), (0.75, (147, 111)), (0.7, (139, 97, 69)),
])  # fmt: skip
def test_published_counts(rate, counts):
    model = timm.create_model("vim_tiny")
    layers = tuple(range(4, 4 + len(counts)))
    tokenzoo.patch_model(model, "ssm_prune", keep_rate=rate, layers=layers)
    rows = [row for row in tokenzoo.report(model).rows if row.methods]
    assert [row.tokens_out for row in rows] == list(counts)


@pytest.mark.parametrize("name,layers,rate,gmacs", [
    ("vim_tiny", (9, 19), 0.8, 1.24),
    ("vim_small", (4, 14), 0.8, 3.96),
    ("vim_small", (4, 14), 0.75, 3.72),
    ("vim_small", (4, 14), 0.7, 3.51),
    ("vim_small", (4, 9, 14, 19), 0.8, 3.48),
])  # fmt: skip
def test_published_gmacs(name, layers, rate, gmacs):
    """The figures computed for the schedules of the released logs, one direction counted."""
    model = tokenzoo.patch_model(timm.create_model(name), "ssm_prune", keep_rate=rate, layers=layers)
    assert tokenzoo.report(model).one_direction[0] / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_default_blocks_are_the_fifth_and_the_fifteenth():
    model = tokenzoo.patch_model(timm.create_model("vim_tiny"), "ssm_prune")
    assert [row.name for row in tokenzoo.report(model).rows if row.methods] == ["layers.4", "layers.14"]


def test_without_a_class_token_counts_are_rounded_up():
    model = tokenzoo.patch_model(plain(), "ssm_prune", layers=(1, 2), keep_rate=0.7)
    assert [row.tokens_out for row in tokenzoo.report(model).rows if row.methods] == [21, 15]  # of 30


# ---- order


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["carry", "decay"])
@pytest.mark.parametrize("options", [{}, {"cls_position": "first"}, {"cls_position": "both"}, {"img_size": (40, 24)}])
def test_tokens_stay_on_the_path(options, alignment):
    model = vim(**options)
    x = images(model)
    tokenzoo.patch_model(model, "ssm_prune", layers=(0, 2), keep_rate=0.6, alignment=alignment)
    states = list(model.walk(x, trace=True))
    full = tuple(model.patch_embed.grid_size)
    for tokens in states[1:]:
        prefix = tokens.layout.num_prefix
        patches = tokens.positions[:, prefix:] - prefix
        assert (patches.diff(dim=1) > 0).all() and patches.min() >= 0 and patches.max() < full[0] * full[1]
        assert tokens.positions[:, :prefix].tolist() == [list(range(prefix))] * 2
        middle = options.get("cls_position", "middle") == "middle"
        if middle and alignment == "carry":
            assert tokens.rows == (tokens.num_patches // 2,) and tokens.num_patches % 2 == 0
        elif middle:
            before = (patches < full[0] * full[1] // 2).sum(1, keepdim=True)
            assert torch.equal(tokens.rows, before)
        else:
            assert tokens.rows == {"first": (0,), "both": (0, tokens.length - 1)}[options["cls_position"]]


@torch.no_grad()
def test_without_alignment_survivors_stand_by_score():
    model = vim()
    x = images(model)
    tokenzoo.patch_model(model, "ssm_prune", layers=(1,), keep_rate=0.6, alignment="none")
    loose = model.forward_tokens(x)
    tokenzoo.update_method(model, alignment="carry")
    tight = model.forward_tokens(x)
    assert torch.equal(loose.positions.sort(dim=1).values, tight.positions)
    assert not torch.equal(loose.positions, tight.positions)
    assert not torch.allclose(loose.x[:, 0], tight.x[:, 0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("build", [vim, plain])
@pytest.mark.parametrize("alignment", ["carry", "decay", "none"])
def test_pruning_nothing_changes_nothing(build, alignment):
    model = build()
    x = images(model)
    expected = model(x)
    tokenzoo.patch_model(model, "ssm_prune", keep_rate=1.0, alignment=alignment)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


# ---- alignment against the full length


def filled(dt, kept, length, rule, of_zero):
    """Step sizes [D, L] at full length of those of kept tokens [D, K]; pruned places by the rule."""
    out = torch.zeros(len(dt), length, dtype=dt.dtype)
    last = torch.zeros(len(dt), dtype=dt.dtype)
    at = {place: j for j, place in enumerate(kept)}
    for place in range(length):
        if place in at:
            last = dt[:, at[place]]
            out[:, place] = last
        else:
            out[:, place] = last if rule == "hold" else of_zero
    return out


def spread(t, places, length):
    """Values of kept tokens [D, K] at their places among zeros [1, D, L]."""
    return torch.zeros(1, len(t), length, dtype=t.dtype).index_copy(2, torch.tensor(places), t[None])


def vim_mixer_at_full_length(mixer, y, places, length, rule):
    """The mixer on tokens y [K, C] at ascending places of a sequence, scanned over all of it, pruned places silent."""
    x, z = mixer.in_proj(y[None]).chunk(2, dim=-1)
    total = 0
    for suffix, log, back in (("", mixer.A_log, False), ("_b", mixer.A_b_log, True)):
        conv, proj, steps = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        seen = x.flip(1) if back else x
        own = [length - 1 - p for p in reversed(places)] if back else places
        u = F.silu(conv(seen.transpose(1, 2))[..., : len(places)])[0]  # [D, K]
        low, b, c = proj(u.T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        dt = F.softplus(steps(low)).T
        of_zero = F.softplus(steps.bias)
        full = filled(dt, own, length, rule, of_zero)
        out = selective_scan(

            spread(u, own, length), full[None], -log.exp(), spread(b.T, own, length), spread(c.T, own, length),
            getattr(mixer, "D" + suffix), backend="loop",
        )[0][:, own]  # fmt: skip
        total = total + (out.flip(1) if back else out)
    return mixer.out_proj(total.T * F.silu(z[0])) / 2


@torch.no_grad()
@pytest.mark.parametrize("rule", ["hold", "bias"])
@pytest.mark.parametrize("options", [{}, {"cls_position": "first"}, {"cls_position": "none"}])
def test_decay_is_the_masked_simulation(options, rule):
    model = vim(**options).double()
    x = images(model).double()
    tokenzoo.patch_model(model, "ssm_prune", layers=(0, 2), keep_rate=0.6, alignment="decay", rule=rule)
    states = list(model.walk(x))
    tokenzoo.unpatch_model(model)
    rows = model.num_class_tokens, model.patch_embed.num_patches
    first = {"middle": rows[1] // 2, "first": 0}.get(model.cls_position)
    for index in (1, 3):  # blocks that run on what is left, and leave it alone
        before, after = states[index], states[index + 1]
        if index == 3:
            after = after._replace(x=after.x)
        for image in range(2):
            # places in the full sequence, in order; the class token stands in front in `Tokens`
            places = []
            for position in before.positions[image].tolist():
                patch = position - rows[0]
                places.append(first if patch < 0 else patch + (rows[0] > 0 and patch >= first))
            order = sorted(range(len(places)), key=places.__getitem__)
            y = model.layers[index].norm(before.x[image][order])
            sorted_places = [places[i] for i in order]
            h = vim_mixer_at_full_length(model.layers[index].mixer, y, sorted_places, sum(rows), rule)
            expected = before.x[image][order] + h
            torch.testing.assert_close(after.x[image][order], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["hold", "bias"])
def test_decay_is_the_masked_simulation_on_four_paths(rule):
    model = plain().double()
    x = images(model).double()
    tokenzoo.patch_model(model, "ssm_prune", layers=(0,), keep_rate=0.6, alignment="decay", rule=rule)
    before, after = list(model.walk(x))[1:3]
    grid, block = before.layout.grid, model.layers[1]
    of_zero = F.softplus(2 * block.mamba.dt_proj.bias)
    for image in range(2):
        kept = before.positions[image]

        def decay(dt, path, kept=kept):  # steps that decay: those of the places since the last kept one, added up
            along = filtered_path(grid, path, list(range(grid[0] * grid[1])))
            own = [along.index(place) for place in filtered_path(grid, path, kept.tolist())]
            full = filled(dt.T, own, len(along), rule, of_zero.double()).T
            edges = [-1, *own]
            return torch.stack(
                [full[low + 1 : high + 1].sum(0) if low >= 0 else full[high] for low, high in itertools.pairwise(edges)]
            )

        y = block.norm(before.x[image : image + 1])
        h, _ = mix(block.mamba, y, grid, kept[None], decay)
        torch.testing.assert_close(after.x[image], (before.x[image] + h[0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_rules_differ():
    model = vim()
    x = images(model)
    outs = []
    for options in ({}, {"recentre": False}, {"alignment": "decay"}, {"alignment": "decay", "rule": "bias"}):
        with tokenzoo.patched(model, "ssm_prune", layers=(1,), keep_rate=0.6, **options):
            outs.append(model(x))
    for one, other in itertools.combinations(outs, 2):
        assert not torch.allclose(one, other, atol=1e-4)


def test_arrivals_are_those_of_the_path():
    assert arrivals((1, 2), 0) == {0: 0, 1: 1}


# ---- importance


@torch.no_grad()
@pytest.mark.parametrize("score", ["both_ungated", "both", "backward", "released"])
@pytest.mark.parametrize("measure", ["clip", "sum", "l1", "l2"])
def test_importance_is_what_it_says(score, measure):
    from tokenzoo.models._scan_signals import ScanSignals

    model = vim()
    x = images(model, 1)
    tokenzoo.patch_model(model, "ssm_prune", layers=(0,), tokens=20, score=score, measure=measure)
    kept = model.forward_tokens(x, trace=True).trace[0].map.heads[0, 1:] - 1
    tokenzoo.unpatch_model(model)
    scan = ScanSignals()
    model.layers[0].mix(model.layers[0].add(model.embed_tokens(x)), signals=scan)
    c, values = model.patch_embed.num_patches // 2, []
    for t in range(scan.gate.shape[2]):
        mirrored = scan.gate.shape[2] - 1 - t if score == "released" else t
        y = scan.y[1][0, :, mirrored]
        y = y + scan.y[0][0, :, t] if score.startswith("both") else y
        y = y * scan.gate[0, :, mirrored] if score != "both_ungated" else y
        how = "sum" if score == "released" else measure
        one = {"clip": y.clamp(min=0).sum(), "sum": y.sum(), "l1": y.abs().sum(), "l2": y.square().sum()}[how]
        values.append(float("-inf") if t == c else one.item())
    best = sorted(sorted(range(len(values)), key=lambda t: -values[t])[:20])
    assert [t - (t > c) for t in best] == kept.tolist()


# ---- refusals


@pytest.mark.parametrize("options,error,words", [
    ({"score": "best"}, ValueError, ["score='best'", "both_ungated"]),
    ({"measure": "max"}, ValueError, ["measure='max'", "clip"]),
    ({"alignment": "hold"}, ValueError, ["alignment='hold'", "carry"]),
    ({"rule": "given"}, ValueError, ["rule='given'", "bias"]),
    ({"recentre": 1.5}, TypeError, ["recentre=1.5"]),
    ({"alignment": "decay", "recentre": True}, ValueError, ["recentre=True", "decay"]),
    ({"tokens": 21}, ValueError, ["ssm_prune at block 0", "tokens=21 is odd", "20 or 22"]),
    ({"tokens": 38}, ValueError, ["tokens=38", "36 patches"]),
    ({"keep_rate": 0.02}, ValueError, ["ssm_prune at block 0", "leaves none of 36"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = vim()
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "ssm_prune", **{"layers": (0,), **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)


def test_attention_models_are_refused():
    model = timm.create_model("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="ssm_prune looks into the scan .* VisionTransformer has none.*VisionMamba"):
        tokenzoo.patch_model(model, "ssm_prune")


@pytest.mark.parametrize("method", ["evit", "topk", "ats", "mctf", "evo", "sta", "tomesd"])
def test_class_attention_methods_are_refused(method):
    model = vim()
    with pytest.raises(ValueError, match=f"{method} looks at attention or changes it, and VisionMamba has none"):
        tokenzoo.patch_model(model, method)
    assert not tokenzoo.is_patched(model)
