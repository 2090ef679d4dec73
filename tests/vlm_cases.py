"""Tiny random vision-language models, a row per family, with batches of prompts; and the recipes they are tried with.

A family takes part in all checks of `test_vlm.py` by one row of `FAMILIES`, a selector or dropper by one of `SELECTORS`
or `DROPPERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tokenzoo
from tokenzoo.maps import KeepMap
from tokenzoo.vlm import Selector

transformers = pytest.importorskip("transformers")

IMAGE, VIDEO, START, END = 250, 251, 248, 249
LM = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


class Family(NamedTuple):
    """One row.

    Attributes:
        build: makes the model.
        images: (how many images each prompt has, a generator) -> inputs beside the words, and rows of each image of
            each prompt.
        alone: (all inputs beside the words, images in front, images of the prompt, prompt) -> those of one prompt.
        types: name of the argument that tells placeholders from words, None without one.
    """

    build: Callable[[], nn.Module]
    images: Callable[[nn.Module, Sequence[int], torch.Generator], tuple[dict[str, Tensor], list[list[int]]]]
    alone: Callable[[dict[str, Tensor], int, int, int], dict[str, Tensor]]
    types: str | None = None


def slices(given: dict[str, Tensor], first: int, count: int, prompt: int) -> dict[str, Tensor]:
    """Inputs of one prompt where all of them have images in front."""
    return {name: value[first : first + count] for name, value in given.items()}


def square(rows: int, side: int = 32) -> Callable[..., Any]:
    """Images of one size that all make the same number of rows."""

    def images(model: nn.Module, counts: Sequence[int], generator: torch.Generator) -> Any:
        pixels = torch.randn(sum(counts), 3, side, side, generator=generator)
        return {"pixel_values": pixels}, [[rows] * count for count in counts]

    return images


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=transformers.LlamaConfig(**LM),
        image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def _vipllava() -> nn.Module:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=transformers.MistralConfig(**LM),
        image_token_id=IMAGE, vision_feature_layer=[-2, -3],
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration(config)


FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, square(16), slices),
    "vipllava": Family(_vipllava, square(16), slices),
}


@dataclass(frozen=True, kw_only=True)
class Loudest(Selector):
    """Rows with the largest norm: what the checks can work out by themselves."""

    name = "loudest"
    source = "a test"
    kind = "prune"

    def map(self, rows: Any, signals: Any, keep: int) -> KeepMap:
        return KeepMap(rows.x.norm(dim=-1).topk(keep, dim=1).indices.sort(1).values, rows.length)


def loudest(rows: Tensor, keep: int) -> Tensor:
    """What `Loudest` keeps of one image's rows [n, D]."""
    kept = torch.zeros(len(rows), dtype=torch.bool)
    kept[rows.norm(dim=-1).topk(keep).indices] = True
    return kept


# name -> options that keep everything, options that leave fewer
SELECTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"keep": 1.0}, {"keep": 5}) for name in tokenzoo.vlm.list_selectors()
}
DROPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fastv": ({"removed": 0.0}, {"removed": 0.5}),
}
# selectors that need a tower with a class token
NEEDS_CLASS: tuple[str, ...] = tuple(
    name for name in tokenzoo.vlm.list_selectors() if tokenzoo.vlm.registry.find(name).class_row
)


def build(name: str, seed: int = 0, double: bool = False) -> nn.Module:
    """A tiny model whose attention and positions matter: weights of transformers' own size make it almost linear."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.double() if double else model


def words(counts: Sequence[int], generator: torch.Generator, front: int, back: int) -> list[int]:
    """A prompt with images: words, an image, words, an image, ..., words."""

    def some(count: int) -> list[int]:
        return torch.randint(10, 240, (count,), generator=generator).tolist()

    ids = some(front)
    for count in counts:
        ids += [START, *[IMAGE] * count, END, *some(3)]
    return ids + some(back)


def prompts(
    name: str, model: nn.Module, counts: Sequence[int] = (1, 2), seed: int = 3, side: str = "left"
) -> dict[str, Tensor]:
    """A batch of prompts with so many images each, padded at one side."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    given, rows = family.images(model, counts, generator) if sum(counts) else ({}, [[] for _ in counts])
    ids = [words(own, generator, 3 + 2 * i, 4 + 3 * i) for i, own in enumerate(rows)]
    longest = max(map(len, ids))

    def padded(values: list[int], fill: int) -> list[int]:
        pad = [fill] * (longest - len(values))
        return [*pad, *values] if side == "left" else [*values, *pad]

    batch = {
        "input_ids": torch.tensor([padded(row, 0) for row in ids]),
        "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in ids]),
    }
    if family.types is not None:
        batch[family.types] = (batch["input_ids"] == IMAGE).long()
    dtype = next(model.parameters()).dtype
    return batch | {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def alone(name: str, batch: dict[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The prompts of a batch one by one, without padding."""
    family, found = FAMILIES[name], []
    flat = ("input_ids", "attention_mask", family.types)
    for prompt, count in enumerate(counts):
        real = batch["attention_mask"][prompt].bool()
        own = {key: value[prompt][real][None] for key, value in batch.items() if key in flat}
        rest = {key: value for key, value in batch.items() if key not in flat}
        if count:
            own |= family.alone(rest, sum(counts[:prompt]), count, prompt)
        found.append(own)
    return found


def pixels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of `get_image_features`."""
    return {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask") and "type_ids" not in k}


def inner_of(model: nn.Module) -> Any:
    """The multimodal model without its head."""
    return model.model


def lm_of(model: nn.Module) -> Any:
    """The language model."""
    inner = inner_of(model)
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


def handed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What an unpatched model hands to its language model."""
    found: dict[str, Any] = {}
    hook = lm_of(model).register_forward_pre_hook(lambda module, args, given: found.update(given), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found
