"""Merging around the branches of a block: merge, compute, unmerge."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..core.method import Step
from ..core.signals import Signals
from ..core.tokens import Inside, Tokens
from ..maps import ChainMap, TokenMap
from ..ops.attention import Heads
from ..ops.rows import split_dim


class Merging:
    """The merges around the branches of one block call.

    Args:
        steps: the steps at the place "around".
        tokens: tokens at the input of the block.
        signals: gives the signals of a step for tokens in front of attention.

    Attributes:
        moved: other methods have acted in this block since its input, so that a map of its input no longer fits.
    """

    def __init__(self, steps: tuple[Step, ...], tokens: Tokens, signals: Callable[[Step, Tokens], Signals]) -> None:
        self.steps, self.start, self.signals, self.moved = steps, tokens, signals, False
        self.shared: dict[int, TokenMap | None] = {}

    def enter(self, branch: str, tokens: Tokens, read: Callable[[Tensor], Tensor]) -> tuple[TokenMap | None, Tensor]:
        """The map of one branch, None where its tokens are left alone, and what the branch reads behind that map.

        Args:
            branch: "attention" or "mlp".
            tokens: tokens in front of the branch.
            read: what the branch makes of the residual stream (its norm).
        """
        maps: list[TokenMap] = []
        z: Tensor | None = None
        outer = tokens
        for order, step in enumerate(self.steps):
            if branch not in step.branches:
                continue
            if not step.method.merges_stream and z is None:
                outer.tell(_joined(maps))
                z = read(tokens.x)
            # one matching for both branches where the method wants that and the sequence is still the block's input
            once = step.method.matches_once and not maps and not self.moved
            if once and order in self.shared:
                token_map = self.shared[order]
            else:
                token_map = self._decide(step, branch, self.start if once else tokens, z)
                if once:
                    self.shared[order] = token_map
            if token_map is None:
                continue
            token_map = token_map.of_branch(branch)
            maps.append(token_map)
            z = None if step.method.merges_stream else token_map.apply(z)
            if z is None or any(branch in later.branches for later in self.steps[order + 1 :]):
                tokens = tokens._replace(trace=None).reduce(token_map)  # what nobody reads is not merged
        merge = _joined(maps)
        if merge is not None:
            outer.tell(merge)
        return merge, read(tokens.x) if z is None else z

    def recorded(self, tokens: Tokens, token_map: TokenMap, branch: str) -> Tokens:
        """The tokens with a note of what merged around a branch, for pictures; unchanged where nobody keeps a trace."""
        if tokens.trace is None:
            return tokens
        names = [step.method.name for step in self.steps if branch in step.branches]
        note = Inside(self.steps[0].block, " + ".join(names), token_map, len(tokens.trace))
        return tokens._replace(inside=(*tokens.inside, note))

    def _decide(self, step: Step, branch: str, tokens: Tokens, z: Tensor | None) -> TokenMap | None:
        signals = self.signals(step, tokens)
        signals.branch, signals.branch_input = branch, z
        token_map = step.decide(tokens, signals)
        if token_map is not None and (token_map.gate is not None or token_map.decision is not None):
            raise step.error(
                "decided gates, or notes for its losses, around a branch, behind which all tokens are there again; act "
                "'before' a block or 'between' attention and MLP"
            )
        return token_map


def _joined(maps: list[TokenMap]) -> TokenMap | None:
    return None if not maps else maps[0] if len(maps) == 1 else ChainMap(*maps)


def lifted_heads(heads: Heads, token_map: TokenMap) -> Heads:
    """Heads of merged tokens, read back by the tokens before the merge."""

    def back(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        rows = token_map.lift(t.transpose(1, 2).flatten(2))
        return split_dim(rows, 2, t.shape[1], t.shape[3]).transpose(1, 2)

    # rows of a dropped token, which reads nothing, are those of some other
    placed = None if heads.placed is None else heads.placed.lifted(token_map.assign.clamp(min=0))
    return heads._replace(q=back(heads.q), k=back(heads.k), v=back(heads.v), placed=placed)
