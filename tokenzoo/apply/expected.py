"""What images really cost where counts depend on them, and solving for a budget that is held on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.backbone import BackboneInfo
from ..adapters.inspect import describe, running_steps
from ..adapters.registry import find_family
from ..adapters.wrappers import backbone_of
from ..core.recipe import Placed, Recipe
from ..core.step import Step
from ..core.tokens import Layout
from ..core.trace import TraceStep
from ..cost.report import report
from ..cost.rows import block_rows, read_costs

_TRIES = 9  # halvings of the strength: a five-hundredth of it


@dataclass(frozen=True)
class Counted(Recipe):
    """A recipe as one image went through it.

    Args:
        counted: (step, tokens before, tokens after) of every block.
    """

    counted: tuple[tuple[tuple[Step, int, int], ...], ...] = ()

    def token_counts(
        self, depth: int, layout: Layout, restarts: Mapping[int, Layout] | None = None
    ) -> list[list[tuple[Step, int, int]]]:
        return [list(row) for row in self.counted]


@torch.inference_mode()
def expected_share(model: nn.Module, images: Tensor, batch_size: int = 32) -> float:
    """Share of the unpatched multiply-adds that images cost on average under the recipe of a patched model.

    Real tokens are counted, image by image; the padding of a batch, which goes with its longest image, is not. Where
    counts do not depend on the images, this is `report(model, size).ratio`.

    Args:
        model: patched, on the device of the images.
        images: normalised images [B, C, H, W]; some dozens tell the mean to a percent.
        batch_size: images per step.

    Raises:
        ValueError: not patched, no images, or a recipe whose counts cannot be followed image by image.
    """
    backbone = backbone_of(model)
    size = tuple(images.shape[-2:])
    recipe = getattr(backbone, "tokenzoo_recipe", None)
    if recipe is None:
        raise ValueError(f"{type(backbone).__name__} is not patched; call tokenzoo.patch_model first")
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images of shape {tuple(images.shape)}; give normalised images [B, C, H, W], at least one")
    if not recipe.data_dependent:
        return report(model, size).ratio
    family = find_family(backbone)
    view = family.view(backbone)
    info = describe(backbone, tuple(view.grid_of(size)), recipe)
    _check(backbone, recipe, info)
    costs = read_costs(backbone, family, info)
    steps = running_steps(backbone)
    shared = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
    bounds = Placed.of(recipe, steps).token_counts(len(costs.blocks), info.layout)
    base, total = sum(row.macs for row in block_rows(costs, None)), 0
    for batch in images.split(batch_size):
        *_, tokens = backbone.walk(batch, trace=True)
        for counted in _by_image(bounds, tokens.trace, info.layout.num_prefix + info.layout.num_patches, len(batch)):
            total += sum(row.macs for row in block_rows(costs, Counted(**shared, counted=counted)))
    return total / base / len(images)


def _check(backbone: nn.Module, recipe: Recipe, info: BackboneInfo) -> None:
    if info.restarts or any(method.closes_span for method in recipe.methods):
        why = "begins new sequences" if info.restarts else "is given tokens back by its recipe"
        raise ValueError(
            f"{type(backbone).__name__} {why}, so that its tokens cannot be followed image by image; give a fixed "
            "budget, such as max_tokens"
        )


def _by_image(
    bounds: list[list[tuple[Step, int, int]]], trace: tuple[TraceStep, ...], length: int, images: int
) -> list[tuple[tuple[tuple[Step, int, int], ...], ...]]:
    """What every step left of every image.

    Args:
        bounds: (step, tokens before, tokens after) at most.
        trace: of a pass.
        length: tokens that enter, prefix included.
        images: in the batch.
    """
    queue = list(trace)
    n = [length] * images
    found: list[list[tuple[tuple[Step, int, int], ...]]] = [[] for _ in range(images)]
    for block, row in enumerate(bounds):
        acts: list[list[tuple[Step, int, int]]] = [[] for _ in range(images)]
        for step, _, _ in row:
            after = n
            if queue and (queue[0].block, queue[0].method) == (block, step.method.name):
                token_map = queue.pop(0).map
                left = token_map.valid
                after = [token_map.n_out] * images if left is None else left.sum(1).tolist()
            for i in range(images):
                acts[i].append((step, n[i], after[i]))
            n = after
        for i in range(images):
            found[i].append(tuple(acts[i]))
    return [tuple(rows) for rows in found]


def solve_expected(
    model: nn.Module, recipe: Recipe, share: float, images: Tensor, patched: Any, at_most: bool = False
) -> tuple[float, Recipe]:
    """The recipe in its image-dependent form, at the strength whose expected cost is nearest to a share.

    Args:
        model: unpatched.
        recipe: its methods that have such a form are set to it, the others to their own dial.
        share: of the unpatched multiply-adds, in (0, 1].
        images: to measure on, see `expected_share`.
        patched: context that puts a recipe on the model for a while.
        at_most: nothing above the share, however near it is.

    Returns:
        What the images cost on average, and the recipe.

    Raises:
        ValueError: no method has such a form, or the share is outside of what it can reach.
    """
    info = describe(backbone_of(model), recipe=recipe)
    if not any(m.image_dial(0.5, info.depth, info.layout) for m in recipe.methods):
        names = ", ".join(m.name for m in recipe.methods)
        raise ValueError(f"images were given, but {names} has no form whose counts follow them; leave images out")

    def reached(t: float) -> tuple[float, Recipe]:
        dialled = recipe.image_dial(t, info.depth, info.layout)
        with patched(model, dialled):
            return expected_share(model, images), dialled

    weakest, strongest = reached(0.0), reached(1.0)
    def distance(found: tuple[float, Recipe]) -> tuple[bool, float]:
        return at_most and found[0] > share, abs(found[0] - share)

    if share < strongest[0] - (0 if at_most else 0.005):
        raise ValueError(
            f"flops={share} cannot be reached: at full strength these images cost {strongest[0]:.3f} of the "
            "multiply-adds on average; act in earlier layers or ask for more"
        )
    best = min((weakest, strongest), key=distance)
    bottom, top = 0.0, 1.0
    for _ in range(_TRIES):
        middle = (bottom + top) / 2
        found = reached(middle)
        best = min(best, found, key=distance)
        bottom, top = (middle, top) if found[0] > share else (bottom, middle)
    return best
