"""Trains the demo's model on the CPU: python examples/train_photos.py

One encoder learns two things at once: which photograph a crop comes from, by its class token, and which photograph
every place of a mosaic comes from, by its patches. No pixel of a test tile is looked at.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import photos
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

RECIPE = {
    "seed": 0,
    "steps": 500,
    "crops": 16,
    "mosaics": 8,
    "lr": 3e-3,
    "weight_decay": 0.05,
    "warmup_share": 0.1,
    "label_smoothing": 0.1,
    "brightness": 0.3,
    "average_decay": 0.99,
}


class Steps(Dataset):
    """What every step sees, drawn from its number alone."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((RECIPE["seed"], step))
        labels = rng.integers(0, len(photos.PHOTOS), RECIPE["crops"])
        crops = np.stack([_changed(photos.draw_crop(int(label), "train", rng), rng) for label in labels])
        mosaics, masks = zip(*(photos.draw_mosaic("train", rng) for _ in range(RECIPE["mosaics"])))
        turned = [rng.integers(2) for _ in mosaics]
        mosaics = [m[:, ::-1] if t else m for m, t in zip(mosaics, turned)]
        masks = [m[:, ::-1] if t else m for m, t in zip(masks, turned)]
        arrays = (crops, labels, np.stack(mosaics), np.stack(masks))
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _changed(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop turned by quarters or mirrored at times, and brighter or darker."""
    crop = crop[:, ::-1] if rng.integers(2) else crop
    scale = 1 + rng.uniform(-1, 1) * RECIPE["brightness"]
    return np.clip(crop.astype(np.float32) * scale, 0, 255).astype(np.uint8)


class Both(nn.Module):
    """The encoder with both of its heads, under the names of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        model = photos.new_segmenter()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.head = nn.Linear(photos.ARCHITECTURE["embed_dim"], len(photos.PHOTOS))
        self._model = [model]  # shares the modules above; a list hides it from the names

    def losses(self, crops: Tensor, labels: Tensor, mosaics: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Of the crops, and of the pixels of the mosaics."""
        answers = self.head(self.encoder.forward_features(photos.normalize(crops))[:, 0])
        whole = F.cross_entropy(answers, labels, label_smoothing=RECIPE["label_smoothing"])
        return whole, photos.mosaic_loss(self._model[0], mosaics, masks)


def train(steps: int, workers: int = 0, say: int = 100) -> dict[str, Tensor]:
    """The averaged weights after so many steps."""
    torch.manual_seed(RECIPE["seed"])
    model = Both().train()
    parameters = dict(model.named_parameters())
    plain = [p for p in parameters.values() if p.ndim < 2]
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": RECIPE["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"])
    warmup = max(1, round(RECIPE["warmup_share"] * steps))

    def scale(k: int) -> float:
        """Of the learning rate: up, then half a cosine down."""
        return (k + 1) / warmup if k < warmup else (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    start = time.perf_counter()
    for step, batch in enumerate(DataLoader(Steps(steps), batch_size=None, num_workers=workers)):
        whole, places = model.losses(*batch)
        optimizer.zero_grad(set_to_none=True)
        (whole + places).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(RECIPE["average_decay"], (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if (step + 1) % say == 0:
            took = time.perf_counter() - start
            print(f"step {step + 1}: crops {whole:.3f}, mosaics {places:.3f}, {took:.0f} s", flush=True)
    return copy.deepcopy(average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=photos.CHECKPOINT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw crops")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    weights = train(RECIPE["steps"], args.workers)
    about = {"architecture": photos.ARCHITECTURE, "classes": photos.CLASSES, "recipe": RECIPE}
    photos.save_checkpoint(weights, about, args.output)
    model = photos.load_classifier(path=args.output)
    for part in ("train", "test"):
        about[f"{part}_accuracy"] = photos.accuracy(model, photos.draw_crops(600, part, seed=1))
    photos.save_checkpoint(weights, about, args.output)
    took = (time.perf_counter() - start) / 60
    print(f"{args.output}: {args.output.stat().st_size} bytes, {took:.1f} minutes, test {about['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
