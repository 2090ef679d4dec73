"""The stages of timm's Hiera: which of them attend among all places, and what of the model cannot be served, by name.

Every stage but the first begins with a block that pools, at the attention of the stage before. Methods act in the
blocks behind it, in the stages at the end whose attention is global.
"""

from __future__ import annotations

from torch import nn

from ...core.recipe import Recipe
from ..staged import refuse_across_stages


def stages_of(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Blocks of every stage that is there, the pooling ones in front; pruning may have taken some off."""
    blocks = tuple(model.blocks)
    starts = [0, *(end + 1 for end in model.stage_ends)]
    stages = [blocks[start:stop] for start, stop in zip(starts, starts[1:])]
    return [stage for stage in stages if stage]


def behind_pooling(stage: int, blocks: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """The blocks of a stage without the pooling one."""
    return blocks[1:] if stage else blocks


def first_global(model: nn.Module) -> int:
    """The first stage from which on no block behind a pooling one attends inside of mask units."""
    first = 0
    for stage, blocks in enumerate(stages_of(model)):
        if any(block.attn.use_mask_unit_attn for block in behind_pooling(stage, blocks)):
            first = stage + 1
    return first


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout is on; volumes; stages that are not half as high and wide as the one before; no global
            attention in the last stage; a stage of global attention without a block behind the pooling one.
    """
    name = type(model).__name__
    if model.patch_drop_rate > 0:
        raise ValueError(
            f"{name}.patch_drop_rate={model.patch_drop_rate} drops random mask units in training, which leaves the "
            "stages no grid; set model.patch_drop_rate = 0 before patching"
        )
    if len(model.patch_stride) != 2:
        raise ValueError(f"{name} embeds volumes of {len(model.patch_stride)} dimensions; use a model of images")
    if tuple(model.q_stride) != (2, 2) or model.q_pool != len(model.stage_ends) - 1:
        raise ValueError(
            f"{name} with q_stride={tuple(model.q_stride)} and q_pool={model.q_pool} has stages that are not half as "
            "high and wide as the one before; create it with q_stride=(2, 2) and q_pool one less than the stages"
        )
    first, stages = first_global(model), stages_of(model)
    if first == len(stages):
        raise ValueError(
            f"{name} attends inside of mask units up to its end, where no token can leave; create it with "
            "mask_unit_attn=(True, True, False, False), as all released models"
        )
    for stage in range(first, len(stages)):
        if not behind_pooling(stage, stages[stage]):
            raise ValueError(
                f"{name}: the only block of stage {stage} pools, and methods have none to act in; create it with two "
                "blocks or more in every stage of global attention"
            )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: images of half the size, which the stem and the mask-unit stages cannot embed; tokens rebuilt in
            another stage than they were reduced in.
    """
    first, counts = first_global(model), []
    for stage, blocks in list(enumerate(stages_of(model)))[first:]:
        counts.append(len(behind_pooling(stage, blocks)))
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    refuse_across_stages(
        type(model).__name__, sum(counts), recipe, firsts, "embedding of overlapping patches and its mask-unit stages"
    )
