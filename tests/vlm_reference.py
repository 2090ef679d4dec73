"""Slow references for one prompt without padding, from unpatched parts of the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vlm_cases import IMAGE, handed, inner_of, lm_of, pixels

from tokenzoo.vlm.cache import CACHE


def features(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Rows of every image [n, D] of an unpatched model."""
    with torch.no_grad():
        return list(inner_of(model).get_image_features(**pixels(batch)).pooler_output)


def whole_mask(given: dict[str, Any], n: int, kind: str | None) -> Tensor:
    """Which row sees which [n, n] bool, as the unpatched model has it in layers of some kind."""
    mask = given.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask[kind]
    if mask is None or mask.dim() == 2:
        return torch.ones(n, n, dtype=torch.bool).tril()
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


def run_layers(
    model: nn.Module, x: Tensor, positions: Tensor, gone: Tensor, masks: list[Tensor], deep: Any = None,
    contiguous: bool = False,
) -> Tensor:  # fmt: skip
    """Logits of unpatched layers in which columns are closed from some layer on, rows being kept.

    Args:
        model: unpatched.
        x: [1, n, D].
        positions: [1, n] or [3 or 4, 1, n].
        gone: layer from which on a row is gone [n]; the depth for those that stay.
        masks: which row sees which [n, n] bool, of each layer.
        deep: rows that features join behind the first layers, and those features.
        contiguous: positions count the rows that are there.
    """
    lm = lm_of(model)
    positions = positions[1:] if positions.dim() == 3 and positions.shape[0] == 4 else positions
    types = getattr(lm.config, "layer_types", None)
    typed = "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters
    own = torch.eye(x.shape[1], dtype=torch.bool)
    for i, layer in enumerate(lm.layers):
        here = gone > i
        now = positions - (~here).long().cumsum(0) + (~here).long() if contiguous else positions
        rope = lm.rotary_emb(x, now, types[i]) if typed else lm.rotary_emb(x, now)
        # additive: models with capped logits attend eagerly, which takes no other masks
        seen = torch.zeros(own.shape, dtype=x.dtype).masked_fill(~((masks[i] & here) | own), -1e30)
        x = layer(x, attention_mask=seen[None, None], position_embeddings=rope, position_ids=None, **{CACHE: None})
        if deep is not None and i < len(deep[1]):
            x = lm._deepstack_process(x, deep[0], deep[1][i])
    found, cap = model.lm_head(lm.norm(x)), getattr(lm.config, "final_logit_softcapping", None)
    if "final_logit_softcapping" not in inspect.getsource(inspect.getmodule(type(model))):
        cap = None  # PaliGemma in front of transformers 5.24 caps no logits
    return found if cap is None else torch.tanh(found / cap) * cap


def grown(model: nn.Module, given: dict[str, Any], gone: Tensor, new: list[int]) -> dict[str, Any]:
    """Arguments of `run_layers` for a prompt that has been continued by some tokens, without a cache."""
    x = given["inputs_embeds"]
    n, positions = x.shape[1], given.get("position_ids")
    positions = torch.arange(n)[None] if positions is None else positions
    more = len(new)
    if more:
        x = torch.cat([x, model.get_input_embeddings()(torch.tensor([new]))], 1)
        last = positions[..., -1:]
        positions = torch.cat([positions, *[last + 1 + j for j in range(more)]], -1)
    depth = len(lm_of(model).layers)
    types = getattr(lm_of(model).config, "layer_types", None) or [None] * depth
    masks = [torch.ones(n + more, n + more, dtype=torch.bool).tril() for _ in range(depth)]
    for mask, kind in zip(masks, types):
        mask[:n, :n] = whole_mask(given, n, kind)
    deep = None
    if given.get("visual_pos_masks") is not None:
        rows = torch.cat([given["visual_pos_masks"], torch.zeros(1, more, dtype=torch.bool)], 1)
        deep = (rows, given["deepstack_visual_embeds"])
    gone = torch.cat([gone, torch.full((more,), depth)])
    return {"x": x, "positions": positions, "gone": gone, "masks": masks, "deep": deep}


def at_entry(model: nn.Module, batch: dict[str, Tensor], kept: Tensor) -> Tensor:
    """`gone` of a selection: kept [visual rows] bool; the others are gone from layer 0 on."""
    ids = batch["input_ids"][0]
    gone = torch.full((len(ids),), len(lm_of(model).layers))
    gone[(ids == IMAGE).nonzero().flatten()[~kept]] = 0
    return gone


def logits(
    model: nn.Module, batch: dict[str, Tensor], gone: Tensor, new: list[int] = (), contiguous: bool = False
) -> Tensor:
    """Logits [rows that never go, V] of one prompt, continued by some tokens."""
    given = handed(model, batch)
    with torch.no_grad():
        args = grown(model, given, gone, list(new))
        found = run_layers(model, **args, contiguous=contiguous)[0]
    return found[args["gone"] == len(lm_of(model).layers)]


def shortened(model: nn.Module, batch: dict[str, Tensor], gone: Tensor) -> Tensor:
    """Logits [rows that never go, V] with gradients: embeddings of one prompt are made shorter by hand, and shorter
    again in front of the layers that rows are gone from on, with their own positions.

    Args:
        model: unpatched.
        batch: one prompt without padding, with labels where the model makes masks by them.
        gone: layer from which on a row is gone [n]; the depth for those that stay.
    """
    lm, given = lm_of(model), handed(model, batch, gradients=True)
    args = grown(model, given, gone, [])
    x, positions, deep = args["x"], args["positions"], args["deep"]
    positions = positions[1:] if positions.dim() == 3 and positions.shape[0] == 4 else positions
    types = getattr(lm.config, "layer_types", None)
    typed = "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters
    index = torch.arange(x.shape[1])
    for i, layer in enumerate(lm.layers):
        stay = gone[index] > i
        index, x = index[stay], x[:, stay]
        now = positions[..., index]
        rope = lm.rotary_emb(x, now, types[i]) if typed else lm.rotary_emb(x, now)
        seen = args["masks"][i][index][:, index]
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -1e30)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None, **{CACHE: None})
        if deep is not None and i < len(deep[1]):
            visual = deep[0][0]
            number = visual.long().cumsum(0) - 1
            x = lm._deepstack_process(x, visual[index][None], deep[1][i][number[index[visual[index]]]])
    found, cap = model.lm_head(lm.norm(x)), getattr(lm.config, "final_logit_softcapping", None)
    if "final_logit_softcapping" not in inspect.getsource(inspect.getmodule(type(model))):
        cap = None  # see `run_layers`
    return (found if cap is None else torch.tanh(found / cap) * cap)[0]
