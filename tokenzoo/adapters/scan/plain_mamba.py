"""PlainMamba of tokenzoo.models.

Differences from upstream: after a reduction the convolutions see zeros at the places that are gone, and each of the
four paths is the original one cut down to the places that are left; a merged token keeps the place of the one that it
merged into. Proportional attention does not exist here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.method import BlockShape
from ...core.tokens import Layout, Tokens
from ...layers.scan.gaps import stretch
from ...models._scan_signals import ScanSignals
from ...models.plain_mamba.block import PlainMambaBlock
from ...models.plain_mamba.costs import block_macs
from ...models.plain_mamba.mixer import PlainMambaMixer, on_grid
from ...models.plain_mamba.model import PlainMamba
from ...models.plain_mamba.orders import kept_paths
from ..backbone import Family
from .block import ScanBlock, ScanContext
from .model import ScanModel, check_recipe


class ReducingPlainMambaBlock(ScanBlock, PlainMambaBlock):
    """`PlainMambaBlock` on tokens."""

    def mixer_input(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def mix(self, z: Tensor, tokens: Tokens, context: ScanContext, scan: ScanSignals | None) -> Tensor:
        return self.mamba(z, tokens.layout.grid, tokens.positions, self._stretch(tokens, context), scan)

    def _stretch(self, tokens: Tokens, context: ScanContext) -> Any:
        """Step sizes that states decay with where places of a path were pruned."""
        if context.gap_rule is None or tokens.positions is None:
            return None
        gaps = F.pad(kept_paths(tokens.layout.grid, tokens.positions).step.diff(dim=2) - 1, (1, 0))

        def stretched(dt: Tensor, path: int, of_zero: Tensor) -> Tensor:
            return stretch(dt, gaps[:, path], context.gap_rule, of_zero)

        return stretched

    def to_tokens(self, values: Tensor, tokens: Tokens) -> Tensor:
        return values.transpose(1, 2)

    def finish(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x if self.dw is None else on_grid(self.dw, x, tokens.layout.grid, tokens.positions)

    def shape(self) -> BlockShape:
        return BlockShape(self.mamba.dim, 1, self.mamba.dim)

    def macs(self, tokens: int, layout: Layout, directions: int | None = None) -> int:
        """Multiply-adds for a number of tokens; `directions` as in `tokenzoo.models.plain_mamba.costs`."""
        return block_macs(self, tokens, layout.num_patches, directions)


class ReducingPlainMamba(ScanModel, PlainMamba):
    """`PlainMamba` whose blocks reduce tokens."""

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return PlainMamba.embed(self, x)[0], None

    def drop_path_of(self, index: int) -> nn.Module:
        return self.layers[index].drop_path

    def norm(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.ln1(x)

    def tap(self, x: Tensor, index: int, norm: bool) -> Tensor:
        return self._tap(x, index, norm)


def check_block(block: nn.Module) -> nn.Module | None:
    """The mixer of a block if it is no exactly known class."""
    return None if type(block.mamba) is PlainMambaMixer else block.mamba


FAMILY = Family(
    name="plain_mamba",
    summary="tokenzoo.models: PlainMamba (methods that look at no attention)",
    models={PlainMamba: ReducingPlainMamba},
    blocks={PlainMambaBlock: ReducingPlainMambaBlock},
    check_block=check_block,
    check_recipe=check_recipe,
    scans=True,
)
