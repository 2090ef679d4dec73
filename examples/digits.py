"""The demo's data and model: scikit-learn's handwritten digits, and a small ViT with 100 patch tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

CHECKPOINT = Path(__file__).with_name("digits_vit.safetensors")
IMAGE_SIZE = 40  # five times the 8 x 8 of the data: patches of 4 pixels make a grid of 10 x 10
TEST_IMAGES = 360
SPLIT_SEED = 0
ARCHITECTURE = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 8,
    "num_heads": 2,
    "mlp_ratio": 4,
}


class Digits(NamedTuple):
    """Images [N, 1, 40, 40] with ink in [0, 1], and labels [N] int64, of both parts of the split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1797 digits that scikit-learn carries, enlarged, in a fixed stratified split of 1437 and 360."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED)
    ink = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    ink = F.interpolate(ink, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    labels = torch.tensor(labels, dtype=torch.int64)
    return Digits(ink[train], labels[train], ink[test], labels[test])


def normalize(ink: Tensor) -> Tensor:
    """Ink in [0, 1] to the model's input in [-1, 1]."""
    return ink * 2 - 1


def save_checkpoint(model: VisionTransformer, about: dict[str, Any], path: Path = CHECKPOINT) -> None:
    """Writes weights in half precision, with what is known about them in the file's header."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, metadata={"about": json.dumps(about, sort_keys=True)})


def load_checkpoint(path: Path = CHECKPOINT) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model in float32 and eval mode, and what its file says about it."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    model = VisionTransformer(**about["architecture"])
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=True)
    return model.eval(), about


@torch.inference_mode()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 40, 40] (ink) whose top class is the label."""
    hits = sum((model(normalize(x)).argmax(1) == y).sum().item() for x, y in zip(images.split(120), labels.split(120)))
    return hits / len(labels)
