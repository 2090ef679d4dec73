"""Trains the demo's checkpoint on the CPU: python examples/train_digits.py"""

from __future__ import annotations

import argparse
import math
import random
import time
from contextlib import nullcontext
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenzoo

# Two stages. First half of the patches are left out at random, which halves the time of a step. Then the model is tuned
# as methods like EViT are meant to be used: every second step keeps the patches that the class token attends to, so
# that this attention learns to say what can go; the steps between see all patches.
RECIPE = {
    "seed": 0,
    "epochs": 60,
    "tuned_epochs": 16,
    "keep_rates": [0.3, 0.9],
    "patch_drop_rate": 0.5,
    "batch_size": 64,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "warmup_share": 0.1,
    "label_smoothing": 0.1,
    "rotation_degrees": 12,
    "scale": 0.12,
    "shear": 0.12,
    "shift_pixels": 4,
}


def augment(ink: Tensor) -> Tensor:
    """A random rotation, scale, shear and shift for each image [B, 1, S, S]."""
    batch, side = len(ink), ink.shape[-1]

    def draw(width: float) -> Tensor:
        return (torch.rand(batch) * 2 - 1) * width

    angle, scale = draw(math.radians(RECIPE["rotation_degrees"])), 1 + draw(RECIPE["scale"])
    shear, shift = draw(RECIPE["shear"]), 2 * RECIPE["shift_pixels"] / side
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, draw(shift)], 1), torch.stack([sin, cos, draw(shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def train(data: digits.Digits) -> VisionTransformer:
    """The trained model; prints a line every ten epochs."""
    random.seed(RECIPE["seed"])
    torch.manual_seed(RECIPE["seed"])
    model = VisionTransformer(**digits.ARCHITECTURE, patch_drop_rate=RECIPE["patch_drop_rate"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    batches = len(data.train_labels) // RECIPE["batch_size"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], total_steps=batches * RECIPE["epochs"], pct_start=RECIPE["warmup_share"]
    )
    start = time.perf_counter()
    for epoch in range(RECIPE["epochs"]):
        model.train()
        tuned = epoch >= RECIPE["epochs"] - RECIPE["tuned_epochs"]
        if tuned:
            model.patch_drop = torch.nn.Identity()
        order = torch.randperm(len(data.train_labels))
        total = 0.0
        for step, index in enumerate(order[: batches * RECIPE["batch_size"]].split(RECIPE["batch_size"])):
            keep = random.uniform(*RECIPE["keep_rates"])
            reduced = tokenzoo.patched(model, "topk", keep_rate=keep) if tuned and step % 2 else nullcontext()
            with reduced:
                logits = model(digits.normalize(augment(data.train_images[index])))
                loss = F.cross_entropy(logits, data.train_labels[index], label_smoothing=RECIPE["label_smoothing"])
                optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}  loss {total / batches:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=digits.CHECKPOINT)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = digits.load_digits()
    model = train(data)
    about = {
        "architecture": digits.ARCHITECTURE,
        "data": "sklearn.datasets.load_digits, enlarged to 40 x 40 by bicubic interpolation",
        "split": {"test_images": digits.TEST_IMAGES, "stratified": True, "seed": digits.SPLIT_SEED},
        "recipe": RECIPE,
    }
    # the accuracy on record is that of the half-precision weights, read back
    digits.save_checkpoint(model, about, args.output)
    saved, _ = digits.load_checkpoint(args.output)
    about["test_accuracy"] = digits.accuracy(saved, data.test_images, data.test_labels)
    about["train_accuracy"] = digits.accuracy(saved, data.train_images, data.train_labels)
    digits.save_checkpoint(saved, about, args.output)
    size = args.output.stat().st_size
    print(f"test accuracy {about['test_accuracy']:.4f} on {digits.TEST_IMAGES} images, {size} bytes: {args.output}")


if __name__ == "__main__":
    main()
