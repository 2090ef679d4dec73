"""Methods written by the contract of version 0.1 go on, and say how they are written now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import build, images
from tokenzoo.methods.base import Method  # the path of version 0.1
from tokenzoo.selection import keep_best
from tokenzoo.tokens import Tokens

import tokenzoo
from tokenzoo.core.declared import Declared
from tokenzoo.core.renamed import RENAMED


def old_loudest() -> type[Method]:
    """The example of version 0.1's README, with its properties."""

    @dataclass(frozen=True, kw_only=True)
    class Loudest(Method):
        keep: int

        name: ClassVar[str] = "old_loudest"
        source: ClassVar[str] = "this test"
        kind: ClassVar[str] = "prune"
        uses_positions: ClassVar[bool] = True

        @property
        def place(self):
            return "after"

        @property
        def serves_scans(self):
            return True

        def strengths(self, depth):
            return {i: self.keep for i in self.resolve_layers(depth)}

        def tokens_out(self, n, step, layout):
            return layout.num_prefix + min(step.strength, n - layout.num_prefix)

        def map(self, tokens, signals, step):
            return keep_best(tokens.x.norm(dim=-1), tokens, lambda n: min(step.strength, n))

    return Loudest


@torch.no_grad()
def test_properties_of_version_0_1_go_on():
    with pytest.warns(DeprecationWarning, match="Loudest: write `place` as place=.*uses_positions.*positions=True"):
        loudest = old_loudest()
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, loudest(keep=5, layers=(1,)))
    tokens = model.forward_tokens(x, trace=True)
    assert tokens.num_patches == 5 and tokens.positions is not None
    assert loudest(keep=5).place == "after" and loudest(keep=5).serves_scans


def test_around_and_scores_of_version_0_1():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @dataclass(frozen=True, kw_only=True)
        class Around(Method):
            name: ClassVar[str] = "old_around"

            @property
            def place(self):
                return "around"

            @property
            def branches(self):
                return ("mlp",)

            @property
            def scores_tokens(self):
                return True

            def score(self, tokens, signals, token_map, step):
                return tokens.x[..., 0]

    method = Around()
    assert (method.acts_at.name, method.acts_at.branches, method.acts_at.once) == ("around", ("mlp",), False)
    tokens = Tokens(torch.ones(1, 2, 3), build_layout())
    assert torch.equal(method.carry(tokens, None, None, None), torch.ones(1, 2)) and method.scores_tokens


def build_layout():
    from tokenzoo.tokens import Layout

    return Layout(0, False, (1, 2))


@pytest.mark.parametrize("hook", ["check_recipe", "lift_trace", "scan_rows"])
def test_hooks_that_have_moved_are_told(hook: str):
    with pytest.raises(TypeError, match=f"Mine defines {hook}: inherit tokenzoo.core.mixins"):
        type("Mine", (Method,), {hook: lambda self, *args: None})


def test_every_trait_has_its_new_spelling():
    """What version 0.1 let a method override is a trait now, by name."""
    accessors = {name for name, value in vars(Declared).items() if isinstance(value, property)}
    since = {"attends", "reads_maps", "remembers"}  # traits that 0.1 had no property for
    assert accessors - since - {"acts_at", "drops", "fuses"} == set(RENAMED) - {"branches"}


def test_what_a_method_may_override():
    """At most fifteen members, none of which shares its name with an option of any method."""
    hooks = {
        name for cls in (Method,) for name, value in vars(cls).items()
        if not name.startswith("_") and not getattr(value, "__final__", False)
    } - {"layers"}  # fmt: skip
    assert len(hooks) <= 15, sorted(hooks)
    from tokenzoo.core.mixins import HOOKS

    accessors = {name for name in vars(Declared) if not name.startswith("_")}
    for name in tokenzoo.list_methods():
        cls = tokenzoo.method_class(name)
        assert not set(cls.options()) & (hooks | accessors | set(HOOKS.values())), name
        assert not set(vars(cls)) & accessors, name  # declared as traits
