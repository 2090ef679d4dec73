"""Hooks on a patched block see the values of its tokens, a tensor, as on a plain one.

Explainers, feature extractors and prompt tuning hang hooks on blocks and expect tensors [B, N, C]. While a block has
hooks, its call hands it the values and takes values from it; what else tokens carry goes past the hooks in an object of
that one call. A hook may change values, not their number. Without hooks nothing is different.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .refusals import Unscriptable


class Aside:
    """What goes past the hooks of one call.

    Args:
        state: `Tokens` (or whatever tuple with values `x` the family hands on), None for blocks called with a tensor.
    """

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def given(self, x: Tensor, block: str) -> Any:
        """What the block of that name gets, with the values that the hooks in front of it left."""
        return x if self.state is None else self._with(x, f"in front of {block}")

    def left(self, out: Any) -> Tensor:
        """What the hooks behind the block see of what it leaves."""
        self.state = None if isinstance(out, Tensor) else out
        return out if self.state is None else out.x

    def result(self, x: Tensor) -> Any:
        """What the block hands on, with the values that the hooks behind it left."""
        return x if self.state is None else self._with(x, "behind a block")

    def _with(self, x: Any, where: str) -> Any:
        if not isinstance(x, Tensor) or x.shape != self.state.x.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"a hook {where} turned values {tuple(self.state.x.shape)} into {got}; hooks may change values, not "
                "their number: add prompts in front of block 0 (model.norm_pre) and patch with protect=n"
            )
        return self.state._replace(x=x)


class HookedBlock(Unscriptable):
    """Mixin of patched blocks; `forward` takes an `Aside` where there are hooks."""

    reads_recipe: bool = False  # whether the block needs the recipe, as `tokenzoo_recipe`
    attends_among: str = "tokens"  # or "channels", whose cost is linear in tokens
    fused: bool | None = None  # whether attention runs on a fused kernel, None where there is no attention

    def attention_path(self, biased: bool) -> str:
        """What a report says of how the block attends: begins with "unfused" where the map is written out.

        Args:
            biased: log sizes or a padding mask are added.
        """
        return "fused" if self.fused else "unfused"

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        # a compiler around the block holds this function, also once the block is a plain one again
        if not hooks or not isinstance(self, HookedBlock):
            return nn.Module.__call__(self, x, *args, **kwargs)
        aside = Aside(None if isinstance(x, Tensor) else x)
        return aside.result(nn.Module.__call__(self, x if aside.state is None else x.x, *args, aside=aside, **kwargs))
