"""What learned methods share: rates of all patches, slots, scores of one column, notes, and what a teacher is asked."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import build, images
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core import registry
from tokenzoo.core.learned import Decision, Learned, Note, Teaching
from tokenzoo.core.learned_keep import LearnedKeep
from tokenzoo.core.method import Method, Step
from tokenzoo.core.schedule import Kept
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import KeepMap, NoteMap
from tokenzoo.ops.sinkhorn import sinkhorn
from tokenzoo.training import TrainStep
from tokenzoo.training.options import build_parser
from tokenzoo.training.owed import asked, losses_owed


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


# ---- counts


@pytest.mark.parametrize("rate,patches,expected", [
    (0.9, 196, [176, 158, 142]), (0.7, 196, [137, 96, 67]), (0.5, 196, [98, 49, 24]), (0.25, 196, [49, 12, 3]),
    (0.7, 64, [44, 31, 21]), ((0.5, 1.0, 0.5), 64, [32, 32, 16]), (0.01, 64, [1, 1, 1]),
])  # fmt: skip
def test_rates_multiply_up_and_are_rounded_once(rate, patches, expected):
    method, side = tokenzoo.DynamicViT(keep_rate=rate), int(patches**0.5)
    layout, n, found, steps = Layout(1, True, (side, side)), 1 + patches, [], method.strengths(12)
    for block in (3, 6, 9):
        if block in steps:
            n = Step(method, block, steps[block]).tokens_out(n, layout)
        found.append(n - 1)
    assert found == expected


def test_rates_and_counts_together():
    method = tokenzoo.DynamicViT(keep_rate=0.5, tokens=(None, 40, None))
    strengths = method.strengths(12)
    assert list(strengths.values()) == [Kept(0.5, None, 0.5, 1.0), Kept(0.5, 40, 40, 0.5), Kept(0.5, None, 20, 40)]
    assert [each.share(160) for each in strengths.values()] == [0.5, 0.25, 0.125]
    # where another method has left other patches, a rate is one of those that are there
    step = Step(method, 3, strengths[3])
    assert step.tokens_out(1 + 100, Layout(1, True, (14, 14))) == 51
    with pytest.raises(ValueError, match="tokens=40 cannot be kept of 30 patches"):
        Step(method, 6, strengths[6]).tokens_out(31, Layout(1, True, (14, 14)))


@pytest.mark.parametrize("method", ["sit", "patchmerger", "sinkhorn"])
@torch.no_grad()
def test_slots_are_as_many_at_any_size(method):
    model = build("dynamic")
    tokenzoo.patch_model(model, method, keep_rate=0.6)
    for side in (32, 48, 16):  # of 16 pixels, more slots than patches
        assert model.forward_tokens(torch.randn(2, 3, side, side)).length == 1 + 3
    assert tokenzoo.report(model, (48, 48)).tokens_out == 1 + 3
    with pytest.raises(ValueError, match=f"{method} keeps learned modules"):
        tokenzoo.update_method(model, keep_rate=0.5)


def test_layers_that_rebuild_are_for_one_image_size():
    model = tokenzoo.patch_model(build("dynamic"), "sit").train()
    with pytest.raises(ValueError, match="sit at block 0: rebuilds 16 patches, but these images have 36; train at"):
        model(torch.randn(2, 3, 48, 48))


# ---- scores


@dataclass(frozen=True, kw_only=True)
class OneColumn(LearnedKeep):
    """Scores to keep alone."""

    name = "one_column"
    source = "this test"

    def module(self, dim: int, step: Step) -> nn.Module:
        return Column(dim)


class Column(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, x: Tensor, left: Tensor) -> Tensor:
        return self.score(x).squeeze(2)


def test_scores_of_one_column():
    model = tokenzoo.patch_model(build("deit"), OneColumn(layers=(1, 2), keep_rate=0.5))
    x = images(model)
    assert model.forward_tokens(x).length == 1 + 4
    assert tokenzoo.report(model).rows[2].reduction_macs == 16 * 32
    tokens = model.train().forward_tokens(x)
    loss = model.forward_head(tokens).square().mean() + losses_owed(model, tokens, Teaching())["one_column_ratio"]
    loss.backward()
    first, second = tokens.records
    wanted = 2.0 * sum(((r.kept - 0.5) ** 2).mean() for r in (first, second)) / 2
    torch.testing.assert_close(losses_owed(model, tokens, Teaching())["one_column_ratio"], wanted)
    assert model.blocks[1].tokenzoo_0_one_column.score.weight.grad.abs().max() > 0


def test_the_share_of_a_whole_batch():
    gates = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    record = Decision(0, 1, gates, torch.ones(2, 4), 0.5)
    each, together = tokenzoo.DynamicViT(), tokenzoo.DynamicViT(over_batch=True)
    assert each.losses((record,), Teaching())["ratio"] == 0.5 and together.losses((record,), Teaching())["ratio"] == 0


# ---- notes


@dataclass(frozen=True, kw_only=True)
class Noting(Learned, Method):
    """Notes the mean of all patches, and drops none but in block 2."""

    name = "noting"
    source = "this test"
    kind = "prune"
    owes = ("mean",)
    gates = False

    def strengths(self, depth: int) -> dict[int, Any]:
        return dict.fromkeys(range(depth), 1)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n - (step.block == 2)

    def map(self, tokens: Tokens, signals: Any, step: Step) -> Any:
        kept = None
        if step.block == 2:
            rows = torch.arange(tokens.length - 1).expand(len(tokens.x), -1)
            kept = KeepMap(rows, tokens.length)
        return self.noted({"mean": tokens.x.mean()}, tokens, step, kept)

    def losses(self, records: tuple[Note, ...], teaching: Teaching) -> dict[str, Tensor]:
        return {"mean": sum(note.value["mean"] for note in records)}


@pytest.mark.parametrize("recipe", [{}, {"order": "raster"}])
def test_notes_leave_tokens_and_trace_alone(recipe):
    model = tokenzoo.patch_model(build("deit"), Noting(), **recipe).train()
    model.set_grad_checkpointing(True)
    tokens = model.forward_tokens(images(model), trace=True)
    assert [note.block for note in tokens.records] == [0, 1, 2, 3] and [s.block for s in tokens.trace] == [2]
    losses_owed(model, tokens, Teaching())["noting_mean"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert tokens.length == 16


def test_a_note_is_no_step_of_the_map():
    tokens = Tokens(torch.randn(2, 5, 3), Layout(1, True, (2, 2)), trace=())
    after = tokens.reduce(NoteMap(tokens.x, Note(0, 3, None)), 3, "noting")
    assert after.trace == () and after.x is tokens.x and after.records == (Note(0, 3, None),)


# ---- teachers


def train_step(model: nn.Module, teacher: nn.Module | None, **changes: Any) -> TrainStep:
    args = argparse.Namespace(**{**vars(build_parser().parse_args([])), **changes})
    return TrainStep(model, teacher, args)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (2.0, 0.0), (0.0, 0.5), (1.0, 0.5)])
def test_a_teacher_is_asked_for_what_losses_want(weights):
    model, teacher = build("registers"), build("registers", seed=2)
    tokenzoo.patch_model(model, "sit", keep_rate=0.6)
    assert asked(model) == {"layers"}
    step = train_step(model, teacher, kd_weight=weights[0], kd_token_weight=weights[1]).train()
    x, target = images(model), torch.arange(3)
    parts = step(x, target)
    assert set(parts) == {"loss", *step.parts}
    with torch.no_grad():
        layers = teacher.forward_intermediates(x, norm=False, output_fmt="NLC", intermediates_only=True)
        notes = model.forward_tokens(x).records
        wanted = sum((note.value - layer).square().mean() for note, layer in zip(notes, layers)) / 4
    torch.testing.assert_close(parts["sit_feature"], 2.0 * wanted)


def test_losses_that_need_a_teacher_are_refused_without():
    model = tokenzoo.patch_model(build("deit"), "sit", keep_rate=0.6)
    with pytest.raises(ValueError, match=r"sit_feature: losses of the method compare with a teacher \(layers\); give"):
        train_step(model, None)
    tokens = model.train().forward_tokens(images(model))
    with pytest.raises(ValueError, match="sit: feature_weight compares patches with those of a teacher"):
        losses_owed(model, tokens, Teaching())
    alone = tokenzoo.patch_model(build("deit"), "sit", keep_rate=0.6, feature_weight=0.0)
    assert train_step(alone, None)(images(alone), torch.arange(3))["sit_feature"] == 0


def test_nothing_slimmed_is_nothing_to_rebuild():
    model = build("deit")
    teacher = copy.deepcopy(model)
    tokenzoo.patch_model(model, "sit", layers=(3,), keep_rate=0.5).train()
    tokens, layers = model.forward_tokens(images(model)), None
    with torch.no_grad():
        layers = teacher.forward_intermediates(images(model), norm=False, output_fmt="NLC", intermediates_only=True)
    for note in tokens.records[:3]:  # in front of the first slimming, patches are those of the teacher
        torch.testing.assert_close(note.value, layers[note.block], atol=1e-5, rtol=1e-5)


# ---- plans


@pytest.mark.parametrize("counts", [None, 5])
def test_a_plan_shares_every_token_out_once(counts):
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    seen = None if counts is None else torch.arange(8).expand(2, -1) < counts
    plan = sinkhorn(logits, 3, seen)
    columns = torch.ones(2, 8) if seen is None else seen.float()
    torch.testing.assert_close(plan.sum(1), columns)
    if seen is not None:  # others are as good as not there
        torch.testing.assert_close(plan[..., :counts], sinkhorn(logits[..., :counts], 3))
    assert sinkhorn(logits, 3, torch.zeros(2, 8, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("method", ["sit", "patchmerger", "sinkhorn"])
@torch.no_grad()
def test_hidden_patches_do_not_count(method):
    model = build("deit")
    tokenzoo.patch_model(model, method, keep_rate=0.6, layers=(1,))
    mask = torch.ones(17, dtype=torch.bool)
    mask[9:] = False
    x = images(model)
    other = x.clone()
    other[:, :, 16:] += 1.0
    mask = mask.expand(17, 17)
    torch.testing.assert_close(model(other, attn_mask=mask), model(x, attn_mask=mask), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(other), model(x), atol=1e-3)
