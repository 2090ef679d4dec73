"""Weights that the authors of a learned method released, under the names that they have in a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters.inspect import block_names, blocks_of, is_patched
from ..core.learned import Learned
from ..core.step import Step


def rename_released(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names a released checkpoint's weights as a patched model does, so that `model.load_state_dict` takes them.

    Weights of the backbone keep their names; those of the method move into the blocks that it acts in
    (`score_predictor.0.` of DynamicViT becomes `blocks.3.tokenzoo_0_dynamicvit.`, say).

    Args:
        model: patched with the recipe that the weights were trained for.
        state: what the file holds, the weights themselves or a dict with them under "model" or "state_dict".

    Raises:
        ValueError: the model is not patched, or no method of its recipe knows released names.

    Source: names of the repositories raoyongming/DynamicViT, Sense-X/SiT and JoakimHaurum/TokenReduction.
    """
    for name in ("model", "state_dict"):
        state = state[name] if isinstance(state.get(name), Mapping) else state
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched; call tokenzoo.patch_model with the method first")
    names = _names(model)
    if not names:
        raise ValueError(
            "no method of the model's recipe has released weights with names of their own; call model.load_state_dict"
        )
    found = {}
    for key, value in state.items():
        old = next((start for start in names if key.startswith(start)), "")
        found[names[old] + key[len(old) :] if old else key] = value
    return found


def _names(model: nn.Module) -> dict[str, str]:
    """Beginnings of released names, and what they become."""
    acting: dict[int, list[tuple[str, Step]]] = {}
    for name, block in zip(block_names(model), blocks_of(model)):
        for step in block.tokenzoo.steps:
            if isinstance(step.method, Learned) and step.method.released:
                acting.setdefault(step.order, []).append((f"{name}.{step.key}.", step))
    found = {}
    for steps in acting.values():
        method = steps[0][1].method
        stages = [step.block for _, step in steps if step.strength is not None]
        for place, step in steps:
            for old, new in method.released.items():
                if "{stage}" in old and step.strength is None:
                    continue
                numbers = {"block": step.block, "stage": stages.index(step.block) if step.strength is not None else -1}
                found[old.format(**numbers)] = place + new
    return found
