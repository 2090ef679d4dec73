"""Export to a torch.export program or to ONNX; the file is kept only if it answers as the model does."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..adapters.wrappers import backbone_of

SUFFIXES = (".pt2", ".onnx")
_ONNX_LIMIT = 2**31  # bytes that one ONNX file can hold
_MOST_IMAGES = 2**31 - 1  # of a batch; torch 2.6 refuses axes without an end
Shapes = tuple[dict[int, Any]] | None  # which axes are open


class Exported(NamedTuple):
    """What was written and how far it is from the model.

    Attributes:
        path: the file.
        difference: largest absolute difference to eager of any output, over the batches checked.
        batch_sizes: batch sizes at which the file was checked.
        num_bytes: size of the file.
    """

    path: Path
    difference: float
    batch_sizes: tuple[int, ...]
    num_bytes: int


def export(
    model: nn.Module, path: str | Path, example_input: Tensor, dynamic_batch: bool = True, atol: float = 1e-4
) -> Exported:
    """Exports a model, patched or not, and keeps the file only if its outputs equal those of the model.

    The file is written next to its final place under another name, read back, run on two batches, and then moved; a
    file that was there before stays until then.

    Args:
        model: in eval mode, with one tensor as output.
        path: ends in .pt2 (`torch.export` program) or .onnx (one file, opset of the installed torch).
        example_input: images [B, C, H, W]; height and width are fixed by it.
        dynamic_batch: leave the batch size open; else it is B.
        atol: largest difference allowed.

    Returns:
        What was written, and the largest difference found.

    Raises:
        ValueError: another suffix, a folder that does not exist, a model in training mode, token counts that depend on
            the images (of a patched model anywhere inside of `model`), bfloat16 in ONNX, a model too large for one ONNX
            file, or outputs that differ.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    path = Path(path)
    check_target(path)
    _check_model(model, path, example_input)
    # a batch of one would be taken for a constant
    traced = example_input if len(example_input) > 1 or not dynamic_batch else torch.cat([example_input] * 2)
    shapes = ({0: torch.export.Dim("batch", max=_MOST_IMAGES)},) if dynamic_batch else None
    batches = [example_input, _noise(example_input, 1 if len(example_input) > 1 else 3)]
    if not dynamic_batch:
        batches[1] = _noise(example_input, len(example_input))
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    save = _save_program if path.suffix == ".pt2" else _save_onnx
    with torch.no_grad():
        expected = [model(images) for images in batches]
    if not isinstance(expected[0], Tensor):
        raise ValueError(
            f"{type(model).__name__} returns {type(expected[0]).__name__}; export takes models that return one tensor: "
            "put a module around it that hands on what you need of that, its logits say"
        )
    try:
        with torch.no_grad():
            program = torch.export.export(model, (traced,), dynamic_shapes=shapes, strict=False)
            run = save(program, traced, shapes, temporary)
            differences = [_difference(run(images), wanted) for images, wanted in zip(batches, expected)]
        largest = max(differences, key=lambda d: (d != d, d))  # NaN is the worst
        if not largest <= atol:
            raise ValueError(
                f"{path.name} was not kept: its outputs differ from the model's by up to {largest:.3g}, more than "
                f"atol={atol:g}; a choice between nearly equal scores may have fallen otherwise: try another example"
            )
        num_bytes = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, largest, tuple(len(images) for images in batches), num_bytes)


def check_target(path: Path) -> None:
    """Refuses a file that cannot be written, before the minutes that an export takes.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
        ImportError: ONNX is asked for and a package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} does not end in {' or '.join(SUFFIXES)}; the suffix decides the format")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ImportError(f"export to ONNX needs {', '.join(missing)}; pip install tokenzoo[onnx]")


def _check_model(model: nn.Module, path: Path, example_input: Tensor) -> None:
    if example_input.dim() != 4 or len(example_input) == 0:
        raise ValueError(f"example_input has shape {tuple(example_input.shape)}; give images [B, C, H, W]")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() before exporting it")
    backbone_of(model)  # wrappers that have to be put on after patching are refused
    recipes = [module.tokenzoo_recipe for module in model.modules() if hasattr(module, "tokenzoo_recipe")]
    for method in (method for recipe in recipes for method in recipe.methods):
        if method.data_dependent:
            raise ValueError(
                f"{method.name} keeps as many tokens as the images ask for, which has no static shape to export; set "
                f"a fixed budget, such as {method.static_option}"
            )
    kept = (example_input, *model.parameters(), *model.buffers())
    if path.suffix == ".onnx" and any(t.dtype == torch.bfloat16 for t in kept):
        raise ValueError(
            f"{type(model).__name__} or its images are bfloat16, which ONNX Runtime cannot run; call model.float() or "
            "model.half() and give images of that type, or export to .pt2"
        )
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if path.suffix == ".onnx" and size >= _ONNX_LIMIT:
        raise ValueError(
            f"{type(model).__name__} holds {size / 2**30:.1f} GiB of weights, more than the 2 GiB of an ONNX file; "
            "export to .pt2"
        )


def _noise(like: Tensor, batch: int) -> Tensor:
    """Seeded normal images [batch, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *like.shape[1:], generator=generator).to(like.device, like.dtype)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite for other shapes, NaN where only one side is NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.to(actual.device)
    same = actual.isnan() & expected.isnan()
    return (actual.double() - expected.double()).abs().masked_fill(same, 0.0).max().item()


def _save_program(program: ExportedProgram, example: Tensor, shapes: Shapes, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a torch.export program and reads it back: a function from images to outputs."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _save_onnx(program: ExportedProgram, example: Tensor, shapes: Shapes, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes an ONNX file and opens it in ONNX Runtime: a function from images to outputs."""
    import onnxruntime

    torch.onnx.export(
        program, (example,), str(path), dynamo=True, external_data=False, verbose=False, dynamic_shapes=shapes,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
