"""`tokenzoo export`: a torch.export program or an ONNX file, checked against the model before it is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..apply.export import check_target, export
from ..evaluation.runs import image_size
from .common import add_method_arguments, add_model_arguments, load_model, runs_of, say

HELP = "writes a torch.export program or an ONNX file and checks it against the model"
EXAMPLE = "tokenzoo export --model deit_tiny_patch16_224 --method tome r=8 --output tome.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--output, --batch-size, --static-batch and --atol; the device is the CPU unless named."""
    add_model_arguments(parser)
    add_method_arguments(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--output", "-o", required=True, help="file.pt2 (torch.export) or file.onnx")
    parser.add_argument("--batch-size", "-b", type=int, default=2, help="images of the example")
    parser.add_argument("--static-batch", action="store_true", help="fix the batch size instead of leaving it open")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest difference to the model that is accepted")


def run(args: argparse.Namespace) -> None:
    """Exports and says what was checked."""
    runs = runs_of(args)
    if len(runs) > 2:
        raise ValueError(f"export takes one method, {len(runs) - 1} were given; give one --method or a recipe.yaml")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} is not positive")
    check_target(Path(args.output))
    model = load_model(args)
    size = image_size(model, args.img_size)
    model = runs[-1].put_on(model)
    generator = torch.Generator().manual_seed(args.seed)
    example = torch.randn(args.batch_size, *size, generator=generator).to(args.device)
    done = export(model, args.output, example, dynamic_batch=not args.static_batch, atol=args.atol)
    batch = f"batch {args.batch_size}" if args.static_batch else "any batch size"
    say(f"{done.path}: {args.model}, {runs[-1].label}, {batch}, {done.num_bytes / 1e6:.1f} MB")
    say(
        f"largest difference to the model: {done.difference:.2e} (accepted {args.atol:g}) at batch sizes "
        f"{' and '.join(map(str, done.batch_sizes))}"
    )
