"""The demo's second half: mosaics of photographs segmented by every method at two costs, without retraining."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import photos
import torch
from PIL import Image

import tokenzoo
from tokenzoo.dense import Segmenter
from tokenzoo.evaluation import Run, environment, write_results
from tokenzoo.evaluation.segmentation.data import SegmentationDataset, open_dataset
from tokenzoo.evaluation.segmentation.evaluate import evaluate_segmentation
from tokenzoo.evaluation.segmentation.inference import Predictor
from tokenzoo.evaluation.segmentation.overlay import class_colours, overlay, side_by_side, with_legend
from tokenzoo.view.curves import plot_curves

SHARES = (0.75, 0.55)  # of the encoder's multiply-adds
TEST = 40
DRAWN = ("cluster", "tome", "topk")
COLUMNS = ("method", "flops", "miou", "miou_se", "diff_miou", "diff_miou_se", "pixel_acc", "tokens_out", "gmacs",
           "img_per_sec", "speedup", "n_images", "crop")  # fmt: skip
HEADER = f"{'method':<14} {'asked':>6} {'GMACs':>7} {'tokens':>7} {'mIoU':>7} {'difference':>14} {'img/s':>7}"


def solvable(model: Segmenter, methods: Sequence[str]) -> list[Run]:
    """Every method at the shares that it can reach; what is left out is named."""
    runs = []
    for method in methods:
        for share in SHARES:
            try:
                with tokenzoo.patched(model, method, flops=share):
                    runs.append(Run(method, {"flops": share}))
            except ValueError as error:
                print(f"left out: {method} at {share:.0%}: {str(error).partition(';')[0]}", flush=True)
    return runs


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    asked = "" if row["flops"] is None else f"{row['flops']:.2f}"
    difference = "" if row["diff_miou"] is None else f"{row['diff_miou']:+.2f} ± {row['diff_miou_se']:.2f}"
    return (
        f"{row['method']:<14} {asked:>6} {row['gmacs']:>7.4f} {row['tokens_out']:>7.1f} {row['miou']:>6.2f}% "
        f"{difference:>14} {row['img_per_sec']:>7.0f}"
    )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What the table shows, in a sentence."""
    least = min(row["flops"] for row in rows[1:])
    own = sorted((row for row in rows[1:] if row["flops"] == least), key=lambda row: -row["miou"])
    return (
        f"Unpatched, the model reaches {rows[0]['miou']:.1f} % mIoU on {rows[0]['n_images']} test mosaics. At "
        f"{least:.0%} of the encoder's multiply-adds it is between {own[-1]['miou']:.1f} % ({own[-1]['method']}) and "
        f"{own[0]['miou']:.1f} % ({own[0]['method']})."
    )


@torch.inference_mode()
def draw(model: Segmenter, data: SegmentationDataset, path: Path) -> None:
    """Three mosaics: image, truth, unpatched, and patched by a few methods."""
    palette, rows = class_colours(model.num_classes), []
    predict = Predictor(model, model.mean, model.std)
    for index in range(3):
        sample = data[index]
        found = [("truth", sample.mask), ("unpatched", predict(sample.image)[0])]
        for method in DRAWN:
            with tokenzoo.patched(model, method, flops=SHARES[-1]):
                found.append((f"{method} {SHARES[-1]:.0%}", predict(sample.image)[0]))
        size = (2 * sample.image.width, 2 * sample.image.height)
        image = sample.image.resize(size, Image.Resampling.BICUBIC)
        big = [np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)) for _, labels in found]
        parts = [image, *(overlay(image, labels, palette, 0.7) for labels in big)]
        row = side_by_side(parts, ["image", *(name for name, _ in found)])
        rows.append(with_legend(row, np.concatenate([labels for _, labels in found]), palette, model.classes))
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    canvas.save(path)


def run(
    output: Path, methods: Sequence[str], count: int = TEST, rounds: int = 3
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Measures, prints and draws; returns the rows and what was written."""
    model = photos.load_mosaic_model()
    with tempfile.TemporaryDirectory() as folder:
        photos.write_mosaics(Path(folder), count, "test", seed=1)
        data = open_dataset(folder, classes=list(photos.CLASSES))
        runs = solvable(model, methods)
        report = evaluate_segmentation(model, runs, data, speed_rounds=rounds, resamples=300)
        rows = report.rows()
        for row, flops in zip(rows, [None, *(r.options["flops"] for r in runs)]):
            row["flops"] = flops
        print(f"\n{HEADER}\n{'-' * len(HEADER)}\n" + "\n".join(map(line, rows)))
        written = [output / name for name in ("mosaics_table.csv", "mosaics_curve.png", "mosaics.png")]
        write_results(written[0], rows, COLUMNS, environment("cpu"))
        title = f"mosaics of photographs, {count} test mosaics, no retraining; bars: error of the paired difference"
        plot_curves(
            rows, written[1], y="miou", error="diff_miou_se", xlabel="GMACs per image", ylabel="mIoU (%)", title=title
        )
        draw(model, data, written[2])
    print("\n" + summary(rows))
    return rows, written
