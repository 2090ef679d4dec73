"""Decisions of selectors against slow references, written from the equations of their papers, and in bad conditions."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden_vlm_selectors import Recorded

import tokenzoo
from tokenzoo.vlm import functional
from tokenzoo.vlm.functional.coverage import covering, covering_anew, covering_kept
from tokenzoo.vlm.rows import VisualRows


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def rows(seed: int, n: int, width: int = 5) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


sizes = given(seed=st.integers(0, 10**6), n=st.integers(2, 14), share=st.floats(0.05, 0.95))
few = settings(max_examples=25)


@sizes
@few
def test_todre_is_its_equation(seed, n, share):
    """Pivot of the highest attention, then argmin over the rest of the sum of cosines to all that are chosen."""
    x, keep = rows(seed, n), max(1, int(share * n))
    score = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1))
    z = x.double().tolist()
    chosen = [max(range(n), key=lambda i: score[i])]
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(min(rest, key=lambda i: sum(cosine(z[i], z[j]) for j in chosen)))
    assert functional.todre(x[None], score[None], keep)[0].tolist() == chosen


def test_todre_starts_in_the_thumbnail():
    x, score = torch.randn(2, 8, 4), torch.tensor([[0.1, 0.4, 0.2, 0.0, 0.9, 0.8, 0.1, 0.1]]).expand(2, -1)
    part = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]]).expand(2, -1)
    found = tokenzoo.ToDRETower(keep=1).map(VisualRows(x, part=part), Recorded(importance=score), 1)
    assert found.heads.flatten().tolist() == [1, 1]


@sizes
@few
def test_catp_is_its_equation(seed, n, share):
    """Argmax of f(Y + y) - f(Y), f(Y) = sum over x of max over Y of s(x, y) + 0.7 * sum over Y of s(y, text)."""
    x, text, keep = rows(seed, n), rows(seed + 1, 3).mean(0), max(1, int(share * n))
    z, t = x.double().tolist(), text.double().tolist()
    s = [[(cosine(a, b) + 1) / 2 for b in z] for a in z]
    near = [(cosine(a, t) + 1) / 2 for a in z]

    def value(chosen: list[int]) -> float:
        return sum(max(s[i][j] for j in chosen) for i in range(n)) + 0.7 * sum(near[j] for j in chosen)

    chosen: list[int] = []
    while len(chosen) < keep:
        chosen.append(max((i for i in range(n) if i not in chosen), key=lambda i: value([*chosen, i])))
    assert functional.catp(x[None], text[None], keep)[0].tolist() == chosen


@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 30), st.sampled_from((0.0, -1.0)))
@settings(max_examples=60, deadline=None)
def test_covering_is_facility_location_in_both_ways(seed, rows, columns, least):
    """As devices do it, and as a processor does it: the sums of the definition, one step after the other."""
    torch.manual_seed(seed)
    covers = torch.rand(2, rows, columns, dtype=torch.float64) * (1 - least) + least
    worth, keep = torch.rand(2, columns, dtype=torch.float64), min(columns, 7)
    closed = torch.rand(2, columns) < (0.3 if columns > 10 else 0)
    worth = worth.masked_fill(closed, float("-inf"))
    kept = torch.stack([covering_kept(*each, keep, least) for each in zip(covers, worth)])
    assert torch.equal(covering_anew(covers, worth, keep, least), kept)
    assert torch.equal(covering(covers, worth, keep, least), kept)
    for found, table, own in zip(kept.tolist(), covers, worth):
        best = torch.full((rows,), least, dtype=torch.float64)
        for step, last in enumerate(found):
            gain = (table - best[:, None]).clamp(min=0).sum(0) + own
            gain[found[:step]] = float("-inf")
            assert gain[last] >= gain.max() - 1e-9
            best = torch.maximum(best, table[:, last])


@given(seed=st.integers(0, 10**6), high=st.integers(1, 5), wide=st.integers(1, 5), share=st.floats(0.1, 0.9))
@few
def test_fopru_is_its_rule(seed, high, wide, share):
    n = high * wide
    keep = max(1, int(share * n))
    score = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    ranked = sorted(range(n), key=lambda i: -score[i])[:keep]
    assert functional.fopru(score[None], keep)[0].tolist() == sorted(ranked)
    lines = sorted(range(high), key=lambda r: -sum(score[r * wide + c].double() for c in range(wide)))
    expected: list[int] = []
    for r in lines:
        own = sorted(range(r * wide, (r + 1) * wide), key=lambda i: -score[i])
        expected += own[: keep - len(expected)]
    assert functional.fopru(score[None], keep, wide)[0].tolist() == sorted(expected)


@given(seed=st.integers(0, 10**6), keep=st.integers(1, 11))
@few
def test_decisions_follow_their_rows(seed, keep):
    """In another order, or longer by a factor, rows are chosen as before; no row twice."""
    n = 12
    x, score = rows(seed, n), torch.rand(n, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    words = rows(seed + 2, 3)
    for choose in (
        lambda x, s: functional.divprune(x[None], keep)[0],
        lambda x, s: functional.todre(x[None], s[None], keep)[0],
        lambda x, s: functional.mmtok(words, x, x, keep),
        lambda x, s: functional.catp(x[None], words.mean(0)[None], keep)[0],
        lambda x, s: functional.cdpruner(x[None], s[None] + 0.1, min(keep, 4))[0],
    ):
        found = choose(x, score).tolist()
        assert len(set(found)) == len(found)
        assert order[choose(x[order], score[order])].tolist() == found
        assert choose(x * 8, score).tolist() == found


def test_long_sequences_are_decided_alike(monkeypatch):
    """Where cosines of all rows would not fit, they are worked out when they are asked for."""
    x, score = torch.randn(2, 40, 8), torch.rand(2, 40)
    choices = [
        lambda: functional.divprune(x, 9), lambda: functional.todre(x, score, 9),
        lambda: functional.cdpruner(x, score, 7),
    ]  # fmt: skip
    short = [choose() for choose in choices]
    monkeypatch.setattr("tokenzoo.vlm.functional.deciding.LONG", 39)
    assert all(torch.equal(choose(), found) for choose, found in zip(choices, short))


def test_equal_rows_are_chosen_once():
    """Rows that are all alike: ties everywhere, volumes of nothing, no numbers that are none."""
    x, score = torch.ones(1, 9, 4), torch.zeros(1, 9)
    for found in (
        functional.divprune(x, 5),
        functional.todre(x, score, 5),
        functional.mmtok(x[0, :2], x[0], x[0], 5)[None],
        functional.catp(x, x[:, 0], 5),
        functional.cdpruner(x, functional.relevance(x, x[0]), 5),
        functional.vispruner(score, x, 5),
        functional.hiprune(score, score, 5, 0.9, 3),
        functional.prumerge_rows(score[0], 5)[None],
        functional.prumerge_rows(score[0], plus=True)[None],
    ):
        assert len(set(found[0].tolist())) == found.shape[1] <= 9 and 0 <= int(found.min()) <= int(found.max()) < 9


@pytest.mark.parametrize("keep", range(1, 9))
def test_vispruner_keeps_as_many_as_asked(keep):
    """The released code fails where an odd number of rows is left, and below 8."""
    for n in (9, 10, 17):
        for important in (0.0, 0.3, 1.0):
            found = functional.vispruner(torch.rand(2, n), torch.randn(2, n, 4), keep, important)
            assert found.shape == (2, keep) and (found.diff(dim=1) > 0).all()


def test_video_windows_are_the_best_ones():
    """All ways to cut a short video, tried one by one."""
    still = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    best = 0
    for cuts in range(2**5):
        first, total = 0, 0
        for last in range(6):
            if last == 5 or cuts >> last & 1:
                total += int(still[first:last].all(0).sum()) * (last - first) if last > first else 0
                first = last + 1
        best = max(best, total)
    windows, spared = functional.frame_windows(still)
    assert spared == best and [a for a, _ in windows] == [0, *(b + 1 for _, b in windows[:-1])]


def test_what_stands_still_is_its_mean():
    """A video of one image repeated: every row that stays is that of the image, and ratio 1 keeps all that differs."""
    x = torch.randn(1, 9, 6).expand(4, -1, -1)
    found = functional.holitom(x, torch.rand(4, 9), 1.0)
    assert torch.allclose(found.x, x[0]) and found.assign.view(4, 9).tolist() == [list(range(9))] * 4


def test_gradients_reach_rows_through_merging_selectors():
    x = torch.randn(2, 16, 6, requires_grad=True)
    signals = Recorded(
        importance=torch.rand(2, 16), mean_keys=torch.randn(2, 16, 4), joined_row=torch.rand(2, 16),
        keys=torch.randn(2, 16, 8),
    )  # fmt: skip
    for name in ("visionzip", "prumerge", "fourier", "mustdrop_tower", "holitom_tower"):
        made = tokenzoo.vlm.registry.create(name, keep=5)
        found = made.map(VisualRows(x, (4, 4), part=torch.zeros(2, 16, dtype=torch.long)), signals, 5)
        (grad,) = torch.autograd.grad(found.x.sum(), x)
        assert torch.isfinite(grad).all() and (grad != 0).any(-1).sum() >= 5, name


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vispruner", {"important": 1.5}, "important"),
        ("visionzip", {"contextual": -0.1}, "contextual"),
        ("hiprune", {"layer": 0}, "layer"),
        ("hired", {"alpha": 2}, "alpha"),
        ("fopru", {"by": "column"}, "by"),
        ("mmtok", {"text_temperature": 0}, "text_temperature"),
        ("mustdrop_tower", {"window": 1}, "window"),
        ("holitom_tower", {"clustered": 1.1}, "clustered"),
        ("globalcom2", {"temperature": 0}, "temperature"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        tokenzoo.vlm.registry.create(name, keep=4, **options)


def test_layers_that_a_tower_does_not_have_are_named():
    with pytest.raises(ValueError, match="layer=9, but the tower has 4"):
        tokenzoo.HiPrune(keep=4, layer=9).layers(4)
    signals = Recorded(handed_on=2, depth=4)
    with pytest.raises(ValueError, match="start=3 lies behind layer 2"):
        tokenzoo.VTCCLS(keep=4, start=3).map(VisualRows(torch.randn(1, 9, 4)), signals, 4)


def test_the_retention_mask_of_a_serving_engine():
    """The example keeps the contract: the count is known in front, the mask is that of the selector itself."""
    spec = importlib.util.spec_from_file_location(
        "serving_retention", Path(__file__).parents[1] / "examples" / "serving_retention.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    video = torch.randn(6 * 2 * 3, 8)
    for q in (0.0, 0.5, 0.99):
        mask = example.compute_retention_mask(video, (6, 4, 6), 2, q)
        keep = example.retained_count(6, 6, q)
        assert mask.shape == (36,) and mask.dtype == torch.bool and int(mask.sum()) == keep
        if keep < 36:
            expected = tokenzoo.DivPrune(keep=keep).map(VisualRows(video[None]), Recorded(), keep)
            assert torch.equal(mask.nonzero().flatten(), expected.heads[0])
    with pytest.raises(ValueError, match="36 rows for 5 frames"):
        example.compute_retention_mask(video, (5, 4, 6), 2, 0.5)
