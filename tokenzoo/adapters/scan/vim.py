"""Vision Mamba of tokenzoo.models.

Differences from upstream: blocks carry the residual stream behind the mixer's addition, which is the sum of the two
tensors that upstream hands on; merging is linear, so merging the stream is merging both. The class token stands in
front of the tokens and is put back into the sequence for the scan alone. Proportional attention does not exist here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.method import BlockShape
from ...core.tokens import Layout, Tokens
from ...layers.scan.gaps import gaps_of, stretch
from ...models._scan_signals import ScanSignals
from ...models.vim.block import VimBlock, add_residual
from ...models.vim.costs import mixer_macs
from ...models.vim.embed import class_rows
from ...models.vim.mixer import VimMixer
from ...models.vim.model import VisionMamba
from ...ops.scan_order import from_scan, scan_positions, to_scan
from ..backbone import Family
from .block import ScanBlock, ScanContext, rows_of
from .model import ScanModel, check_recipe


class ReducingVimBlock(ScanBlock, VimBlock):
    """`VimBlock` on tokens."""

    def mixer_input(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def mix(self, z: Tensor, tokens: Tokens, context: ScanContext, scan: ScanSignals | None) -> Tensor:
        rows = rows_of(tokens)
        h = self.mixer(to_scan(z, rows), self._stretch(tokens, context), scan)
        return from_scan(h, rows)

    def _stretch(self, tokens: Tokens, context: ScanContext) -> Any:
        """Step sizes that states decay with where positions in between were pruned."""
        if context.gap_rule is None or tokens.positions is None:
            return None
        layout = tokens.layout
        rows = scan_positions(tokens.positions, layout.scan_rows)
        rows = to_scan(rows.unsqueeze(-1), rows_of(tokens)).squeeze(-1)
        length = layout.num_prefix + layout.num_patches
        gaps = {name: gaps_of(rows, length, name == "backward") for name in ("forward", "backward")}

        def stretched(dt: Tensor, direction: str, of_zero: Tensor) -> Tensor:
            return stretch(dt, gaps[direction], context.gap_rule, of_zero)

        return stretched

    def to_tokens(self, values: Tensor, tokens: Tokens) -> Tensor:
        return from_scan(values.transpose(1, 2), rows_of(tokens))

    def shape(self) -> BlockShape:
        return BlockShape(self.mixer.dim, 1, self.mixer.dim)

    def macs(self, tokens: int, layout: Layout, directions: int | None = None) -> int:
        """Multiply-adds for a number of tokens; `directions` as in `tokenzoo.models.vim.costs`."""
        return mixer_macs(self.mixer, tokens, directions)


class ReducingVisionMamba(ScanModel, VisionMamba):
    """`VisionMamba` whose blocks reduce tokens."""

    def scan_rows(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return class_rows(self.cls_position, grid[0] * grid[1])

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        return add_residual(from_scan(self.embed_tokens(x), self.scan_rows(tuple(grid))), None), None

    def drop_path_of(self, index: int) -> nn.Module:
        return self.layers[index + 1].drop_path if index + 1 < len(self.layers) else self.drop_path

    def norm(self, x: Tensor) -> Tensor:
        """The final norm, in the type of the weights."""
        return self._narrow(self.norm_f(x))

    def tap(self, x: Tensor, index: int, norm: bool) -> Tensor:
        return self.norm(x) if norm else self._narrow(x)


def check_block(block: nn.Module) -> nn.Module | None:
    """The mixer of a block if it is no exactly known class."""
    return None if type(block.mixer) is VimMixer else block.mixer


FAMILY = Family(
    name="vim",
    summary="tokenzoo.models: Vision Mamba (methods that look at no attention)",
    models={VisionMamba: ReducingVisionMamba},
    blocks={VimBlock: ReducingVimBlock},
    check_block=check_block,
    check_recipe=check_recipe,
    scans=True,
)
