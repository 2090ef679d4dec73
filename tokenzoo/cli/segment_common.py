"""Arguments that the actions of `tokenzoo segment` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluation.segmentation.evaluate import default_inference
from ..evaluation.segmentation.inference import MODES, Inference


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --device, --threads, --seed."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        "-c",
        required=True,
        help="file.safetensors written by `tokenzoo segment train`, or a folder of the official Segmenter "
        "(checkpoint.pth and variant.yml)",
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--threads", type=int, default=None, help="CPU threads")
    group.add_argument("--seed", type=int, default=0)


def load_checkpoint(args: argparse.Namespace) -> nn.Module:
    """The model of --checkpoint, in eval mode on its device.

    Raises:
        ValueError: nothing there, or no segmentation model.
    """
    from .. import dense

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    path = Path(args.checkpoint)
    if not path.exists():
        raise ValueError(
            f"--checkpoint {path} does not exist; give a .safetensors file or an official Segmenter folder"
        )
    load = dense.load_segmenter if path.suffix == ".safetensors" else dense.load_official_segmenter
    return load(path).to(args.device).eval()


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """--inference, --window, --stride, --resize, --scales, --flip, --batch-size."""
    group = parser.add_argument_group("inference")
    group.add_argument(
        "--inference",
        choices=MODES,
        default=None,
        help="whole images; windows in Segmenter's or mmsegmentation's form; or EoMT's even windows; by default as "
        "the checkpoint says",
    )
    group.add_argument("--window", type=int, default=None, help="side of the windows, pixels")
    group.add_argument("--stride", type=int, default=None, help="pixels between windows")
    group.add_argument(
        "--resize",
        type=int,
        nargs="+",
        default=None,
        metavar="PIXELS",
        help="limits of the long and the short side, met by keep-ratio resizing; 0 for none; by default as usual "
        "for the data set",
    )
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], help="factors on the size, averaged over")
    group.add_argument("--flip", action="store_true", help="average over mirrored images too")
    group.add_argument("--batch-size", "-b", type=int, default=8, help="windows at a time; halved when memory runs out")


def inference_of(args: argparse.Namespace, model: nn.Module, kind: str = "folder") -> Inference:
    """What the arguments say, filled up with what the model and the data set are used with.

    Args:
        args: parsed.
        model: a segmentation model.
        kind: of the data set.

    Raises:
        ValueError: settings that do not go together.
    """
    usual = default_inference(model, kind, args.batch_size)
    mode = args.inference or ("segmenter" if args.window and usual.mode == "whole" else usual.mode)
    given: dict[str, Any] = {
        "mode": mode,
        "scales": tuple(args.scales),
        "flip": args.flip,
        "batch_size": args.batch_size,
    }
    if mode == "whole" and (args.window or args.stride):
        raise ValueError("--inference whole takes no --window and --stride")
    if mode != "whole":
        given["window"] = args.window or usual.window
        if given["window"] is None:
            raise ValueError(f"--inference {mode} needs --window: the checkpoint does not name one")
    if mode in ("segmenter", "mmseg"):
        given["stride"] = args.stride or (usual.stride if given["window"] == usual.window else None) or given["window"]
    if args.resize is None:
        given["limits"] = None if mode == "even" else usual.limits
    elif args.resize != [0]:
        if len(args.resize) != 2 or min(args.resize) < 1:
            raise ValueError(f"--resize {args.resize}: give the limits of the long and the short side, or 0 for none")
        given["limits"] = tuple(args.resize)
    return Inference(**given)
