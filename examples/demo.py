"""Every registered method on photographs: accuracy, cost, speed and token maps, offline and on the CPU.

python examples/demo.py
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import demo_maps
import demo_mosaics
import demo_report
import photos
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core.learned import needs_training
from tokenzoo.evaluation import Run, bench, environment, evaluate, write_results
from tokenzoo.view.curves import plot_curves
from tokenzoo.view.panels import compose

SHARES = (0.8, 0.6, 0.4)  # of the unpatched model's multiply-adds
CROPS = 240
BATCH = 32
COLUMNS = (
    "method", "flops", "top1", "top1_se", "diff_top1", "diff_top1_se", "n_images", "tokens_out", "gmacs", "gmac_share",
    "infer_samples_per_sec", "infer_batch_size", "speedup", "speedup_q1", "speedup_q3", "recipe",
)  # fmt: skip
HEADER = (
    f"{'method':<14} {'asked':>6} {'GMACs':>7} {'share':>6} {'tokens':>7} {'accuracy':>9} {'difference':>14} "
    f"{'img/s':>7} {'speed-up':>9}"
)


def measure(
    model: nn.Module,
    methods: Sequence[str],
    shares: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    rounds: int,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Rows of the table, the unpatched model first; prints a line per method on the way.

    Args:
        model: unpatched.
        methods: names of methods; one that has no strength to solve for is named and left out.
        shares: what to land on, as shares of the unpatched model's multiply-adds.
        batches: normalised test images and labels.
        rounds: timed rounds; in each, all models take turns.
        threads: CPU threads while models are timed.
    """
    accuracies, runs = evaluate(model, [], batches), [Run()]
    print(f"accuracy of {'unpatched':<14} {accuracies[0].top1.mean:6.2f} %", flush=True)
    for method in methods:
        own = [Run(method, {"flops": share}) for share in shares if reaches(model, method, share)]
        if not own:
            continue
        found = evaluate(model, own, batches)[1:]
        print(f"accuracy of {method:<14} {'  '.join(f'{a.top1.mean:6.2f} %' for a in found)}", flush=True)
        accuracies, runs = accuracies + found, runs + own
    torch.set_num_threads(threads)
    print(f"speed: {len(runs)} models take turns, {rounds} rounds ...", flush=True)
    speeds = bench(model, runs, batch_size=BATCH, rounds=rounds, warmup=1, latency=False, progress=None)
    rows = [{**speed.row(), **accuracy.row()} for speed, accuracy in zip(speeds, accuracies)]
    for row, run, speed in zip(rows, runs, speeds):
        row.update(flops=run.options.get("flops"), gmac_share=round(1 / speed.gmac_ratio, 4))
    return rows


def reaches(model: nn.Module, method: str, share: float) -> bool:
    """Whether a method can act on the model at a share of its multiply-adds; says why not."""
    try:
        with tokenzoo.patched(model, method, flops=share):
            return True
    except ValueError as error:
        print(f"left out: {method} at {share:.0%}: {str(error).partition(';')[0]}", flush=True)
        return False


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    asked = "" if row["flops"] is None else f"{row['flops']:.2f}"
    difference = "" if row["diff_top1"] is None else f"{row['diff_top1']:+.2f} ± {row['diff_top1_se']:.2f}"
    return (
        f"{row['method']:<14} {asked:>6} {row['gmacs']:>7.4f} {row['gmac_share']:>6.2f} {row['tokens_out']:>7.1f} "
        f"{row['top1']:>8.2f}% {difference:>14} {row['infer_samples_per_sec']:>7.0f} {row['speedup']:>8.2f}x"
    )


def draw_photos(path: Path) -> None:
    """Saves all photographs, their test tiles framed."""
    panels = []
    for index, ((name, _, terms), photo) in enumerate(zip(photos.PHOTOS, photos.load_photos())):
        photo = photo.copy()
        draw = ImageDraw.Draw(photo)
        for box in photos.test_tiles(index, photo.size):
            draw.rectangle((box.left + 1, box.top + 1, box.right - 2, box.bottom - 2), outline="black", width=5)
            draw.rectangle((box.left + 2, box.top + 2, box.right - 3, box.bottom - 3), outline="white", width=2)
        canvas = Image.new("RGB", (176, 118), "white")
        photo.thumbnail(canvas.size, Image.Resampling.LANCZOS)
        canvas.paste(photo, (0, 0))
        panels.append((canvas, name, terms))
    compose(panels, [], "framed: what the model never saw, and is tested on", 6).save(path)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table shows, in words; `rows` starts with the unpatched model."""
    base, runs = rows[0], rows[1:]
    words = [
        f"Unpatched, the model names the photograph of {base['top1']:.1f} % of {base['n_images']} test crops, at "
        f"{base['gmacs']:.4f} GMACs and {base['infer_samples_per_sec']:.0f} img/s."
    ]
    for share in sorted({row["flops"] for row in runs}, reverse=True):
        own = sorted((row for row in runs if row["flops"] == share), key=lambda row: -row["top1"])
        fast = max(own, key=lambda row: row["speedup"])
        words.append(
            f"At {share:.0%} of the multiply-adds accuracy goes from {own[-1]['top1']:.1f} % ({own[-1]['method']}) to "
            f"{own[0]['top1']:.1f} % ({own[0]['method']}); the fastest is {fast['method']} ({fast['speedup']:.2f}x)."
        )
    equal = [row for row in runs if abs(row["diff_top1"]) <= 2 * row["diff_top1_se"]]
    words.append(f"{len(equal)} of {len(runs)} runs lie within two standard errors of the unpatched accuracy.")
    close = [row for row in runs if row["diff_top1"] >= -1]
    if close:
        fast = max(close, key=lambda row: row["speedup"])
        words.append(
            f"The fastest that loses at most one point: {fast['method']} at {fast['flops']:.0%}, "
            f"{fast['speedup']:.2f}x, {fast['diff_top1']:+.2f} points."
        )
    return words


def report(
    path: Path,
    words: Sequence[str],
    rows: Sequence[dict[str, Any]],
    mosaics: Sequence[dict[str, Any]],
    mosaic_words: str,
    maps: dict[str, Path],
) -> None:
    """Writes the page with all tables and images.

    Args:
        path: of the page; images lie beside it.
        words: what the table of crops shows.
        rows: of that table.
        mosaics: rows of the table of mosaics.
        mosaic_words: what that one shows.
        maps: image of every method.
    """
    folder, figure = path.parent, demo_report.picture
    crops = [
        [*demo_report.cells(row, "top1"), f"{row['infer_samples_per_sec']:.0f}", f"{row['speedup']:.2f}x"]
        for row in rows
    ]
    places = [
        [*demo_report.cells(row, "miou"), f"{row['pixel_acc']:.2f}", f"{row['img_per_sec']:.0f}"] for row in mosaics
    ]
    common = ("method", "asked for", "GMACs", "tokens")
    shown = ", ".join(demo_maps.SHOWN)
    sections = {
        "photographs": ("The photographs", [
            figure(folder / "photos.png", "Twelve photographs, four tiles of each framed",
                   "Carried by scikit-learn and scikit-image. china: danielbuechele, flower: vultilion, both CC BY "
                   "2.0, resized; all others CC0, public domain or without known restrictions."),
        ]),
        "accuracy": ("Which photograph is it? Accuracy against cost", [
            *(f"<p>{demo_report.escape(text)}</p>" for text in words),
            figure(folder / "curve.png", "Accuracy against multiply-adds per image, one line per method",
                   "Bars: standard errors of the paired difference to the unpatched model."),
            figure(folder / "speed.png", "Accuracy against images per second, one line per method",
                   "Images per second on this machine, all models timed in turn."),
            demo_report.table("Test crops; differences in points, on the same crops",
                              (*common, "accuracy, %", "difference", "images/s", "speed-up"), crops),
        ]),
        "maps": ("Which patches does each token stand for?", [
            figure(folder / "token_maps.png", "The same photograph of a cat under every method, with its tokens drawn",
                   f"All methods at {demo_maps.SHARE:.0%} of the multiply-adds, after the last reducing block."),
            *(
                f"<details><summary>{demo_report.escape(name)}</summary>"
                + figure(file, f"Token maps of {name} on {shown}, after some of its blocks") + "</details>"
                for name, file in maps.items()
            ),
        ]),
        "mosaics": ("Segmentation: mosaics of photographs", [
            f"<p>{demo_report.escape(mosaic_words)}</p>",
            figure(folder / "mosaics.png", "Three mosaics with their true and predicted class maps",
                   "A class per photograph; predictions are those of the unpatched model and of three methods."),
            figure(folder / "mosaics_curve.png", "mIoU against multiply-adds per image, one line per method",
                   "Bars: standard errors of the paired difference to the unpatched model."),
            demo_report.table("Test mosaics; differences in points, on the same mosaics",
                              (*common, "mIoU, %", "difference", "pixel accuracy, %", "images/s"), places),
        ]),
    }  # fmt: skip
    lead = (
        "A small ViT that was trained on parts of twelve photographs, and is tested on the other parts; every method "
        "is put on it as it comes, without training.",
        "The task is small and the photographs are few: the page shows what methods do and cost, and its ranks are no "
        "forecast for other models and data.",
    )
    path.write_text(demo_report.page("tokenzoo: the demo", lead, sections), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for tables, images and the page")
    ready = [name for name in tokenzoo.list_methods() if not needs_training(tokenzoo.method_class(name))]
    attending = [name for name in ready if not tokenzoo.create_method(name).reads_scan]
    parser.add_argument("--methods", nargs="+", default=attending, help="all for models that attend by default")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of what is timed, by default one")
    args = parser.parse_args()
    # fvcore's import calls torch.jit.script, which newer versions of torch announce as deprecated
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

    torch.set_num_threads(os.cpu_count() or 1)  # accuracy does not depend on them; what is timed has its own
    start = time.perf_counter()
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    model, data = photos.load_classifier(), photos.draw_crops(CROPS, "test", seed=1)
    batches = list(zip((photos.normalize(part) for part in data.pixels.split(60)), data.labels.split(60)))
    shape = photos.ARCHITECTURE
    patches = (shape["img_size"] // shape["patch_size"]) ** 2
    print(
        f"{len(photos.PHOTOS)} photographs of scikit-learn and scikit-image, {CROPS} test crops, read by a ViT of "
        f"{shape['depth']} blocks, width {shape['embed_dim']}, {patches} patches.\n"
        f"Every method is solved for {', '.join(f'{share:.0%}' for share in SHARES)} of the model's multiply-adds.\n",
        flush=True,
    )
    rows = measure(model, args.methods, SHARES, batches, args.rounds, args.threads)
    print(f"\n{HEADER}\n{'-' * len(HEADER)}\n" + "\n".join(map(line, rows)))
    print(
        "share: of the unpatched multiply-adds, reduction's own included (a grid can only come near what was asked)\n"
        "tokens: that reach the head, mean over the images; difference: in points, on the same images, with standard "
        f"error\nimg/s, speed-up: medians of {args.rounds} rounds, batch {BATCH}, CPU threads: {args.threads}"
    )

    written = [output / name for name in ("table.csv", "photos.png", "curve.png", "speed.png")]
    write_results(written[0], rows, COLUMNS, environment("cpu"))
    draw_photos(written[1])
    title = f"parts of {len(photos.PHOTOS)} photographs, {CROPS} test crops, no training after patching"
    common = {"error": "diff_top1_se", "ylabel": "test accuracy (%)", "title": title}
    plot_curves(rows, written[2], "gmacs", "top1", xlabel="GMACs per image", **common)
    plot_curves(rows, written[3], "infer_samples_per_sec", "top1", xlabel="images per second", **common)
    words = summary(rows)
    print("\n" + "\n".join(words))

    print("\nToken maps over photographs.\n", flush=True)
    maps, files = demo_maps.run(output, args.methods)
    written += files
    print("\nSegmentation: mosaics of photographs, the same methods without retraining.\n", flush=True)
    mosaics, files = demo_mosaics.run(output, args.methods, rounds=args.rounds)
    written += files
    page = output / "index.html"
    report(page, words, rows, mosaics, demo_mosaics.summary(mosaics), maps)
    print(f"\nWritten in {time.perf_counter() - start:.0f} s, {page} shows all of it:")
    print("\n".join(f"  {path}" for path in [page, *written]))


if __name__ == "__main__":
    main()
