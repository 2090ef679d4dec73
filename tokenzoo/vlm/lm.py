"""A language model whose marked rows never enter: taken out of values, positions, masks and deep features."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import CACHE, Kept, ReducedCache, ReducedLengths, ReducedStaticCache, reduced
from .gather import both, compact, take, take_mask, widened
from .layer import SPAN
from .passing import KWARG, Note, Span
from .rows import marked
from .shrinking import shrink_early_caches
from .standing_in import named


class LmPlan(NamedTuple):
    """What the language model does.

    Attributes:
        drops: whether some of its layers drop rows.
        positions: "original" or "contiguous".
        masks_come: whether masks come as the multimodal model has built them, for the rows that are held.
    """

    drops: bool
    positions: str
    masks_come: bool = False


class ReducingLm:
    """Mixin of language models; upstream's own `forward` runs on the rows that are left."""

    tokenzoo_plan: LmPlan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = named(super().forward, args, kwargs)
        note: Note | None = given.pop(KWARG, None)
        if CACHE == "cache" and "past_key_values" in given:
            given[CACHE] = given.pop("past_key_values")
        kept = getattr(given.get(CACHE), "kept", None)
        fed = note is not None and note.visual is not None
        if not fed and kept is None:
            return super().forward(**given)
        if given.get("inputs_embeds") is None:
            given["inputs_embeds"] = self.embed_tokens(given.pop("input_ids"))
        drop = marked(given["inputs_embeds"]) if fed else None
        cuts = fed and self.tokenzoo_plan.drops and bool(note.visual.any())
        if drop is not None and not cuts and not bool(drop.any()):
            drop = None
        if drop is None and kept is None:
            return super().forward(**given)
        given, span, order = self._shortened(given, note, drop, kept, cuts)
        out = super().forward(**given, **{SPAN: span})
        if order is not None and note is not None:
            note.order, note.valid = order, span.valid
            if span.left is not None:
                rows, note.valid = span.left
                note.order = order.gather(1, rows)
        if span.after:
            cache = given.get(CACHE)
            if cache is not None:
                before = cache.held
                cache.kept.layers = shrink_early_caches(self.layers, cache, span)
                cache.kept.short += before - cache.held
        return out

    def _shortened(
        self, given: dict[str, Any], note: Note | None, drop: Tensor | None, kept: Kept | None, cuts: bool
    ) -> tuple[dict[str, Any], Span, Tensor | None]:
        """Arguments without the rows that go, what layers have to know, and which rows are left."""
        x, plan = given["inputs_embeds"], self.tokenzoo_plan
        batch, n = x.shape[:2]
        cache = self._cache(given)
        past = 0 if cache is None else cache.held  # a tensor in static caches, of which decoding asks nothing
        if drop is not None:
            past = int(past)
        if kept is None:
            kept = Kept(batch, past, x.device)
        if cache is not None:
            cache.kept = kept
        if cuts or kept.layers:
            self._check_windows(past + n)
        if cuts:
            self._check_checkpoints()
        length, tail, before = past + kept.gap, past - kept.index.shape[1], kept.layers
        past_valid = None if not cuts or kept.valid is None else kept.rows(past)[1]  # decoding does no work here
        positions = given.get("position_ids")
        if positions is None:
            positions = (torch.arange(n, device=x.device) + length).unsqueeze(0)
        if plan.positions == "contiguous":
            positions = positions - kept.dropped - (0 if drop is None else drop.long().cumsum(1) - drop.long())
        order = valid = visual = real = None
        counts: list[int] = []
        mask = given.get("attention_mask")
        if cache is not None and (kept.gap or kept.index.shape[1]) and not self.tokenzoo_plan.masks_come:
            mask = translated(mask, cache, n)
        if drop is not None:
            # a prompt with less to drop than its mates keeps no padding that would hold these up; in training it does,
            # since the label of a first word is that of the padding in front, and trainers count it
            stays = note.padding is None or note.asking is not None
            gone = drop if stays else drop | note.padding.to(drop.device)
            order, valid = compact(gone, note.right)
            x = take(x, order)
            x = x if valid is None else torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
            positions = _taken(positions, order, past)
            given |= _deep(given, drop, order, valid)
            kept.extend(order, valid, n, past, drop.sum(1, keepdim=True))
            if isinstance(cache, ReducedStaticCache):
                cache.shrink(n - order.shape[1])
            cols = torch.cat([torch.arange(past, device=x.device).expand(batch, -1), order + past], 1)
            whole = kept.valid
            # of the user's own mask: rows of padding that we put in behind a prompt see the front of it alone
            seen = None if mask is None else _columns(mask, batch)[:, past:]
            if mask is None:  # never none: gaps of positions would be taken for borders of packed prompts
                mask = torch.ones_like(cols) if whole is None else whole.long()
            else:
                mask = take_mask(mask, order, cols, whole)
                if isinstance(cache, ReducedStaticCache):
                    mask = widened(mask, cache, order.shape[1])
            if cuts:
                visual = both(take(note.visual, order), valid)
                counts = visual.sum(1).tolist()
                real = both(None if seen is None else take(seen, order), valid)
        given |= {"inputs_embeds": x, "position_ids": positions, "attention_mask": mask}
        rotary = self._rotary(x) if plan.drops and plan.positions == "contiguous" else None
        asking = None if note is None or note.asking is None or order is None else take(note.asking, order)
        right = note is not None and note.right
        span = Span(visual, real, valid, counts, asking, past, tail, past_valid, before, positions, rotary, right)
        return given, span, order

    def _check_windows(self, rows: int) -> None:
        """Refuses droppers where a layer's window is shorter than what it would hold.

        Raises:
            ValueError: with the window and the way out.
        """
        window = getattr(self.config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(self.config, "layer_types", None) or ()) and rows >= window:
            raise ValueError(
                f"{type(self).__name__} has layers with a window of {window} rows, and {rows} are held: rows that are "
                "dropped between layers cannot be followed there; use a selector alone, or shorter prompts"
            )

    def _check_checkpoints(self) -> None:
        """Refuses checkpoints that hand on the gradients of tensors alone, where rows travel with more than that.

        Raises:
            ValueError: with the other kind.
        """
        layer = self.layers[0]
        if not (self.training and getattr(layer, "gradient_checkpointing", False)):
            return
        if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "droppers cannot be trained with reentrant checkpoints; call model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False})'
            )

    def _cache(self, given: dict[str, Any]) -> ReducedCache | None:
        """The cache of the call, a new one where upstream would make one."""
        use = given.get("use_cache")
        use = self.config.use_cache and not self.training if use is None else use
        if given.get(CACHE) is None and use:
            given[CACHE] = ReducedCache(config=self.config)
        return reduced(given.get(CACHE), self.tokenzoo_plan.drops)

    def _rotary(self, x: Tensor) -> Any:
        """Makes cosines and sines of positions for a layer."""
        types = getattr(self.config, "layer_types", None)
        typed = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters

        def rotary(positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            return self.rotary_emb(x, positions, types[layer]) if typed else self.rotary_emb(x, positions)

        return rotary


def _taken(positions: Tensor, order: Tensor, past: int) -> Tensor:
    """Positions of the rows that are left: [B or 1, N], or one per axis of an image [3, B, N].

    Of four axes the first one is read by masks alone, which take gaps in it for borders of packed prompts.
    """
    if positions.dim() == 2:
        return take(positions, order)
    axes = [take(axis, order) for axis in positions]
    if len(axes) == 4:
        axes[0] = (torch.arange(order.shape[1], device=order.device) + past).expand_as(order)
    return torch.stack(axes)


def _deep(given: dict[str, Any], drop: Tensor, order: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """Features that are added to visual rows behind the first layers, without those of rows that go."""
    where = given.get("visual_pos_masks")
    if where is None:
        return {}
    left = (~drop)[where]
    features = given.get("deepstack_visual_embeds")
    return {
        "visual_pos_masks": both(take(where, order), valid),
        "deepstack_visual_embeds": None if features is None else [each[left] for each in features],
    }


def _columns(mask: Any, batch: int) -> Tensor:
    """Which columns of a mask the last row sees [B, N] bool."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask.dim() == 2:
        return mask.bool()
    row = mask[:, 0, -1]
    return (row if row.dtype == torch.bool else row == 0).expand(batch, -1)


def translated(mask: Any, cache: ReducedLengths, length: int) -> Any:
    """A mask that counts every row ever put in, as one of the rows that are held, and of the new ones.

    Args:
        mask: the user's; those of four dimensions and None stay, unless padding was put in.
        cache: which rows it holds.
        length: new rows.

    Raises:
        ValueError: a mask of another length.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return mask
    if mask is None:
        valid = None if cache.kept.valid is None else cache.rows()[1]  # without tensor work in most decoding
        return None if valid is None else torch.cat([valid, valid.new_ones(len(valid), length)], 1).long()
    put_in = int(cache.get_seq_length())
    if mask.shape[1] != put_in + length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but {put_in} rows were put in and {length} come: give "
            f"{put_in + length} columns, one per row ever put in (dropped ones too)"
        )
    index, valid = cache.rows()
    past = mask[:, :put_in].gather(1, index)
    return torch.cat([past if valid is None else past * valid, mask[:, put_in:]], 1)
