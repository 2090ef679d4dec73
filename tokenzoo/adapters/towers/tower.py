"""What encoders of multimodal models, and timm's classifiers around them, have in common.

Most features are maps [B, H, W, C], and a projector puts neighbouring patches together, so it wants all of them in
their places. A tower without its projector answers with the tokens that are left: as a map where all are there, in a
row [B, N', C] where they are fewer; average pooling weighs by size. With its projector, every patch reads the token it
went into first, and dropped ones come back as the recipe's `fill` says: fewer tokens in the blocks, as many in the
answer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import linear_macs
from ...ops.rows import split_dim
from ..eva.model import RotaryModel
from ..eva.rope import Rope, check_rebuild, waves_of
from ..features import Reads
from ..flow import Flow
from ..grid_costs import way_back
from ..walk import Beside


class Tower(RotaryModel):
    """An encoder with a projector.

    A family's subclass gives `projector` and `cells`; `project` and `projector_macs` where the projector is no module
    that takes maps.
    """

    has_class = False
    takes_added = False
    maps = True  # features are maps [B, H, W, C], else [B, N, C]
    projects_features = False  # whether `forward_features` gives what the projector makes

    # ---- spelled by the family

    @property
    def projector(self) -> nn.Module | None:
        """What puts patches together, of maps [B, H, W, C]; None where the tower has none, or does not use it."""
        raise NotImplementedError

    def cells(self, grid: tuple[int, int]) -> int:
        """Tokens that the projector makes of a grid."""
        raise NotImplementedError

    def project(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the projector makes of all patches [B, N, C], row by row."""
        return self.projector(split_dim(x, 1, *grid))

    def projector_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of `project`."""
        return linear_macs(self.projector) * self.cells(grid)

    @property
    def tower(self) -> nn.Module:
        """The encoder itself."""
        return self

    # ---- the sequence

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        grid = self.grid_of(x.shape[-2:])
        x, table = self.tower._pos_embed(self.tower.patch_embed(x))
        waves = waves_of(self.tower.rope, grid) if self.tokenzoo_recipe.merged_positions == "mean" else None
        return x, Rope.of(table, self.num_protected, waves)

    # ---- features

    @property
    def pooling(self) -> str:
        return "avg" if self.global_pool == "avg" and self.projector is None else ""

    def head_reads(self) -> Reads:
        return Reads.of(self.pooling)

    @property
    def wants_all(self) -> bool:
        return self.projector is not None

    def features(self, tokens: Tokens) -> Tensor:
        """What `forward_features` returns, from tokens after the last block with their trace."""
        grid = tokens.layout.grid
        if self.projector is not None:
            x = self.read(tokens).x
            if self.projects_features:
                return self.project(x, grid)
            return split_dim(x, 1, *grid) if self.maps else x
        x = super().features(tokens)
        placed = x.shape[1] == tokens.layout.num_patches and all(step.map.whole for step in tokens.trace or ())
        return split_dim(x, 1, *grid) if self.maps and placed else x

    def head_macs(self, n: int, layout: Layout) -> int:
        if self.projector is None:
            return super().head_macs(n, layout)
        return self.projector_macs(layout.grid)

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        """The way back to the grid in front of the projector, where that is more than copying."""
        if self.projector is None or index < len(self.blocks) - 1:
            return []
        dim = self.embed_dim
        back = way_back(flow.held_behind, dim, dim, flow)
        return [Beside("grid", flow.left, flow.left, back, back)] if back else []  # not the model's tokens, a copy


class Encoder(Tower):
    """An encoder that answers with projected tokens, with their mean, or with all of them."""

    def forward_head(self, x: Tensor | Tokens) -> Tensor:
        """What the encoder answers with, from `Tokens`, or from maps that `forward_features` returned."""
        if self.pooling:
            return self.pool(x if isinstance(x, Tokens) else x.flatten(1, -2))
        if self.projector is None:
            return self.features(x) if isinstance(x, Tokens) else x
        if isinstance(x, Tokens):
            return self.project(self.read(x).x, x.layout.grid)
        if not self.maps:
            raise ValueError(
                f"{type(self).__name__}.forward_head: features do not tell the grid that the projector needs; call "
                "model(images), or model.forward_head(model.forward_tokens(images))"
            )
        return self.projector(x)


class Classifier(Tower):
    """timm's classifier around an encoder: its blocks are the encoder's, and it pools their tokens itself."""

    projects_features = True

    @property
    def tower(self) -> nn.Module:
        return self.encoder

    @property
    def blocks(self) -> nn.Module:
        return self.encoder.blocks

    @property
    def patch_embed(self) -> nn.Module:
        return self.encoder.patch_embed

    @property
    def _pos_embed(self) -> Any:
        return self.encoder._pos_embed

    def checkpoints(self, index: int) -> bool:
        return self.encoder.grad_checkpointing

    def head_macs(self, n: int, layout: Layout) -> int:
        if self.projector is None:
            return super().head_macs(n, layout)
        pooled = 1 if self.global_pool else self.cells(layout.grid)
        return super().head_macs(n, layout) + linear_macs(self.head) * pooled

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        if self.projector is None:
            x = self.pool(x if isinstance(x, Tokens) else x.flatten(1, -2))
        else:
            x = self.features(x) if isinstance(x, Tokens) else x
            x = x.mean(dim=1) if self.global_pool == "avg" else x
        x = self.head_drop(self.norm(x))
        return x if pre_logits else self.head(x)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that these models cannot follow.

    Raises:
        ValueError: rotary tables have to be rebuilt from mean coordinates but cannot be.
    """
    if recipe.merged_positions == "mean":
        tower = getattr(model, "encoder", model)
        check_rebuild(tower.rope, tower.patch_embed.grid_size)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    encoder = getattr(model, "encoder", None)
    return [] if encoder is None else [("encoder", encoder, "hook its parts (encoder.patch_embed, encoder.blocks[i])")]
