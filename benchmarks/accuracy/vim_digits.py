"""A very small Vision Mamba on handwritten digits: training, and what pruning without training costs it.

    python benchmarks/accuracy/vim_digits.py train --output out/vim_digits.safetensors
    python benchmarks/accuracy/vim_digits.py table --checkpoint out/vim_digits.safetensors \
        --output benchmarks/accuracy/vim_digits

The digits are the 1797 that scikit-learn carries (8 x 8), enlarged to 40 x 40: 100 patches and a class token in their
middle. Accuracies are on 360 images that training did not see; differences are paired, image by image. Writes
OUTPUT.csv and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenzoo
from tokenzoo.evaluation import environment, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.models import VisionMamba
from tokenzoo.view.maps import plot_curves

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digits  # noqa: E402

ARCHITECTURE = {"img_size": 40, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 12,
                "d_state": 8}  # fmt: skip
RECIPE = {"seed": 0, "epochs": 40, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.05, "warmup_share": 0.1,
          "label_smoothing": 0.1, "clip_grad": 1.0}  # fmt: skip
RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
# after the 3rd and the 8th of 12 blocks, in proportion to the 5th and 15th of 24
STAGES = (2, 7)
METHODS: dict[str, dict[str, Any]] = {
    "ssm_prune carry": {"method": "ssm_prune"},
    "ssm_prune carry, not re-centred": {"method": "ssm_prune", "recentre": False},
    "ssm_prune decay, hold": {"method": "ssm_prune", "alignment": "decay"},
    "ssm_prune decay, bias": {"method": "ssm_prune", "alignment": "decay", "rule": "bias"},
    "ssm_prune, score order": {"method": "ssm_prune", "alignment": "none"},
    "ssm_prune carry, released score": {"method": "ssm_prune", "score": "released"},
    "mtr": {"method": "mtr"},
    "random": {"method": "random"},
    "uniform": {"method": "uniform"},
}
# methods with a count per block; they run in their own blocks at the multiply-adds that ssm_prune has at each rate
BY_COST = ("rmeeto", "famba", "tome", "pool")
COLUMNS = ("setting", "keep_rate", "top1", "top1_se", "diff", "diff_se", "tokens_out", "gmacs", "gmacs_one_direction",
           "share")  # fmt: skip


def train(output: Path) -> None:
    """Trains, saves half-precision weights, and prints the accuracy of what was saved."""
    random.seed(RECIPE["seed"])
    torch.manual_seed(RECIPE["seed"])
    data, model = digits.load_digits(), VisionMamba(**ARCHITECTURE)
    kept_out = model.no_weight_decay()
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and name not in kept_out]
    others = [p for name, p in named if p.ndim <= 1 or name in kept_out]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    batches = len(data.train_labels) // RECIPE["batch_size"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], total_steps=batches * RECIPE["epochs"], pct_start=RECIPE["warmup_share"]
    )
    start = time.perf_counter()
    for epoch in range(RECIPE["epochs"]):
        model.train()
        order, total = torch.randperm(len(data.train_labels)), 0.0
        for index in order[: batches * RECIPE["batch_size"]].split(RECIPE["batch_size"]):
            logits = model(digits.normalize(digits.augment(data.train_images[index])))
            loss = F.cross_entropy(logits, data.train_labels[index], label_smoothing=RECIPE["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_grad"])
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}  loss {total / batches:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, output, metadata={"about": json.dumps({"architecture": ARCHITECTURE, "recipe": RECIPE})})
    hits = correct(load(output), data)
    print(f"test accuracy {hits.float().mean():.4f} on {len(hits)} images, {output.stat().st_size} bytes: {output}")


def load(path: Path) -> VisionMamba:
    """The model of a checkpoint, in float32 and eval mode."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    model = VisionMamba(**about["architecture"])
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


@torch.inference_mode()
def correct(model: torch.nn.Module, data: digits.Digits) -> Tensor:
    """Whether each test image is classified right [N]."""
    parts = zip(data.test_images.split(120), data.test_labels.split(120))
    return torch.cat([model(digits.normalize(x)).argmax(1) == y for x, y in parts])


def evaluate(checkpoint: Path, output: Path) -> None:
    """Writes the table and the curves."""
    data, model = digits.load_digits(), load(checkpoint)
    base = correct(model, data)
    rows = [_row("unpatched", 1.0, base, base, tokenzoo.report(model))]
    for name, options in METHODS.items():
        for rate in RATES:
            with tokenzoo.patched(model, {**options, "layers": list(STAGES), "keep_rate": rate}):
                rows.append(_row(name, rate, correct(model, data), base, tokenzoo.report(model)))
    shares = {row["keep_rate"]: row["share"] for row in rows if row["setting"] == "ssm_prune carry"}
    for name in BY_COST:
        for rate, share in shares.items():
            try:
                with tokenzoo.patched(model, name, flops=share):
                    rows.append(_row(name, rate, correct(model, data), base, tokenzoo.report(model)))
            except ValueError as error:
                print(f"left out: {name} at {share}: {error}", flush=True)
    print(table([[str(row[column]) for column in COLUMNS] for row in rows], COLUMNS))
    write_results(output.with_suffix(".csv"), rows, COLUMNS, environment("cpu", None))
    plot_curves(
        [{**row, "method": row["setting"]} for row in rows], output.with_suffix(".png"), x="gmacs", y="top1",
        error="diff_se", xlabel="GMACs, both directions", ylabel="top-1 of 360 digits, %",
        title="Small Vim pruned without training (bars: error of difference)",
    )  # fmt: skip


def _row(name: str, rate: float, hits: Tensor, base: Tensor, report: tokenzoo.Report) -> dict[str, Any]:
    hits, base = hits.double() * 100, base.double() * 100
    root = math.sqrt(len(hits))
    return {
        "setting": name, "keep_rate": rate, "top1": round(hits.mean().item(), 2),
        "top1_se": round(hits.std().item() / root, 2), "diff": round((hits - base).mean().item(), 2),
        "diff_se": round((hits - base).std().item() / root, 2), "tokens_out": report.tokens_out,
        "gmacs": round(report.total / 1e9, 5), "gmacs_one_direction": round(report.one_direction[0] / 1e9, 5),
        "share": round(report.ratio, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("--checkpoint", type=Path, default=Path("out/vim_digits.safetensors"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "train":
        train(args.output)
    else:
        evaluate(args.checkpoint, args.output)


if __name__ == "__main__":
    main()
