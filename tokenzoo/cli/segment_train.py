"""`tokenzoo segment train`: trains a head, or a whole segmentation model, on a folder of images and masks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from ..apply.patch import patch_model
from ..core.safe_files import parse_yaml
from ..dense import HEADS, create_segmenter, load_segmenter
from ..dense.checkpoints import load_state
from ..evaluation.segmentation.data import open_dataset
from ..training.segmentation.augment import Gallery, Views
from ..training.segmentation.train import SegmentTraining, train_segmenter
from .common import key_values, say

HELP = "train a segmentation head, or the whole model, on images/ and masks/"
EXAMPLE = (
    "tokenzoo segment train --data train/ --val val/ --encoder vit_tiny_patch16_224 --head linear --epochs 50 "
    "--output runs/linear"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, and the options of `SegmentTraining`."""
    model = parser.add_argument_group("model")
    model.add_argument("--encoder", "-m", default="vit_tiny_patch16_224", help="timm name of a plain ViT")
    model.add_argument("--encoder-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="passed to timm")
    model.add_argument("--pretrained", action="store_true", help="timm's weights (needs network or a warm cache)")
    model.add_argument("--head", choices=sorted(HEADS), default="linear")
    model.add_argument("--head-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="passed to the head")
    model.add_argument("--init", default=None, help="segmentation checkpoint whose encoder to start from")
    model.add_argument("--freeze-encoder", action="store_true", help="train the head only")
    model.add_argument("--method", nargs="+", default=None, metavar=("NAME", "KEY=VALUE"), help="train patched")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="folder with images/ and masks/")
    data.add_argument("--val", default=None, help="folder to evaluate on")
    data.add_argument("--ignore", type=int, nargs="*", default=[], help="mask values that do not count, besides 255")
    data.add_argument("--classes", default=None, help="class names: text file, one per line, or a JSON list")
    data.add_argument("--num-classes", type=int, default=None, help="without names")
    data.add_argument("--crop", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"), help="of a view")
    data.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0), help="range of random factors")
    data.add_argument("--jitter", type=float, default=0.3)
    data.add_argument("--mean", type=float, nargs=3, default=None)
    data.add_argument("--std", type=float, nargs=3, default=None)
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=int, default=100)
    run.add_argument("--batch-size", "-b", type=int, default=8)
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--opt", default="adamw")
    run.add_argument("--weight-decay", type=float, default=0.05)
    run.add_argument("--sched", default="cosine")
    run.add_argument("--warmup-epochs", type=int, default=5)
    run.add_argument("--min-lr", type=float, default=1e-5)
    run.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of all gradients, 0 for no limit")
    run.add_argument("--class-weights", choices=("none", "sqrt-inverse"), default="none")
    run.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, 0 for none")
    run.add_argument("--amp", action="store_true", help="autocast in bfloat16")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--eval-every", type=int, default=10, help="epochs")
    run.add_argument("--threads", type=int, default=None)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--output", required=True, help="folder for args.yaml, summary.csv, last.pt, model.safetensors")
    run.add_argument("--resume", action="store_true", help="go on from last.pt in the output folder")


def run(args: argparse.Namespace) -> None:
    """Builds model and data, and trains."""
    given = {name: getattr(args, name) for name in SegmentTraining.__dataclass_fields__}
    options = SegmentTraining(**given | {"clip_grad": args.clip_grad or None})
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    kept = {key: value for key, value in vars(args).items() if key not in ("run", "command", "action", "imports")}
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
    if args.resume and (output / "last.pt").exists():
        _check_same(kept, output / "args.yaml")
    if not args.resume and (output / "last.pt").exists():
        raise ValueError(f"{output} holds a run already; add --resume to go on, or give another --output")
    data = {"ignore": args.ignore, "classes": args.classes, "num_classes": args.num_classes}
    train = open_dataset(args.data, **data)
    val = None if args.val is None else Gallery(open_dataset(args.val, **data))
    if train.num_classes is None:
        raise ValueError("the number of classes is unknown; give --classes or --num-classes")
    torch.manual_seed(args.seed)
    model = create_segmenter(
        args.encoder,
        train.num_classes,
        args.head,
        key_values(args.encoder_kwargs, "--encoder-kwargs"),
        key_values(args.head_kwargs, "--head-kwargs"),
        train.classes,
        args.mean,
        args.std,
        pretrained=args.pretrained,
    )
    if args.init is not None:
        load_state(model.encoder, load_segmenter(args.init).encoder.state_dict(), args.init)
    if args.method is not None:
        patch_model(model, args.method[0], **key_values(args.method[1:], "--method"))
    gallery = Gallery(train)
    crop = tuple(args.crop) if args.crop else model.encoder.patch_embed.img_size
    views = Views(crop=tuple(crop), scale=tuple(args.scale), jitter=args.jitter)
    output.mkdir(parents=True, exist_ok=True)
    (output / "args.yaml").write_text(yaml.safe_dump(kept))
    rows = train_segmenter(
        model.to(args.device), gallery, val, views, options, output, args.resume, progress=_show(args.epochs)
    )
    say(f"wrote {output / 'model.safetensors'} after {len(rows)} epochs")


def _check_same(kept: dict, path: Path) -> None:
    """Refuses to go on with a run under arguments that change the weights."""
    before = parse_yaml(path.read_bytes(), str(path)) if path.is_file() else {}
    free = ("resume", "output", "device", "threads", "eval_every", "data", "val")  # folders may have moved
    changed = sorted(key for key in kept if key not in free and key in before and before[key] != kept[key])
    if changed:
        words = ", ".join("--" + key.replace("_", "-") for key in changed)
        raise ValueError(f"{path.parent} was started with other options ({words}); give the ones in {path}")


def _show(epochs: int):
    def show(row: dict) -> None:
        val = f"  val mIoU {row['val_miou']:.4f}  aAcc {row['val_aacc']:.4f}" if row["val_miou"] != "" else ""
        say(f"epoch {row['epoch'] + 1}/{epochs}  loss {row['train_loss']:.4f}{val}  {row['seconds']} s")

    return show
