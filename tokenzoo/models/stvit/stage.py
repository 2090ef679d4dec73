"""Stages of STViT-R: Swin's, and the one whose units go through a few semantic tokens and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.semantic_block import SemanticBlock
from .forms import Places, Whole, Windowed
from .swin import SwinBlock

UNIT = 6  # blocks: Swin, generate, refine, two of self-attention, restore


class SwinStage(nn.Module):
    """Blocks of one resolution, and the step to the next.

    Args:
        blocks: the blocks.
        downsample: the step; identity behind the last stage.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def run_blocks(self, x: Tensor) -> Tensor:
        """The blocks alone: [B, H, W, C] -> [B, H, W, C]."""
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def _run(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls a step, and keeps its activations for the backward pass or not."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(step, *args, use_reentrant=False)
        return step(*args)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H / 2, W / 2, 2 C], or the same size in the last stage."""
        return self.downsample(self.run_blocks(x))


@register_notrace_module  # sizes decide
class SemanticStage(SwinStage):
    """Units of six blocks: of a Swin block's tokens a few semantic ones are made, refined, and read back by all tokens.

    Args:
        blocks: see `semantic_blocks`.
        downsample: the step to the next stage.
        form: which tokens see which.
        prompt: channels of a learned prompt, `semantic_token2`, that is added to the semantic tokens of the first unit
            before they are refined; 0 has none.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module, form: Whole | Windowed, prompt: int = 0):
        super().__init__(blocks, downsample)
        self.form = form
        self.semantic_token2 = nn.Parameter(torch.zeros(1, 4 * form.sample**2, prompt)) if prompt else None
        if prompt:
            trunc_normal_(self.semantic_token2, std=0.02)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "SemanticStage cannot be compiled by torch.jit.script: what its tokens see is worked out from the size of "
            "the map while it runs; use torch.jit.trace, torch.compile or torch.export instead"
        )

    def run_blocks(self, x: Tensor) -> Tensor:
        """The blocks alone: [B, H, W, C] -> [B, H, W, C].

        Raises:
            ValueError: a map of another size than the form for classification takes.
        """
        places = self.form.places((x.shape[1], x.shape[2]), x)
        for first in range(0, len(self.blocks), UNIT):
            prompt = self.semantic_token2 if first == 0 else None  # of the first unit alone, as released
            x = self._unit(list(self.blocks[first : first + UNIT]), x, places, prompt)
        return x

    def _unit(self, blocks: list[nn.Module], x: Tensor, places: Places, prompt: Tensor | None) -> Tensor:
        swin, generate, refine, local, among, restore = blocks
        x = self._run(swin, x)
        s = self._run(self.form.generate, generate, x, places)
        s = self._run(self.form.refine, refine, s, x, places, prompt)
        s = self._run(local, s, s, *places.local)
        s = self._run(among, s, s, None, places.among)
        return self._run(self.form.restore, restore, x, s, places)


def swin_blocks(dim: int, drop_paths: list[float], window: int, **options: Any) -> list[nn.Module]:
    """Blocks of a stage of Swin, every second one shifted.

    Args:
        dim: channels C.
        drop_paths: stochastic depth of each block; their number is the depth.
        window: tokens of a window's side.
        options: options of `SwinBlock`.
    """
    return [
        SwinBlock(dim, window=window, shift=window // 2 if i % 2 else 0, drop_path=rate, **options)
        for i, rate in enumerate(drop_paths)
    ]


def semantic_blocks(
    dim: int, drop_paths: list[float], window: int, shortcut: bool, init_values: float = 1e-5, **options: Any
) -> list[nn.Module]:
    """Blocks of a stage with semantic tokens.

    Args:
        dim: channels C.
        drop_paths: stochastic depth of each block; their number is the depth.
        window: tokens of a window's side.
        shortcut: pooled tokens are added to what is generated from them.
        init_values: where layer scales start.
        options: options that `SwinBlock` and `SemanticBlock` share.

    Raises:
        ValueError: blocks that are no whole number of units.
    """
    if not drop_paths or len(drop_paths) % UNIT:
        raise ValueError(
            f"STViTR: {len(drop_paths)} blocks of the third stage are no whole number of units of {UNIT}; give 6, 12, "
            "18, ... as depths[2]"
        )
    found: list[nn.Module] = []
    for i, rate in enumerate(drop_paths):
        if i % UNIT == 0:
            found.append(SwinBlock(dim, window=window, drop_path=rate, **options))
        else:
            own = {"shortcut": shortcut or i % UNIT != 1, "init_values": init_values, "drop_path": rate}
            found.append(SemanticBlock(dim, **own, **options))
    return found


def init_weights(module: nn.Module) -> None:
    """Starting values of one module, as published."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
