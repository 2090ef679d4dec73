"""Every method at several strengths on a segmentation model: mIoU, paired difference, multiply-adds, speed.

    python benchmarks/segmentation/segment_table.py --checkpoint benchmarks/models/camvid320_linear.safetensors \
        --data test/ --ignore 11 --output benchmarks/segmentation/camvid320_linear

DATA is a folder with images/ and masks/. Strengths are shares of the encoder's multiply-adds; a method that cannot
reach one is named and left out there. The last rows compare methods at one place: half of the tokens after one third of
the depth, the others at the multiply-adds of clustering. Writes OUTPUT.csv, OUTPUT.png and OUTPUT_maps.png.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenzoo
from tokenzoo.dense import load_segmenter
from tokenzoo.evaluation import Run, environment, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.segmentation.data import open_dataset
from tokenzoo.evaluation.segmentation.evaluate import evaluate_segmentation
from tokenzoo.evaluation.segmentation.inference import Predictor
from tokenzoo.evaluation.segmentation.overlay import class_colours, overlay, side_by_side, with_legend
from tokenzoo.evaluation.segmentation.results import SEGMENT_COLUMNS
from tokenzoo.view.maps import plot_curves

THRESHOLDS = (0.97, 0.9, 0.8)  # of algm, whose counts follow the pictures
SHOWN = ("setting", "miou", "miou_se", "diff_miou", "diff_miou_se", "pixel_acc", "diff_pixel_acc", "diff_pixel_acc_se",
         "tokens_out", "gmacs", "img_per_sec", "speedup")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ignore", type=int, nargs="*", default=[])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.85, 0.7, 0.55])
    parser.add_argument("--temperature", type=float, default=0.02, help="of clustering, chosen on other pictures")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds, all runs take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(args.threads)
    model = load_segmenter(args.checkpoint)
    data = open_dataset(args.data, "folder", ignore=args.ignore, classes=model.classes)
    runs = [*curve_runs(model, args.shares, args.temperature), *one_place(model, args.temperature)]
    report = evaluate_segmentation(model, [run for _, run in runs], data, speed_rounds=args.rounds, progress=None)
    rows = [{**row, "setting": name} for (name, _), row in zip([("unpatched", None), *runs], report.rows())]
    for row in rows:
        row.update(model=Path(args.checkpoint).name, data=Path(args.data).name, split="", precision="float32")
    print(table([[str(row.get(column, "")) for column in SHOWN] for row in rows], SHOWN))
    write_results(args.output.with_suffix(".csv"), rows, ("setting", *SEGMENT_COLUMNS), environment("cpu", None))
    plotted = [row for row in rows if not row["setting"].startswith("one third")]
    plot_curves(
        plotted, args.output.with_suffix(".png"), y="miou", xlabel="GMACs, encoder and decoder",
        ylabel=f"mIoU of {len(data)} pictures, percent", title=f"{Path(args.checkpoint).stem}, no retraining",
    )  # fmt: skip
    draw_maps(model, [run for run in runs if run[0].startswith("one third")], data, args.output)


@torch.inference_mode()
def draw_maps(model: Any, runs: list[tuple[str, Run]], data: Any, output: Path) -> None:
    """Class maps of two pictures: truth, unpatched, and some of the runs. The pictures themselves are not drawn."""
    palette, rows = np.vstack([class_colours(model.num_classes), np.zeros((256, 3), np.uint8)])[:256], []
    chosen = [runs[i] for i in (0, 2, 4, 5, 9)]
    for index in (len(data) // 4, 3 * len(data) // 4):
        sample = data[index]
        predict = Predictor(model, model.mean, model.std)
        found = [("labels (black: not counted)", sample.mask), ("unpatched", predict(sample.image)[0])]
        for name, run in chosen:
            with tokenzoo.patched(model, run.method, **run.options):
                found.append((name, predict(sample.image)[0]))
        pictures = [overlay(sample.image, labels, palette, alpha=1.0) for _, labels in found]
        row = side_by_side(pictures, [name for name, _ in found])
        rows.append(with_legend(row, np.arange(model.num_classes), palette, model.classes))
    canvas = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        canvas.paste(row, (0, i * rows[0].height))
    canvas.save(f"{output}_maps.png")


def curve_runs(model: Any, shares: list[float], temperature: float) -> list[tuple[str, Run]]:
    """Every method at the shares that it can reach."""
    runs = []
    for name in tokenzoo.list_methods():
        if tokenzoo.create_method(name).closes_span:
            continue  # rebuilds what another method took away
        if tokenzoo.create_method(name).data_dependent and name != "ats":
            runs += [(f"{name} threshold={t}", Run(name, {"threshold": t})) for t in THRESHOLDS]
            continue
        options = {"temperature": temperature} if name == "cluster" else {}
        for share in shares:
            try:
                tokenzoo.patch_model(copy.deepcopy(model), name, flops=share, **options)
            except ValueError as error:
                print(f"left out: {name} at {share}: {error}", flush=True)
                continue
            runs.append((f"{name} flops={share}", Run(name, {"flops": share, **options})))
    return runs


def one_place(model: Any, temperature: float) -> list[tuple[str, Run]]:
    """Half of the tokens after one third of the depth by clustering, and others there at its multiply-adds."""
    block = len(model.encoder.blocks) // 3 - 1
    high, wide = model.encoder.patch_embed.grid_size
    grid = [round(high / 2**0.5 + 0.01), round(wide / 2**0.5)]
    cluster = {"method": "cluster", "layers": block, "grid": grid, "temperature": temperature}
    runs = [
        (f"one third: cluster, {norm}", Run([cluster, {"method": "reconstruct", "layers": "norm", "norm": norm}], {}))
        for norm in ("l1", "l2", "copy")
    ]
    runs.append(("one third: cluster, class maps l2",
                 Run([cluster, {"method": "reconstruct", "layers": "maps", "norm": "l2"}], {})))  # fmt: skip
    with tokenzoo.patched(model, [cluster, {"method": "reconstruct", "layers": "norm"}]):
        share = tokenzoo.report(model).ratio
    for name, where in (("pool", block + 1), ("random", block), ("uniform", block), ("topk", block), ("evit", block)):
        runs.append((f"one third: {name}", Run(name, {"layers": [where], "flops": share})))
    runs.append(("one third: random, nearest", Run("random", {"layers": [block], "flops": share, "fill": "nearest"})))
    return runs


if __name__ == "__main__":
    main()
