"""The outermost model: labels follow the rows that are left, and words are known before images are encoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from .cache import CACHE, reduced
from .gather import take
from .lm import translated
from .passing import KWARG, PROMPT, Note, Prompt, during
from .recipe import VlmRecipe
from .standing_in import named

_OF_LOSS = ("num_items_in_batch", "shift_labels")


class ReducingHead:
    """Mixin of models with a language head."""

    tokenzoo_recipe: VlmRecipe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = named(super().forward, args, kwargs)
        labels = given.pop("labels", None)
        if labels is None:
            return super().forward(**given)
        if isinstance(given.get("logits_to_keep"), Tensor) or given.get("logits_to_keep"):
            raise ValueError(
                "labels and logits_to_keep were given together, but rows that leave the model have no logits; give "
                "labels alone, -100 where nothing is to be learned"
            )
        note = Note(asking=_asking(labels))
        whole = given.pop("return_dict", None)
        out = super().forward(**given, return_dict=True, **{KWARG: note})
        if note.order is not None:
            labels = _followed(labels, note.order, note.valid)
        options = {key: given[key] for key in _OF_LOSS if key in given}
        vocabulary = self.config.get_text_config().vocab_size
        out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=vocabulary, **options)
        return out.to_tuple() if whole is False else out

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs: Tensor, options: Any, *args: Any) -> Any:
        ids = inputs if inputs is not None and not inputs.is_floating_point() else options.get("input_ids")
        prompt = None if ids is None else Prompt(ids, options.get("attention_mask"))
        with during(PROMPT, prompt):
            return super()._maybe_prepare_encoder_kwargs_for_generation(inputs, options, *args)

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        if self.tokenzoo_recipe.droppers:
            names = ", ".join(dropper.name for dropper in self.tokenzoo_recipe.droppers)
            raise ValueError(
                f"cache_implementation='static': all layers of a static cache hold the same rows, but {names} drops "
                "rows between layers; leave cache_implementation out, or use a selector alone"
            )
        cache = reduced(super()._prepare_static_cache(*args, **kwargs))
        cache.shrinks = True
        return cache

    def create_masks_for_generate(self, **given: Any) -> Any:
        """Masks of one row that is decoded with a static cache, in front of a compiled forward."""
        cache, mask = given.get(CACHE), given.get("attention_mask")
        length = given["inputs_embeds"].shape[1]
        if length > 1 or not bool(cache.get_seq_length()):
            return mask  # made where it is known which rows are left
        if getattr(cache, "kept", None) is not None:
            given["attention_mask"] = translated(mask, cache, length)
        return getattr(super(), "create_masks_for_generate", create_masks_for_generate)(**given)

    def _prefill(self, ids: Tensor, settings: Any, *args: Any, **kwargs: Any) -> Any:
        size = settings.prefill_chunk_size
        if size is not None and self.tokenzoo_recipe.droppers:
            names = ", ".join(dropper.name for dropper in self.tokenzoo_recipe.droppers)
            raise ValueError(
                f"prefill_chunk_size={size} reads a prompt in parts, but {names} decides by all of it; leave "
                "prefill_chunk_size out, or use a selector alone"
            )
        return super()._prefill(ids, settings, *args, **kwargs)


def _asking(labels: Tensor) -> Tensor:
    """Rows whose next token begins a trained answer [B, N] bool."""
    trained = labels != -100
    begins = trained[:, 1:] & ~trained[:, :-1]
    return torch.cat([begins, torch.zeros_like(begins[:, :1])], 1)


def _followed(labels: Tensor, order: Tensor, valid: Tensor | None) -> Tensor:
    """Labels of the rows that are left; nothing is learned from padding that was put in."""
    labels = take(labels, order)
    if valid is None:
        return labels
    labels = labels.masked_fill(~valid, -100)
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(~valid[:, :-1], -100)], 1)
