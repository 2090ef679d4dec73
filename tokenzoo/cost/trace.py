"""Multiply-adds by tracing: a check of the formulas that knows nothing of them, and a count for any module."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inspect import block_names
from ..adapters.registry import family_of
from ..adapters.wrappers import backbone_of
from ..core.graphs import of_one_image
from ..layers.scan.backends import scan_backend


@dataclass(frozen=True)
class MacReport:
    """Traced multiply-adds of one image.

    Attributes:
        total: multiply-adds of the whole model.
        rows: (module, multiply-adds) for every block, then for everything else together.
    """

    total: int
    rows: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        lines = [f"{name:<12} {macs / 1e9:.3f} GMACs" for name, macs in self.rows]
        return "\n".join([*lines, f"{'total':<12} {self.total / 1e9:.3f} GMACs (multiply-adds, counted once)"])


def count_macs(
    model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224), image: Tensor | None = None
) -> MacReport:
    """Counts the multiply-adds of one image by tracing the model with fvcore.

    fvcore sees nothing of fused attention, of scans and of reduction; handlers for these are added here. A scan counts
    as the authors of Mamba count it: 9 operations per state, and one per channel for each of skip and gate that run
    inside of it; a gate behind the scan is one more product of values, which nothing counts. Where counts depend on the
    image, those of a random image are meant, or of one that is given.

    Args:
        model: any module; patched and unpatched models alike.
        input_size: channels, height, width.
        image: the image to run [1, C, H, W], instead of a random one of `input_size`.
    """
    from fvcore.nn import FlopCountAnalysis

    backbone = backbone_of(model)
    parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    if image is None:
        image = torch.randn(1, *input_size, generator=generator)
    image = image.to(parameter.device, parameter.dtype)
    training = backbone.training
    backbone.eval()
    quiet = logging.getLogger("fvcore.nn.jit_analysis")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), of_one_image(), _scans_in_one(backbone), _attention_in_parts():
            analysis = FlopCountAnalysis(backbone, image).set_op_handle(**_handlers())
            analysis = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            analysis = analysis.tracer_warnings("none")
            by_module, total = analysis.by_module(), int(analysis.total())
    finally:
        quiet.setLevel(level)
        backbone.train(training)
    names = {module: name for name, module in backbone.named_modules()}  # blocks may be registered as something else
    family = family_of(backbone)
    blocks = list(getattr(backbone, "blocks", ()) if family is None else family.view(backbone).served_blocks)
    shown = [names[block] for block in blocks] if family is None else block_names(model)
    rows = [(name, int(by_module[names[block]])) for name, block in zip(shown, blocks)]
    return MacReport(total, (*rows, ("elsewhere", total - sum(macs for _, macs in rows))))


@contextmanager
def _scans_in_one(backbone: nn.Module) -> Iterator[None]:
    """Context in which a scan is traced as one operator, which a handler can count, whatever form is asked for."""
    chosen = [(m, m.scan_backend) for m in backbone.modules() if getattr(m, "scan_backend", None) is not None]
    try:
        for module, _ in chosen:
            module.scan_backend = None
        with scan_backend("blocked"):
            yield
    finally:
        for module, name in chosen:
            module.scan_backend = name


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Context in which `nn.MultiheadAttention` runs as products that can be counted, not as one operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _handlers() -> dict[str, Any]:
    """fvcore handlers: fused attention, scans, batched products with addition, added rows; norms are not counted."""

    def shape(value: Any) -> list[int]:
        return value.type().sizes() or []

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        (*batch, queries, width), keys, value = shape(inputs[0]), shape(inputs[1]), shape(inputs[2])
        count = 1
        for size in batch:
            count *= size
        return count * queries * keys[-2] * (width + value[-1])

    def attention_layer(inputs: list[Any], outputs: list[Any]) -> int:  # torch's nn.MultiheadAttention in eval mode
        batch, tokens, width = shape(inputs[0])
        return batch * tokens * (4 * width * width + 2 * tokens * width)

    def product(inputs: list[Any], outputs: list[Any]) -> int:
        batch, rows, inner = shape(inputs[1])
        return batch * rows * inner * shape(inputs[2])[-1]

    def scan(inputs: list[Any], outputs: list[Any]) -> int:
        (batch, channels, length), states = shape(inputs[0]), shape(inputs[2])[1]
        inside = sum(value.type().kind() != "NoneType" for value in inputs[5:7])  # skip and gate
        return batch * length * channels * (9 * states + inside)

    def convolution(inputs: list[Any], outputs: list[Any]) -> int:
        per_output = 1
        for size in shape(inputs[1])[1:]:
            per_output *= size
        for size in shape(outputs[0]):
            per_output *= size
        return per_output

    def free(inputs: list[Any], outputs: list[Any]) -> int:
        return 0

    def added(position: int) -> Any:
        def count(inputs: list[Any], outputs: list[Any]) -> int:
            total = 1
            for size in shape(inputs[position]):
                total *= size
            return total

        return count

    return {
        "aten::scaled_dot_product_attention": attention,
        "aten::_native_multi_head_attention": attention_layer,
        "tokenzoo::selective_scan": scan,
        "aten::_convolution_mode": convolution,  # with padding by name
        "aten::baddbmm": product,
        "aten::index_add": added(3),
        "aten::index_add_": added(3),
        "aten::scatter_add": added(3),
        "aten::scatter_reduce": added(3),
        "aten::layer_norm": free,
        "aten::batch_norm": free,
    }
