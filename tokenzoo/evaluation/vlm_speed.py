"""Speed of a vision-language model: reading a prompt, the language model's part of it, and decoding, round robin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..apply.patch import patch_model
from ..vlm.cache import CACHE
from ..vlm.family import vlm_family_of
from ..vlm.report import VlmReport, vlm_report
from .peak import peak_bytes
from .timing import Spread, clock_for, interleave


class VlmSpeed(NamedTuple):
    """One row of a comparison; seconds.

    Attributes:
        label: what was measured.
        rows: rows of the prompt in the first layer of the language model, and in the last.
        prefill: reading a prompt, tower included.
        language_model: the language model's part of it.
        decode: one step behind the prompt.
        cache_bytes: of keys and values behind the prompt, as they lie in memory.
        peak_bytes: that tensors take at once while a prompt is read, beyond weights and inputs; None on devices whose
            allocations torch does not count. See `tokenzoo.evaluation.peak`.
        macs: of the language model's layers, by formula.
        ratio: of multiply-adds to those of the unpatched model.
        speed_up: of the language model against the unpatched one.
        speed_ups: the same of each round.
    """

    label: str
    rows: tuple[int, int]
    prefill: Spread
    language_model: Spread
    decode: Spread
    cache_bytes: int
    peak_bytes: int | None
    macs: int
    ratio: float
    speed_up: Spread
    speed_ups: tuple[float, ...]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that holds the same weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def vlm_bench(
    model: nn.Module,
    runs: Sequence[tuple[str, Any, dict[str, Any]]],
    inputs: dict[str, Tensor],
    rounds: int = 10,
    steps: int = 4,
    warmup: int = 1,
) -> tuple[list[VlmSpeed], str]:
    """Times a model, unpatched and with recipes, A B C A B C ...

    Args:
        model: unpatched; its weights are shared by all copies.
        runs: label, method and options of `tokenzoo.patch_model`, one per recipe.
        inputs: of one prompt, on the device of the model.
        rounds: how often each one reads the prompt.
        steps: tokens that are decoded behind it per round, one by one.
        warmup: rounds in front, which do not count.

    Returns:
        A row for the unpatched model and one per run, and the name of the clock.

    Raises:
        ValueError: numbers that are not positive.
    """
    if rounds < 1 or steps < 1:
        raise ValueError(f"rounds={rounds}, steps={steps}; give positive numbers")
    clock, name = clock_for(inputs["input_ids"].device)
    plain = shared_copy(model)
    models = [plain, *(patch_model(shared_copy(model), method, **options) for _, method, options in runs)]
    made = [_Timed(each, inputs, clock, steps) for each in models]
    with torch.inference_mode():
        interleave([one.read for one in made], warmup, clock)
        for one in made:
            one.inside.clear()
        prefill = interleave([one.read for one in made], rounds, clock)
        interleave([one.decode for one in made], 1, clock)
        decode = interleave([one.decode for one in made], rounds, clock)
        for one in made:
            one.cache = None
        peaks = [one.peak() for one in made]
    family = vlm_family_of(plain)
    tokens = family.placeholders(family.inner(plain).config)
    visual = int(torch.isin(inputs["input_ids"], torch.tensor(tokens, device=inputs["input_ids"].device)).sum())
    text = inputs["input_ids"].numel() - visual
    costs: list[VlmReport] = [vlm_report(each, text=text, images=[visual]) for each in models]
    rows = []
    for i, (label, one, cost) in enumerate(zip(["unpatched", *(run[0] for run in runs)], made, costs)):
        gains = [a / b for a, b in zip(made[0].inside, one.inside)]
        rows.append(
            VlmSpeed(
                label, (one.held[0], one.held[-1]), Spread.of(prefill[i]), Spread.of(one.inside),
                Spread.of([t / steps for t in decode[i]]), one.bytes, peaks[i], cost.prefill, cost.ratio,
                Spread.of(gains), tuple(gains),
            )
        )  # fmt: skip
    return rows, name


class _Timed:
    """One model that reads a prompt and decodes behind it.

    Args:
        model: patched or not; it gets hooks that take the time of its language model.
        inputs: of a prompt.
        clock: seconds.
        steps: tokens per call of `decode`.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], clock: Callable[[], float], steps: int) -> None:
        self.model, self.inputs, self.clock, self.steps = model, inputs, clock, steps
        self.inside: list[float] = []
        family = vlm_family_of(model)
        self.lm = family.language_model(family.inner(model))
        self.cache: Any = None
        self.held: list[int] = []
        self.bytes = 0

    def read(self) -> None:
        """Reads the prompt; the time of the language model's part is noted."""
        began: list[float] = []
        hooks = [
            self.lm.register_forward_pre_hook(lambda *_: began.append(self.clock())),
            self.lm.register_forward_hook(lambda *_: self.inside.append(self.clock() - began[-1])),
        ]
        out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        self.cache = out[CACHE]
        layers = self.cache.layers
        self.held = [layer.keys.shape[2] for layer in layers]
        self.bytes = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))

    def peak(self) -> int | None:
        """Bytes that reading the prompt takes at most, the cache that it makes included; not timed."""
        return peak_bytes(
            lambda: self.model(**self.inputs, use_cache=True, logits_to_keep=1), self.inputs["input_ids"].device
        )

    def decode(self) -> None:
        """Some steps behind the prompt, on one cache that grows."""
        ids = self.inputs["input_ids"][:, -1:]
        for _ in range(self.steps):
            self.model(ids, **{CACHE: self.cache}, use_cache=True)
