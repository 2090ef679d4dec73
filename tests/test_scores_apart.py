"""Several methods of one recipe that carry scores from block to block: each has its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cases import build, images
from test_all_or_nothing import _svit

import tokenzoo
from tokenzoo.core import registry
from tokenzoo.core.method import Method
from tokenzoo.core.selection import keep_best
from tokenzoo.core.traits import AFTER, Traits


@dataclass(frozen=True, kw_only=True)
class Gathered(Method):
    """Keeps patches by what all blocks so far have gathered: their place in the row, a block at a time."""

    keep: int = 8

    name = "gathered"
    source = "this test"
    kind = "prune"
    traits = Traits(place=AFTER, carries=True)

    def strengths(self, depth):
        (last,) = self.layers
        return {i: self.keep if i == last else 1000 for i in range(last + 1)}

    def tokens_out(self, n, step, layout):
        return min(n, layout.num_prefix + step.strength)

    def carry(self, tokens, signals, token_map, step):
        own = torch.arange(tokens.length, device=tokens.x.device).expand(tokens.x.shape[0], -1).float()
        return own if tokens.scores is None else tokens.scores + own

    def map(self, tokens, signals, step):
        if self.tokens_out(tokens.length, step, tokens.layout) == tokens.length:
            return None
        return keep_best(tokens.scores, tokens, lambda n: step.strength)


@pytest.fixture(autouse=True)
def gathered() -> Iterator[None]:
    registry.register(Gathered)
    yield
    del registry._METHODS["gathered"]


EVO = {"method": "evo", "layers": (2,), "keep_rate": 0.5}
OTHERS = {
    "another method": {"method": "gathered", "layers": (3,)},
    "the same method": {"method": "evo", "layers": (3,), "keep_rate": 0.5, "blend": 0.9},
}


def scores(model, recipe, x, scorer=0):
    """What a method carries behind the blocks in which both gather."""
    with tokenzoo.patched(model, recipe):
        walked = list(model.walk(x))
    return [tokens.seen_by(scorer).scores for tokens in walked[1:3]]


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_scores_are_those_of_each_alone(other):
    model, second = build("deit"), OTHERS[other]
    x = images(model)
    alone = [scores(model, EVO, x), scores(model, second, x)]
    for recipe, order in (([EVO, second], (0, 1)), ([second, EVO], (1, 0))):
        for scorer, which in enumerate(order):
            found = scores(model, recipe, x, scorer)
            assert all(map(torch.equal, found, alone[which]))
    assert not torch.equal(alone[0][1], alone[1][1])


@torch.no_grad()
def test_decisions_are_those_of_each_alone():
    """Places in the row, a block at a time: the last patches stay, whatever the other method carries."""
    model = build("deit")
    x = images(model)
    for recipe in ([EVO, OTHERS["another method"]], [OTHERS["another method"], EVO]):
        tokenzoo.patch_model(model, recipe)
        kept = tokenzoo.core.tokens.trace_assign(model.forward_tokens(x, trace=True).trace, 3, 17, x.device)
        assert (kept >= 0).nonzero()[:, 1].view(3, 9).tolist() == [[0, *range(9, 17)]] * 3
        with torch.no_grad():
            evo = model.blocks[2].tokenzoo.steps[0]
            assert evo.method.name == "evo"
        tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, EVO)
    expected = model.walk(x)
    tokenzoo.patch_model(other := build("deit"), [OTHERS["another method"], EVO])
    for _, one, two in zip(range(4), expected, other.walk(x)):  # up to block 2, where evo acts
        assert torch.equal(one.x, two.x)


@torch.no_grad()
def test_every_reduction_takes_all_scores_along():
    model = build("deit")
    merging = {"method": "tome", "r": 3, "layers": (0,)}
    tokenzoo.patch_model(model, [EVO, OTHERS["another method"], merging])
    tokens = list(model.walk(images(model), trace=True))[1]
    assert tokens.length == 14 and [s.shape for s in (tokens.scores, *tokens.more_scores)] == [(3, 14)] * 2
    torch.testing.assert_close(tokens.more_scores[0].sum(1), torch.full((3,), 136.0))
    assert len(tokens.trace) == 1 and tokens.trace[0].side.more_scores[0].shape == (3, 17)


@torch.no_grad()
def test_stages_take_all_scores_along():
    model = _svit()
    tokenzoo.patch_model(model, [{"method": "evo", "layers": (3,)}, {"method": "evo", "layers": (2,), "blend": 0.9}])
    model(torch.randn(2, 3, 64, 64))
    behind = list(model.walk(torch.randn(2, 3, 64, 64)))[3]  # the beginning of the last stage
    assert [s.shape for s in (behind.scores, *behind.more_scores)] == [(2, behind.length)] * 2


def test_gradients_compilation_and_checkpoints():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, [EVO, OTHERS["another method"]])
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train()(x), expected)
    model(x).sum().backward()
    model.eval().set_grad_checkpointing(False)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()
