"""Segmentation heads on the frozen features of a backbone, which are computed once: a minute or two per head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from dense_runs import Card, read_image  # beside this script
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenzoo.dense import HEADS, encode

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian",
           "bicyclist")  # fmt: skip
UNLABELLED, IGNORE = 11, 255
STRIDE = 4  # labels that the loss reads: every fourth pixel, down and across
OPTIONS: dict[str, dict[str, Any]] = {"linear": {}, "mask": {"depth": 2, "decoder_dim": 192}}
EPOCHS = {"linear": 30, "mask": 12}


class Frame(NamedTuple):
    """An image file and its labels [H, W] uint8, 255 for pixels that do not count."""

    name: str
    image: Path
    mask: np.ndarray


def read_frames(folder: Path) -> list[Frame]:
    """All frames of a folder with images/ and masks/, by name."""
    frames = []
    for path in sorted((folder / "images").glob("*.jpg")):
        mask = np.array(Image.open(folder / "masks" / f"{path.stem}.png"))
        frames.append(Frame(path.stem, path, np.where(mask == UNLABELLED, IGNORE, mask).astype(np.uint8)))
    return frames


def frozen_features(model: nn.Module, frames: list[Frame], card: Card, cache: Path) -> Tensor:
    """Features of all patches [n, P, C] after the final norm, float16; read from `cache` where that exists."""
    if cache.is_file():
        return load_file(cache)["features"]
    size = model.patch_embed.img_size
    with torch.inference_mode():
        found = [encode(model, read_image(frame.image, size, card)).features().half() for frame in frames]
    features = torch.cat(found)
    save_file({"features": features}, cache)
    return features


def build_head(kind: str, dim: int, seed: int = 0) -> nn.Module:
    """A fresh head of the library, drawn from the seed."""
    torch.manual_seed(seed)
    return HEADS[kind](dim, len(CLASSES), **OPTIONS[kind])


def train_head(
    head: nn.Module, features: Tensor, labels: Tensor, grid: tuple[int, int], epochs: int, lr: float = 1e-3,
    batch_size: int = 16, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Trains a head by cross-entropy at the size of the labels; returns the mean loss of every epoch.

    Args:
        head: tokens [B, P, C] to class scores [B, P, K].
        features: [n, P, C], any floating type.
        labels: [n, h, w] uint8, 255 for pixels that do not count.
        grid: patches (high, wide).
        epochs: passes over the features.
        lr: peak of a cosine with one warm-up epoch.
        batch_size: images per step; what is left over is not used in that epoch.
        seed: of the order.
    """
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    steps = len(features) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, pct_start=min(0.5, 1 / epochs))
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        seen = []
        for members in torch.randperm(len(features), generator=order)[: steps * batch_size].split(batch_size):
            scores = head(features[members].float()).transpose(1, 2).unflatten(2, grid)
            scores = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(scores, labels[members].long(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen.append(loss.item())
        losses.append(float(np.mean(seen)))
    head.eval().requires_grad_(False)
    return losses


def trained_heads(
    model: nn.Module, kinds: list[str], train: list[Frame], card: Card, folder: Path, start: Path | None = None
) -> dict[str, nn.Module]:
    """Heads from `folder`, trained and stored there first where they are missing.

    Args:
        model: the frozen backbone.
        kinds: of `OPTIONS`.
        train: frames to learn from.
        card: of the backbone.
        folder: for features and heads.
        start: folder of heads to start from, for a third of the epochs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid, heads = model.patch_embed.grid_size, {}
    for kind in kinds:
        path, head = folder / f"{kind}.safetensors", build_head(kind, model.embed_dim)
        if not path.is_file():
            features = frozen_features(model, train, card, folder / "features.safetensors")
            labels = torch.from_numpy(np.stack([frame.mask for frame in train]))[:, STRIDE // 2 :: STRIDE]
            epochs = EPOCHS[kind]
            if start is not None:
                head.load_state_dict(load_file(start / f"{kind}.safetensors"))
                epochs = max(1, epochs // 3)
            losses = train_head(head, features, labels[:, :, STRIDE // 2 :: STRIDE], grid, epochs)
            print(f"{kind} head: loss {losses[0]:.3f} in the first, {losses[-1]:.3f} in epoch {epochs}", flush=True)
            save_file(head.state_dict(), path)
        head.load_state_dict(load_file(path))
        heads[kind] = head.eval().requires_grad_(False)
    return heads
