"""CamVid with heads trained on a frozen pretrained backbone: mIoU of every method at several strengths, against time.

    python benchmarks/segmentation/camvid_table.py --weights WEIGHTS --data CAMVID --card vit_tiny_tin200 \
        --size 240 320 --count 61 --work runs/tiny --output benchmarks/segmentation/camvid_tiny.csv

CAMVID holds train/, val/ and test/, each with images/ and masks/. Heads are trained on all training images, the
sharpness of clustering is chosen on validation images (every fourth), the table is of `--count` test images drawn by
the seed. One image at a time, one thread, the runs taking turns; both heads read one pass of the backbone. Heads, and
what was measured per image, are kept in `--work`: a run that was stopped goes on from there, and a larger `--count`
only adds images. `--methods` measures some methods anew, on the same images, and replaces their rows in `--output`.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from camvid_heads import CLASSES, Frame, read_frames, trained_heads  # beside this script
from dense_runs import (
    CARDS,
    Card,
    Setting,
    add_source,
    at_shares,
    by_setting,
    load_backbone,
    patched_copies,
    read_image,
    read_state,
    take_turns,
    timed,
)
from torch import nn

import tokenzoo
from tokenzoo.dense import Encoded, Segmenter, encode
from tokenzoo.evaluation import environment, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.runs import Run
from tokenzoo.evaluation.segmentation.confusion import areas, confusion_matrix, scores
from tokenzoo.evaluation.segmentation.costs import dense_macs
from tokenzoo.evaluation.segmentation.paired import bootstrap_miou, standard_error

COLUMNS = (
    "head", "setting", "method", "method_kwargs", "share", "gmacs", "gmacs_decoder", "tokens_out", "time_ratio",
    "time_q1", "time_q3", "miou", "miou_se", "diff", "diff_se", "pixel_acc", "diff_pixel_acc", "agreement",
    "agreement_se", "iou",
    "images", "weights", "size", "sharpness",
)  # fmt: skip
SHOWN = ("head", "setting", "share", "time_ratio", "miou", "diff", "diff_se", "agreement", "tokens_out")
PRUNING = ("random", "uniform", "topk", "evit")
SHARPNESS = (1.0, 5.0, 20.0, 80.0, 320.0)
PUBLISHED = {"temperature": 0.02}  # in absolute units, for the features of another model


def all_settings(model: nn.Module, shares: list[float], sharpness: float) -> list[Setting]:
    """Every method at the shares, clustering also as chosen and as published, and some of them in one place."""
    settings = at_shares(model, shares, {})
    for options in ({"sharpness": sharpness}, PUBLISHED):
        settings += cluster_at_shares(model, shares, options)
    return [*settings, *one_place(model, sharpness)]


def cluster_at_shares(model: nn.Module, shares: list[float], options: dict[str, float]) -> list[Setting]:
    """Clustering and reconstruction with options, where they reach the shares."""
    found, text = [], " ".join(f"{k}={v:g}" for k, v in options.items())
    for share in shares:
        recipe = [{"method": "cluster", **options}, {"method": "reconstruct", "layers": "norm"}]
        try:
            with tokenzoo.patched(model, recipe, flops=share):
                pass
        except ValueError as error:
            print(f"left out: cluster+reconstruct at {share}: {error}", flush=True)
            continue
        run = Run(recipe, {"flops": share})
        found.append(Setting(f"cluster {text}, reconstruct flops={share}", "cluster+reconstruct", run, share))
    return found


def one_place(model: nn.Module, sharpness: float) -> list[Setting]:
    """Half of the tokens after one third of the depth by clustering, and others there at its multiply-adds."""
    block = len(model.blocks) // 3 - 1
    high, wide = model.patch_embed.grid_size
    grid = [round(high / 2**0.5 + 0.01), round(wide / 2**0.5)]
    cluster = {"method": "cluster", "layers": block, "grid": grid, "sharpness": sharpness}
    ways = [("norm", "l1"), ("norm", "l2"), ("norm", "copy"), ("maps", "l2")]
    found = [
        Setting(f"one third: cluster {grid[0]}x{grid[1]}, {where} {norm}", "cluster+reconstruct",
                Run([cluster, {"method": "reconstruct", "layers": where, "norm": norm}], {}))
        for where, norm in ways
    ]  # fmt: skip
    with tokenzoo.patched(model, [cluster, {"method": "reconstruct", "layers": "norm"}]):
        share = tokenzoo.report(model).ratio
    # pool acts before its block; tome cannot take more than half of the tokens at once
    places = {"pool": [block + 1], "tome": [block, block + 1], **{name: [block] for name in PRUNING}}
    for name, where in places.items():
        found.append(Setting(f"one third: {name}", name, Run(name, {"layers": where, "flops": share})))
    for name in PRUNING:
        run = Run(name, {"layers": [block], "flops": share, "fill": "nearest"})
        found.append(Setting(f"one third: {name}, filled from the nearest", name, run))
    return found


class Work:
    """Runs a setting on a frame: seconds, and for each head right, predicted and labelled pixels of each class."""

    def __init__(
        self, models: dict[str, nn.Module], heads: dict[str, nn.Module], frames: list[Frame], card: Card
    ) -> None:
        self.frames, self.card = {frame.name: frame for frame in frames}, card
        self.segmenters = {
            name: {kind: Segmenter(model, head, len(CLASSES)).eval() for kind, head in heads.items()}
            for name, model in models.items()
        }
        self.image, self.x, self.base = "", torch.empty(0), {}

    @torch.inference_mode()
    def __call__(self, name: str, image: str) -> dict[str, Any]:
        frame, own = self.frames[image], self.segmenters[name]
        encoder = next(iter(own.values())).encoder
        if self.image != image:
            self.image, self.base = image, {}
            self.x = read_image(frame.image, encoder.patch_embed.img_size, self.card)
        encoded, seconds = timed(lambda: encode(encoder, self.x))
        values: dict[str, Any] = {}
        for kind, segmenter in own.items():
            labels, more = timed(partial(self._labels, segmenter, encoded, frame.mask.shape))
            base = self.base.setdefault(kind, labels)
            area = areas(confusion_matrix(labels, frame.mask, len(CLASSES)))
            same = int(((labels == base) & (frame.mask != 255)).sum())
            values[kind] = {"seconds": seconds + more, "area": area.astype(int).tolist(), "same": same}
        return values

    @staticmethod
    def _labels(segmenter: Segmenter, encoded: Encoded, size: tuple[int, int]) -> np.ndarray:
        maps = F.interpolate(segmenter.decode(encoded), size, mode="bilinear", align_corners=False)
        return maps.argmax(1)[0].numpy()


def choose_sharpness(model: nn.Module, heads: dict[str, nn.Module], val: list[Frame], card: Card) -> float:
    """The sharpness at which clustering at 60 % of the multiply-adds keeps most mIoU, mean over the heads."""
    models, tried = {"unpatched": model}, {f"{value:g}": {"sharpness": value} for value in SHARPNESS}
    for name, options in (*tried.items(), ("published", PUBLISHED)):
        (setting,) = cluster_at_shares(model, [0.6], options)
        models[name] = patched_copies(model, [setting])[setting.name]
    work, found = Work(models, heads, val, card), {}
    for name in models:
        values = [work(name, frame.name) for frame in val]
        miou = {kind: 100 * float(scores(np.sum([v[kind]["area"] for v in values], axis=0)).miou) for kind in heads}
        found[name] = float(np.mean(list(miou.values())))
        parts = "  ".join(f"{kind} {value:.2f}" for kind, value in miou.items())
        print(f"validation, {len(val)} images, clustering at 60 %: {name}: {parts}", flush=True)
    return tried[max(tried, key=found.get)]["sharpness"]


def summarize(lines: list[dict[str, Any]], name: str, head: str) -> dict[str, Any]:
    """What one setting comes to over all images, for one head."""
    pairs = by_setting(lines, name)
    own, base = (np.array([pair[i][head]["area"] for pair in pairs], np.float64) for i in (0, 1))
    ratio = [ours[head]["seconds"] / before[head]["seconds"] for ours, before in pairs]
    q1, median, q3 = np.percentile(ratio, (25, 50, 75)).round(3)
    total, unpatched = scores(own.sum(0)), scores(base.sum(0))
    draws, base_draws = 100 * bootstrap_miou(own), 100 * bootstrap_miou(base)
    same, labelled = np.array([ours[head]["same"] for ours, _ in pairs]), own[:, 2].sum(1)
    return {
        "time_ratio": median, "time_q1": q1, "time_q3": q3, "images": len(pairs),
        "miou": round(100 * float(total.miou), 2), "miou_se": round(standard_error(draws), 2),
        "diff": round(100 * float(total.miou - unpatched.miou), 2),
        "diff_se": round(standard_error(draws - base_draws), 2),
        "pixel_acc": round(100 * float(total.aacc), 2),
        "diff_pixel_acc": round(100 * float(total.aacc - unpatched.aacc), 2),
        "agreement": round(100 * same.sum() / labelled.sum(), 2),
        "agreement_se": round(100 * float(np.std(same / labelled, ddof=1)) / len(pairs) ** 0.5, 2),
        "iou": {k: round(100 * float(v), 1) for k, v in zip(CLASSES, total.iou)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--heads", nargs="+", default=["linear", "mask"])
    parser.add_argument("--start", type=Path, default=None, help="folder of heads to start from, for a third as long")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sharpness", type=float, default=None, help="of clustering; chosen if not given")
    parser.add_argument("--train-every", type=int, default=1, help="every which training image heads learn from")
    parser.add_argument("--val-every", type=int, default=4, help="every which validation image it is chosen on")
    parser.add_argument("--count", type=int, default=61)
    parser.add_argument("--methods", nargs="+", default=None, help="only these, whose rows in --output are replaced")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="take no image after that many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    card, size = CARDS[args.card], tuple(args.size)
    model = load_backbone(args.weights, card, size)
    train = read_frames(args.data / "train")[:: args.train_every]
    heads = trained_heads(model, args.heads, train, card, args.work, args.start)
    kept = args.work / "sharpness.txt"
    if args.sharpness is None and not kept.is_file():
        val = read_frames(args.data / "val")[:: args.val_every]
        kept.write_text(f"{choose_sharpness(model, heads, val, card):g}\n")
    sharpness = args.sharpness or float(kept.read_text())
    settings = all_settings(model, args.shares, sharpness)
    state = args.work / "images.jsonl"
    if args.methods is not None:
        settings = [s for s in settings if s.method in args.methods]
        state = args.work / f"images_{'_'.join(sorted(args.methods))}.jsonl"
    models = patched_copies(model, settings)
    test = read_frames(args.data / "test")
    random.Random(args.seed).shuffle(test)
    test = test[: args.count]
    work, names = Work(models, heads, test, card), [s.name for s in settings]
    work("unpatched", test[0].name)
    for image in take_turns([frame.name for frame in test], names, state, work):
        print(image, flush=True)
        if time.monotonic() - start > 60 * args.minutes:
            break
    chosen = {frame.name for frame in test}
    lines = [line for line in read_state(state, names) if line["image"] in chosen]
    crops, rows = torch.cat([read_image(frame.image, size, card) for frame in test[:4]]), []
    for kind in heads:
        full = dense_macs(work.segmenters["unpatched"][kind], crops)
        for setting in (Setting("unpatched", "unpatched", Run()), *settings):
            costs = dense_macs(work.segmenters[setting.name][kind], crops)
            total = costs.encoder + costs.decoder
            rows.append({
                "head": kind, "setting": setting.name, "method": setting.method,
                "method_kwargs": setting.run.settings(), "share": round(total / (full.encoder + full.decoder), 4),
                "gmacs": round(total / 1e9, 4), "gmacs_decoder": round(costs.decoder / 1e9, 4),
                "tokens_out": round(costs.tokens_out, 1), **summarize(lines, setting.name, kind),
                "weights": args.card, "size": f"{size[0]}x{size[1]}", "sharpness": sharpness,
            })  # fmt: skip
    rows.sort(key=lambda row: (list(heads).index(row["head"]), row["method"] != "unpatched", -row["miou"]))
    print(table([[str(row.get(column, "")) for column in SHOWN] for row in rows], SHOWN))
    record = environment("cpu", None) | {
        "command": f"python benchmarks/segmentation/camvid_table.py --card {args.card} "
        f"--size {size[0]} {size[1]} --count {args.count}"
        + (f" --methods {' '.join(args.methods)}" if args.methods else "")
    }
    rows = [dict.fromkeys(COLUMNS, "") | row for row in rows]
    if args.methods is None:
        write_results(args.output, rows, COLUMNS, record)
        return
    # rows of other methods stay, each with the environment that it was measured in
    with args.output.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["method"] not in args.methods]
    found = [row | record for row in rows if row["method"] in args.methods]
    both = sorted([*kept, *found], key=lambda row: (row["head"], row["method"] != "unpatched", -float(row["miou"])))
    write_results(args.output, both, [*COLUMNS, *record], {})


if __name__ == "__main__":
    main()
