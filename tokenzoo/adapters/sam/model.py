"""timm's vision_transformer_sam.py: the image encoder of Segment Anything and relatives.

Differences from upstream: tokenzoo's loop runs the blocks (features, intermediates). Only reductions
that leave a grid inside every attention window are served, and the windows are rebuilt after the last block at the
latest, before the neck: everything after it sees the full map. Windows at the border are filled up with zeros, which
take part as in the released code of Liang et al. (NeurIPS 2022); there, many centres coincide, and which of them count
as nearest is a matter of rounding. Where the shrunken window is as large as the full one nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.registry import declaring
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..walk import Walk
from .blocks import ReducingSamBlock, WindowedMap, restored
from .costs import windows_across
from .tokens import as_tokens


class ReducingVisionTransformerSAM(Walk, VisionTransformerSAM):
    """`VisionTransformerSAM` whose blocks shrink the attention windows; a `WindowedMap` travels from block to block.

    Methods see the windows as sequences of their own, side by side in the batch.
    """

    rebuilds = True

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        return {0: Layout(0, False, window_of(self))}  # one window, whatever the size of the map

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[WindowedMap, None]:
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.pos_embed, x.shape[1:3])
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        return WindowedMap(x, (int(x.shape[1]), int(x.shape[2]))), None

    def walk_tokens(self, x: Tensor) -> Iterator[Tokens]:
        """`walk` as tokens of the whole map in raster order, with what became of every one of them."""
        for state in self.walk(x):
            yield as_tokens(state, window_of(self))

    # ---- what the ends cost

    def head_macs(self, n: int, layout: Layout) -> int:
        return conv_macs(self.neck) * n + linear_macs(self.head) * (n if self.global_pool == "" else 1)

    def copies(self, grid: tuple[int, int], layout: Layout) -> int:
        down, right = windows_across(grid, layout.grid)
        return down * right

    def all_tokens(self, n: int, grid: tuple[int, int], layout: Layout) -> int:
        # what fills up windows at the border counts once these were shrunk
        return grid[0] * grid[1] if n == layout.num_patches else n * self.copies(grid, layout)

    # ---- outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """The neck's output for images [B, C, H, W]: the full map [B, C', H / patch, W / patch]."""
        for state in self.walk(x):  # noqa: B007 (only the last one is wanted)
            pass
        return self.neck(self._full(state))

    def _full(self, state: WindowedMap) -> Tensor:
        """The map with all windows rebuilt [B, C, H, W]."""
        trace = self.tokenzoo_recipe.lift_trace(state.trace)
        return restored(state, window_of(self), trace).x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's `forward_intermediates`; shrunken windows are rebuilt in every map that is handed out.

        Args:
            x: images [B, C, H, W].
            indices: last n blocks if int, all if None, else the blocks named.
            norm: apply the neck to the intermediates.
            stop_early: stop after the last block named.
            output_fmt: "NCHW".
            intermediates_only: leave the final features out.
        """
        from timm.models._features import feature_take_indices

        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}; SAM models give 'NCHW' only")
        take, max_index = feature_take_indices(len(self.blocks), indices)
        maps = []
        for index, state in enumerate(self.walk(x, last=max_index if stop_early else None), -1):
            if index in take:
                full = self._full(state)
                maps.append(self.neck(full) if norm else full)
        return maps if intermediates_only else (self.neck(self._full(state)), maps)


def window_of(model: nn.Module) -> tuple[int, int]:
    """Tokens (down, right) of the attention windows."""
    side = next(block.window_size for block in model.blocks if block.window_size)
    return side, side


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout, rotary positions, or no windows.
    """
    name = type(model).__name__
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            f"{name}.patch_drop drops random patches before block 0; set model.patch_drop = torch.nn.Identity() (or "
            "create the model with patch_drop_rate=0) before patching"
        )
    if model.rope_window is not None or model.rope_global is not None:
        raise ValueError(
            f"{name} with rotary positions is not served: its tables fit one size of window; create it with "
            "use_rope=False"
        )
    sides = sorted({block.window_size for block in model.blocks if type(block) is Block} - {0})
    if len(sides) != 1:
        raise ValueError(f"{name} has windows of {sides or 'no size'}: one size is needed to reduce inside of it")


def check_block(block: nn.Module) -> nn.Module | None:
    """The attention layer of a block if it is no exactly known class."""
    return None if type(block.attn) is Attention else block.attn


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that this model cannot follow.

    Raises:
        ValueError: methods that leave no grid, at a place without a map, or that weigh keys by size.
    """
    name = type(model).__name__
    for method in recipe.methods:
        if not (method.opens_span or method.closes_span):
            raise ValueError(
                f"{name} is served by methods that leave a grid inside its attention windows and those that rebuild it "
                f"({_served()}); {method.name} at the place {method.place!r} does neither"
            )
        if method.place not in ("before", "after", *(("norm",) if method.closes_span else ())):
            raise ValueError(f"{name}: {method.name} at the place {method.place!r} finds no map of windows there")
        if method.proportional:
            raise ValueError(f"{name}: its attention takes no sizes; {method.name} needs prop_attn=False")
    opened = [method.name for method in recipe.methods if method.opens_span]
    if len(opened) != 1:
        raise ValueError(f"{name} can shrink its windows once; the recipe does so {len(opened)} times ({opened})")


def _served() -> str:
    """Names of the methods that SAM models take."""
    return ", ".join(declaring("opens_span", "closes_span"))


FAMILY = Family(
    name="vision_transformer_sam",
    tried="timm 1.0.19 to 1.0.31",
    summary="timm vision_transformer_sam.py: image encoders of Segment Anything (clustering inside windows only)",
    models={VisionTransformerSAM: ReducingVisionTransformerSAM},
    blocks={Block: ReducingSamBlock},
    check=check,
    check_block=check_block,
    check_recipe=check_recipe,
    bypassed=lambda model: [("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")],
)
