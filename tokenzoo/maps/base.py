"""What every token map offers, and what follows from its assignment alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..ops.rows import take_rows


class TokenMap(ABC):
    """A map from N tokens to N' tokens, the same shape for every image of the batch.

    Attributes:
        n_in: N, tokens before.
        n_out: N', tokens after.
        valid: [B, N'] bool, False for padding rows; None when the map itself adds no padding.
    """

    n_in: int
    n_out: int
    valid: Tensor | None = None
    whole: bool = False  # whether every old token counts in one new one at most, with all of its mass
    complete: bool = False  # whether every old token is known to have a new one, which spares a look at them
    linear: bool = True  # False when `apply` is not a matrix (elementwise maximum)
    drops: bool = False  # whether real tokens may be left without a new one that stands for them
    opens_span: bool = False  # whether a later step may rebuild the tokens from what the map remembers
    copies: bool = False  # whether every new token is one old token as it was (or padding)
    undo: int | None = None  # where in the trace the steps begin that the map takes back, None where it takes none
    grid_out: tuple[int, int] | None = None  # grid (down, right) that the new patches form, None where they form none
    gate: Tensor | None = None  # how open every token is in training [B, N], None for maps that really reduce
    sees_itself: bool = False  # of a map with gates: they do not count on the diagonal of attention
    in_place: bool = False  # every token stays in its place, with another value
    notes: bool = False  # nothing is changed: the map is there for its decision alone
    decision: Any | None = None  # what a learned method notes for its losses, see `tokenzoo.core.learned.Decision`

    @property
    @abstractmethod
    def heads(self) -> Tensor:
        """Old index of the token that stands for each new one [B, N'], -1 for a token without a single origin."""

    @property
    @abstractmethod
    def assign(self) -> Tensor:
        """New index of every old token [B, N], -1 for a dropped one."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Values of the new tokens: x [B, N, C] -> [B, N', C]."""

    @abstractmethod
    def pool(self, mass: Tensor) -> Tensor:
        """Sums of a per-token quantity over the members of each new token: [B, N, D] -> [B, N', D]."""

    def shares(self, dtype: torch.dtype) -> Tensor | None:
        """Share of every old token in the value of the one new token that it went into [B, N].

        None for maps that are nothing like that: an old token counts in several, or values are no sums.

        Args:
            dtype: of the shares, float32 at least.
        """
        return None

    def means(self, x: Tensor) -> Tensor:
        """What the map makes of tokens that are not those it was made for: means with its weights [B, N', C].

        Args:
            x: [B, N, C].
        """
        y = self.apply(x)
        total = self.apply(torch.ones_like(x[..., :1]))  # exactly 1 where tokens are kept or averaged
        return torch.where(total > 0, y / total.clamp(min=torch.finfo(total.dtype).tiny), y)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Token sizes after the map; `size` None stands for ones.

        Args:
            size: [B, N, 1] float32 or None.
            batch: B, used when `size` is None.
            device: where to make the ones.
        """
        if size is None:
            size = torch.ones(batch, self.n_in, 1, device=device)
        return self.pool(size)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The way back: every old token reads its new one.

        Args:
            y: values of the new tokens [B, N', D].
            dropped: values that dropped tokens get [B, N, D]; zeros when None.
        """
        assign = self.assign
        if self.complete:
            return take_rows(y, assign)
        back = take_rows(y, assign.clamp(min=0))
        fill = torch.zeros_like(back) if dropped is None else dropped.to(back.dtype)
        return torch.where((assign >= 0).unsqueeze(-1), back, fill)

    def of_branch(self, branch: str) -> TokenMap:
        """The same map, made once for several branches of a block, for one of them: "attention" or "mlp"."""
        return self

    def back(self, y: Tensor) -> Tensor:
        """What a branch around which the map merges adds to the residual stream [B, N, C], of its outputs y."""
        return self.lift(y)

    def lift_to_members(self, y: Tensor) -> Tensor:
        """The same for what goes to all that count in a new token, whether they read it or not (its gradient).

        Args:
            y: values of the new tokens [B, N', D].
        """
        return self.lift(y)

    @property
    def dropped(self) -> Tensor:
        """[B, N] bool, the tokens that no single new one stands for."""
        return self.assign < 0

    @property
    def num_dropped(self) -> int | None:
        """How many tokens of an image are `dropped` at most, None where the shapes do not say."""
        return None

    def with_lift(self, **options: Any) -> TokenMap:
        """The same map with other options of the way back; maps without any are returned as they are."""
        return self

    def masked(self, visible: Tensor) -> TokenMap:
        """The same map where a mask hides some tokens: none of them counts in a new token that has visible members.

        A new token with hidden members only is made of these, and stays hidden.

        Args:
            visible: [B, N] bool, False for hidden tokens and padding.

        Raises:
            ValueError: the values of this kind of map depend on hidden tokens in ways that cannot be taken out.
        """
        raise ValueError(
            f"{type(self).__name__} mixes tokens that attn_mask hides (or, in training, the gates of an earlier "
            "method) with others; call the model without a mask, or use a method that drops or merges tokens one by one"
        )

    def arranged(self, rows: Tensor) -> TokenMap | None:
        """The same map with its new tokens in another order; None where this form has none, see `maps.chain.arrange`.

        Args:
            rows: the new token that comes to stand in each place [B, N'].
        """
        return None

    def membership(self) -> Tensor:
        """The 0/1 matrix [B, N', N] of which old token stands in which new one."""
        slots = torch.arange(self.n_out, device=self.assign.device).view(1, -1, 1)
        return (self.assign.unsqueeze(1) == slots).float()

    @abstractmethod
    def matrix(self) -> Tensor:
        """The dense W [B, N', N] of `apply`. For tests and pictures: quadratic."""
