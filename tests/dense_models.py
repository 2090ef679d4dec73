"""Small dense models and an independent count of multiply-adds, for the tests of tokenzoo.dense."""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenzoo.dense import DToP, DToPHead

TINY = partial(
    VisionTransformer, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0,
    dynamic_img_size=True,
)  # fmt: skip


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights off their start, so that a mistake in any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * 0.2
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else value + noise)
    return model.eval()


def dtop(threshold=0.3, context: int = 2) -> DToP:
    heads = [DToPHead(32, 4, 16, 2, depth=2) for _ in range(2)]
    return shaken(DToP(TINY(), heads, (0, 2), threshold, context))


def traced(module: nn.Module, *args: torch.Tensor) -> dict[str, float]:
    """fvcore's count by operator, with fused attention."""
    from fvcore.nn import FlopCountAnalysis

    from tokenzoo.cost.trace import _handlers

    analysis = FlopCountAnalysis(module, args).set_op_handle(**_handlers()).unsupported_ops_warnings(False)
    return dict(analysis.uncalled_modules_warnings(False).tracer_warnings("none").by_operator())
