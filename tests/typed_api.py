"""What users write, with every public name: `make types` holds it against the annotations; it is never run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import assert_type

import tokenzoo
from tokenzoo.core.schedule import Remove
from tokenzoo.core.signals import Signals
from tokenzoo.core.step import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import TokenMap


def calls(model: VisionTransformer, images: Tensor) -> None:
    assert_type(tokenzoo.patch_model(model, "tome", r=13), VisionTransformer)
    assert_type(tokenzoo.patch_model(model, tokenzoo.ToMe(r=1), flops=0.6), VisionTransformer)
    assert_type(tokenzoo.update_method(model, r=8), VisionTransformer)
    assert_type(tokenzoo.is_patched(model), bool)
    assert_type(tokenzoo.recipe(model), dict[str, Any])
    assert_type(tokenzoo.unpatch_model(model), VisionTransformer)
    with tokenzoo.patched(model, ["evit", tokenzoo.ToMe(r=(4, 0.5))]) as inside:
        assert_type(inside, VisionTransformer)

    assert_type(tokenzoo.save(model, "folder", "deit_small_patch16_224", num_classes=10), Path)
    assert_type(tokenzoo.load("folder"), nn.Module)
    assert_type(tokenzoo.load("folder", model), nn.Module)
    assert_type(tokenzoo.rename_released(model, {}), dict[str, Tensor])

    report = tokenzoo.report(model, img_size=(224, 192))
    assert_type(report, tokenzoo.Report)
    assert_type(report.total, int)
    assert_type(report.ratio, float)
    assert_type(report.tokens_out, int)
    counted = tokenzoo.count_macs(model)
    assert_type(counted, tokenzoo.MacReport)
    assert_type(counted.rows, tuple[tuple[str, int], ...])

    found = tokenzoo.tune(model, images, flops=0.6, labels=torch.zeros(8), methods=["tome", "evit"], budget_minutes=1.0)
    assert_type(found.recipe, dict[str, Any])
    with tokenzoo.explain(model) as explanation:
        assert_type(explanation, tokenzoo.Explanation)
        assert_type(explanation.activation(images, "blocks.3"), Tensor)


def registry(module: nn.Module) -> None:
    assert_type(tokenzoo.list_methods(), list[str])
    assert_type(tokenzoo.list_backbones(), dict[str, list[str]])
    assert_type(tokenzoo.method_class("tome"), type[tokenzoo.Method])
    assert_type(tokenzoo.create_method("tome", r=3), tokenzoo.Method)
    assert_type(tokenzoo.Recipe.parse("tome"), tokenzoo.Recipe)
    assert_type(tokenzoo.EViT(keep_rate=0.7), tokenzoo.EViT)
    assert_type(tokenzoo.__version__, str)


@tokenzoo.register
@dataclass(frozen=True, kw_only=True)
class Own(tokenzoo.Method):
    """A method of one's own."""

    r: int = 4
    name: ClassVar[str] = "own"
    kind: ClassVar[str] = "merge"
    source: ClassVar[str] = "an example"
    schedule: ClassVar[Remove] = Remove()

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n - self.r

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        assert_type(tokens.x, Tensor)
        assert_type(tokens.size, Tensor | None)
        assert_type(signals.keys, Tensor)
        assert_type(signals.class_attention, Tensor)
        return None


assert_type(Own(r=2), Own)
