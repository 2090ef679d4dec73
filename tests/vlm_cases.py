"""Tiny random vision-language models, a row per family, with batches of prompts; and the recipes they are tried with.

A family takes part in all checks of `test_vlm.py` by one row of `FAMILIES`, a selector or dropper by one of `SELECTORS`
or `DROPPERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


SIGLIP = {**TOWER, "vision_use_head": False}
GRID = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "image_token_id": IMAGE}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
GEMMA = {**LM, "head_dim": 8}
PACKED = {
    "depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "in_channels": 3,
}  # fmt: skip


def _llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=transformers.LlamaConfig(**LM), **GRID
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER), text_config=transformers.Qwen2Config(**LM), **GRID,
        vision_feature_select_strategy="full", vision_feature_layer=-1, video_token_id=VIDEO,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def crops(model: nn.Module, counts: Sequence[int], generator: torch.Generator) -> Any:
    """Images of two shapes: a thumbnail and four crops, or two of them."""
    sizes = torch.tensor([[60, 60] if i % 2 == 0 else [30, 62] for i in range(sum(counts))])
    pixels = torch.zeros(len(sizes), 5, 3, 32, 32)
    for i in range(len(sizes)):
        own = 5 if i % 2 == 0 else 3
        pixels[i, :own] = torch.randn(own, 3, 32, 32, generator=generator)
    given = {"pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        rows = iter([len(f) for f in model.model.get_image_features(pixels.to(dtype), sizes).pooler_output])
    return given, [[next(rows) for _ in range(count)] for count in counts]


def _qwen(name: str, tower: dict[str, Any], text: dict[str, Any] | None = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        rope = ROPE if text is None else {**ROPE, "mrope_interleaved": True}
        words = {**LM, "rope_parameters": rope, "tie_word_embeddings": False, **(text or {})}
        config = getattr(transformers, f"{name}Config")(
            vision_config={**PACKED, **tower}, text_config=words, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def packed(model: nn.Module, counts: Sequence[int], generator: torch.Generator) -> Any:
    """Images of two sizes in one sequence of patches."""
    grids = [(1, 8, 8) if i % 2 == 0 else (1, 4, 12) for i in range(sum(counts))]
    pixels = [torch.randn(high * wide, 3 * 2 * 4 * 4, generator=generator) for _, high, wide in grids]
    rows = iter([high * wide // 4 for _, high, wide in grids])
    given = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    return given, [[next(rows) for _ in range(count)] for count in counts]


def packed_alone(given: dict[str, Tensor], first: int, count: int, prompt: int) -> dict[str, Tensor]:
    sizes = given["image_grid_thw"].prod(-1).tolist()
    start = sum(sizes[:first])
    patches = given["pixel_values"][start : start + sum(sizes[first : first + count])]
    return {"pixel_values": patches, "image_grid_thw": given["image_grid_thw"][first : first + count]}


def _internvl() -> nn.Module:
    sizes = {**TOWER, "num_hidden_layers": 3, "image_size": [32, 32], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**sizes), text_config=transformers.Qwen2Config(**LM),
        image_token_id=IMAGE, image_seq_length=16,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def _smolvlm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            vision_config={**TOWER, "num_hidden_layers": 3, "patch_size": 4}, scale_factor=2, pad_token_id=0,
            text_config=transformers.LlamaConfig(**LM), image_token_id=IMAGE,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def tiles(model: nn.Module, counts: Sequence[int], generator: torch.Generator) -> Any:
    """Tiles of each prompt in a row of the batch, zeros behind them."""
    pixels = torch.zeros(len(counts), max(counts), 3, 32, 32)
    for prompt, count in enumerate(counts):
        pixels[prompt, :count] = torch.randn(count, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels}, [[16] * count for count in counts]


def tiles_alone(given: dict[str, Tensor], first: int, count: int, prompt: int) -> dict[str, Tensor]:
    return {"pixel_values": given["pixel_values"][prompt : prompt + 1, :count]}


def _paligemma(text: str = "Gemma") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**SIGLIP), projection_dim=32, image_token_id=IMAGE,
            text_config=getattr(transformers, f"{text}Config")(**GEMMA),
        )  # fmt: skip
        return transformers.PaliGemmaForConditionalGeneration(config)

    return make


def _gemma3() -> nn.Module:
    words = transformers.Gemma3TextConfig(
        **GEMMA, sliding_window=1024, layer_types=["sliding_attention", "full_attention"] * 2
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**{**SIGLIP, "patch_size": 4}), text_config=words,
        image_token_id=IMAGE, mm_tokens_per_image=16, boi_token_id=START, eoi_token_id=END,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, square(16), slices),
    "vipllava": Family(_vipllava, square(16), slices),
    "llava_next": Family(_llava_next, crops, slices),
    "llava_onevision": Family(_onevision, crops, slices),
    "qwen2_vl": Family(
        _qwen("Qwen2VL", {"embed_dim": 32, "mlp_ratio": 2}), packed, packed_alone, "mm_token_type_ids"
    ),
    "qwen2_5_vl": Family(
        _qwen("Qwen2_5_VL", {
            "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32,
            "hidden_act": "silu",
        }), packed, packed_alone, "mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        _qwen("Qwen3VL", {
            "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        }, {"head_dim": 8}), packed, packed_alone, "mm_token_type_ids",
    ),
    "internvl": Family(_internvl, square(16), slices),
    "smolvlm": Family(_smolvlm("SmolVLM"), tiles, tiles_alone),
    "idefics3": Family(_smolvlm("Idefics3"), tiles, tiles_alone),
    "paligemma": Family(_paligemma(), square(16), slices, "token_type_ids"),
    "paligemma2": Family(_paligemma("Gemma2"), square(16), slices, "token_type_ids"),
    "gemma3": Family(_gemma3, square(16), slices, "token_type_ids"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Loudest(Selector):
    """Rows with the largest norm: what the checks can work out by themselves."""

    name = "loudest"
    source = "a test"
    kind = "prune"
    unit = "image"

    def map(self, rows: Any, signals: Any, keep: int) -> KeepMap:
        return KeepMap(rows.x.norm(dim=-1).topk(keep, dim=1).indices.sort(1).values, rows.length)


def loudest(model: nn.Module, rows: Tensor, keep: int) -> Tensor:
    """What `Loudest` keeps of one entry of images [n, D]: new lines always, and some of each image, or of each tile."""
    newline = getattr(inner_of(model), "image_newline", None)
    kept = torch.zeros(len(rows), dtype=torch.bool) if newline is None else (rows == newline).all(-1)
    free = (~kept).nonzero().flatten()
    tile = 16 if hasattr(inner_of(model), "text_model") else max(1, len(free))
    for part in free.split(tile):
        kept[part[rows[part].norm(dim=-1).topk(keep).indices]] = True
    return kept


# name -> options that keep everything, options that leave fewer
SELECTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"keep": 1.0}, {"keep": 5}) for name in tokenzoo.vlm.list_selectors()
}
DROPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fastv": ({"removed": 0.0, "layers": 3}, {"removed": 0.5, "layers": 3}),
    "holitom": ({"removed": 0.0, "layers": 3}, {"removed": 0.5, "layers": 3}),
    "llavolta": ({"stride": 1, "layers": 3}, {"stride": 4, "layers": 3}),
    "mustdrop": ({"together": 0.0, "layers": 3}, {"together": 0.1, "alone": 0.2, "layers": 3}),
    "pyramiddrop": ({"shares": (1.0,), "layers": 3}, {"shares": (0.4,), "layers": 3}),
    "todre": ({"threshold": 0.0, "layers": 3}, {"threshold": 1.0, "layers": 3}),
    "visiondrop": ({"kept": ((0.8, 0.2),), "layers": 3}, {"kept": ((5, 2),), "layers": 3}),
}
# what every family is tried with; methods inside a tower that packs images are refused
RECIPES: dict[str, Callable[[], Any]] = {
    "selector": lambda: Loudest(keep=6),
    "dropper": lambda: tokenzoo.FastV(removed=0.5, layers=3),
    "both": lambda: [Loudest(keep=9), tokenzoo.FastV(removed=0.5, layers=3)],
    "tower": lambda: [tokenzoo.ToMe(r=2), Loudest(keep=9), tokenzoo.FastV(removed=0.5, layers=3)],
}
SERVED = [(name, each) for name in FAMILIES for each in RECIPES if each != "tower" or not name.startswith("qwen")]
# selectors that need a tower with a class token
NEEDS_CLASS: tuple[str, ...] = tuple(
    name for name in tokenzoo.vlm.list_selectors() if tokenzoo.vlm.registry.find(name).class_row
)


# with 5.18, VIP-LLaVA fails unpatched, SmolVLM and Idefics3 hand tiles on in another form
LATER = ("vipllava", "smolvlm", "idefics3")


def build(name: str, seed: int = 0, double: bool = False) -> nn.Module:
    """A tiny model whose attention and positions matter: weights of transformers' own size make it almost linear."""
    if name in LATER and transformers.__version__ < "5.24":
        pytest.skip(f"{name} is tried from transformers 5.24 on")
    torch.manual_seed(seed)
    model = FAMILIES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):  # Gemma 3's projection begins with zeros
                parameter.normal_(std=0.2)
            elif parameter.dim() > 1:
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
    flat = ("input_ids", "attention_mask", "position_ids", family.types)
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


def counted(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with positions that count from the first word, where the family has one axis of them."""
    if name.startswith("qwen"):
        return batch
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def tower_of(model: nn.Module) -> Any:
    """The vision tower of a family that does not pack images."""
    inner = inner_of(model)
    return inner.vision_model if hasattr(inner, "vision_model") else inner.vision_tower


def oracle_of(model: nn.Module, recipe: str) -> AbstractContextManager:
    """Context in which an unpatched model hands on what it does under the part of a recipe that is in its tower."""
    return tokenzoo.patched(tower_of(model), "tome", r=2, dense=True) if recipe == "tower" else nullcontext()


def handed(model: nn.Module, batch: dict[str, Tensor], gradients: bool = False) -> dict[str, Any]:
    """What an unpatched model hands to its language model."""
    found: dict[str, Any] = {}
    hook = lm_of(model).register_forward_pre_hook(lambda module, args, given: found.update(given), with_kwargs=True)
    with torch.set_grad_enabled(gradients):
        model(**batch)
    hook.remove()
    return found
