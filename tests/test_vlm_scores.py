"""Scores that selectors read in towers: those of written-out maps, at the rows that the language model would see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from figures import difference
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_cases import FAMILIES, LM, TOWER, Loudest, build, inner_of, pixels, prompts

import tokenzoo
from tokenzoo.adapters.wholes import whole_of
from tokenzoo.vlm.family import vlm_family_of


@dataclass(frozen=True, kw_only=True)
class Asking(Loudest):
    """Notes what every row gets of attention."""

    reads = ("tower",)
    name = "asking"

    def map(self, rows: Any, signals: Any, keep: int) -> Any:
        SEEN.extend((image, index, score) for (image, index), score in zip(signals._where, signals.importance(-2)))
        return super().map(rows, signals, keep)


SEEN: list[tuple[int, torch.Tensor, torch.Tensor]] = []


def eager_maps(model: Any, batch: dict[str, torch.Tensor], layer: Any, monkeypatch: Any) -> list[torch.Tensor]:
    """Maps [crops, H, n, n] that one layer of a tower makes, a batch of crops or a crop of a packed tower each.

    The layer alone attends eagerly, on what fused layers give it. The model keeps eager attention.
    """
    found, seen, softmax = [], [], torch.nn.functional.softmax

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        found.append(softmax(*args, **options))
        return found[-1]

    hook = layer.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        inner_of(model).get_image_features(**pixels(batch))
        hook.remove()
        ((args, options),) = seen
        model.set_attn_implementation("eager")
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.functional.softmax", noted)
            layer(*args, **options)
    return found


def cells(score: torch.Tensor) -> torch.Tensor:
    """Means over 2 x 2 patches of crops of 8 x 8: [crops, 64] -> [crops * 16], row by row."""
    return score.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten()


def window_order(high: int, wide: int) -> list[int]:
    """Numbers of rows, row by row, in the order in which windows of 2 x 2 rows stand."""
    units = [(r, c) for r in range(high) for c in range(wide)]
    return [r * wide + c for r, c in sorted(units, key=lambda u: (u[0] // 2, u[1] // 2, u[0], u[1]))]


def at_rows(name: str, model: Any, batch: dict[str, torch.Tensor], score: list[torch.Tensor]) -> torch.Tensor:
    """Scores of patches [crops, n] at the rows of all images, one behind the other."""
    if name.startswith("qwen"):
        rows = []
        for own, (_, high, wide) in zip(score, batch["image_grid_thw"].tolist()):
            own = own.view(-1, 4).mean(1)  # 2 x 2 patches stand together
            if name == "qwen2_5_vl":
                own = torch.empty_like(own).index_copy(0, torch.tensor(window_order(high // 2, wide // 2)), own)
            rows.append(own)
        return torch.cat(rows)
    (crops,) = score
    if name in ("internvl", "smolvlm", "idefics3", "gemma3"):
        return cells(crops)
    if name in ("llava_next", "llava_onevision"):  # crops are laid out, unpadded and shrunk by code of transformers
        own = [5 if i % 2 == 0 else 3 for i in range(len(batch["image_sizes"]))]
        given = {"image_newline": torch.full((1,), torch.inf)}
        given |= (
            {"vision_feature_select_strategy": "default"} if name == "llava_next" else
            {"vision_aspect_ratio": inner_of(model).config.vision_aspect_ratio}
        )  # fmt: skip
        packed = inner_of(model).pack_image_features(crops.unsqueeze(-1).split(own), batch["image_sizes"], **given)
        rows = torch.cat(list(packed[0])).flatten()
        return rows[torch.isfinite(rows)]
    return crops.flatten()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_eager_maps(name, figure, monkeypatch):
    """The class token's row, or the mean over all queries, of the layer that is handed on."""
    model = build(name)
    batch = prompts(name, model)
    assert whole_of(model) is not None
    family, inner = vlm_family_of(model), inner_of(model)
    layers = family.tower_layers(inner)
    layer = layers[min(len(layers) - 1, family.feature_layer(inner))]
    maps = eager_maps(model, batch, layer, monkeypatch)
    model = build(name)
    if family.has_class(inner):
        score = [each[:, :, 0, 1:].mean(1) for each in maps]
    else:
        score = [each.mean((1, 2)) for each in maps]
    want = at_rows(name, model, batch, score)
    SEEN.clear()
    tokenzoo.patch_model(model, Asking(keep=6))
    with torch.no_grad():
        model(**batch)
    order = sorted(SEEN, key=lambda each: (each[0], int(each[1][0])))
    figure("scores = eager maps", name, "selector", difference(torch.cat([score for _, _, score in order]), want))


class Largest(TorchDispatchMode):
    """Notes tensors that hold a value for every pair of n tokens."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found = n, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and sum(side >= self.n for side in each.shape) > 1:
                self.found.append((str(function), tuple(each.shape)))
        return out


@pytest.mark.parametrize("method", ["fastervlm", "vtc_cls", "visionzip", "hiprune", "fopru", "prumerge", "hired"])
@pytest.mark.parametrize("tower", ["CLIP", "Siglip"])
def test_no_map_of_all_tokens_is_held(method, tower):
    """In towers of 577 and 576 tokens, with fused attention."""
    size = {**TOWER, "image_size": 336, "patch_size": 14}
    strategy = "default" if tower == "CLIP" else "full"
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, f"{tower}VisionConfig")(**size), text_config=transformers.LlamaConfig(**LM),
        image_token_id=250, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokenzoo.patch_model(model, method, keep=64)
    with torch.no_grad(), Largest(576) as largest:
        model.model.get_image_features(torch.randn(1, 3, 336, 336))
    assert not largest.found
