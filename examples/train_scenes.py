"""Trains the model of the demo's scenes: the demo's digit reader, with a linear head for every pixel.

    python examples/train_scenes.py --output runs/scenes

The encoder starts from digits_vit.safetensors; scenes are drawn from train digits only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import scenes
import torch
from digits import ARCHITECTURE, load_checkpoint
from timm.layers import resample_abs_pos_embed

from tokenzoo.dense import Segmenter, create_segmenter
from tokenzoo.evaluation.segmentation.data import open_dataset
from tokenzoo.training.segmentation.augment import Gallery, Views
from tokenzoo.training.segmentation.train import SegmentTraining, train_segmenter


def build(seed: int = 0) -> Segmenter:
    """The model before training: the digit reader's weights where they fit."""
    torch.manual_seed(seed)
    shape = {key: ARCHITECTURE[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    model = create_segmenter(
        "vit_tiny_patch16_224", len(scenes.CLASSES), "linear", {**shape, "img_size": scenes.SIDE},
        classes=scenes.CLASSES, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    reader, _ = load_checkpoint()
    weights = {k: v for k, v in reader.state_dict().items() if not k.startswith("head.")}
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].expand(-1, 3, -1, -1) / 3
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [scenes.SIDE // shape["patch_size"]] * 2)
    model.encoder.load_state_dict(weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--train", type=int, default=scenes.TRAIN, help="scenes to train on")
    args = parser.parse_args()
    options = SegmentTraining(
        epochs=args.epochs, batch_size=10, lr=4e-4, warmup_epochs=1, ema=0.98, eval_every=4, threads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        parts = {}
        for seed, (part, count) in enumerate((("train", args.train), ("test", scenes.TEST))):
            root = scenes.write_scenes(Path(folder) / part, part, count, seed)
            parts[part] = Gallery(open_dataset(root, classes=scenes.CLASSES))
        views = Views(crop=(scenes.SIDE, scenes.SIDE), scale=(0.85, 1.2), flip=0.0, jitter=0.2)
        train_segmenter(build(), parts["train"], parts["test"], views, options, args.output, progress=print)
    shutil.copyfile(args.output / "model.safetensors", scenes.CHECKPOINT)


if __name__ == "__main__":
    main()
