"""Every registered method on real test images: accuracy, cost and speed, offline and on the CPU.

python examples/demo.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import demo_scenes
import digits
import torch
from PIL import Image
from torch import Tensor, nn

import tokenzoo
from tokenzoo.evaluation import Run, bench, environment, evaluate, write_results
from tokenzoo.view.maps import draw_token_maps, plot_curves, token_maps

SHARES = (0.8, 0.6, 0.4)  # of the unpatched model's multiply-adds
MAPPED = ("tome", "evit", "ats")
MAPPED_SHARE = 0.6
MAPPED_DIGITS = (2, 4, 5, 8)
BATCH = 64
COLUMNS = (
    "method", "flops", "top1", "top1_se", "diff_top1", "diff_top1_se", "n_images", "tokens_out", "gmacs", "gmac_share",
    "infer_samples_per_sec", "infer_batch_size", "speedup", "speedup_q1", "speedup_q3", "recipe",
)  # fmt: skip
HEADER = (
    f"{'method':<10} {'asked':>6} {'GMACs':>7} {'share':>6} {'tokens':>7} {'accuracy':>9} {'difference':>14} "
    f"{'img/s':>7} {'speed-up':>9}"
)


def measure(
    model: nn.Module,
    methods: Sequence[str],
    shares: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows of the table, the unpatched model first; prints a line per method on the way.

    Args:
        model: unpatched.
        methods: names of methods; one that has no strength to solve for is named and left out.
        shares: what to land on, as shares of the unpatched model's multiply-adds.
        batches: normalised test images and labels.
        rounds: timed rounds; in each, all models take turns.
    """
    accuracies, runs = evaluate(model, [], batches), [Run()]
    print(f"accuracy of {'unpatched':<10} {accuracies[0].top1.mean:6.2f} %", flush=True)
    for method in methods:
        own = [Run(method, {"flops": share}) for share in shares if reaches(model, method, share)]
        if not own:
            continue
        found = evaluate(model, own, batches)[1:]
        print(f"accuracy of {method:<10} {'  '.join(f'{a.top1.mean:6.2f} %' for a in found)}", flush=True)
        accuracies, runs = accuracies + found, runs + own
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
        f"{row['method']:<10} {asked:>6} {row['gmacs']:>7.4f} {row['gmac_share']:>6.2f} {row['tokens_out']:>7.1f} "
        f"{row['top1']:>8.2f}% {difference:>14} {row['infer_samples_per_sec']:>7.0f} {row['speedup']:>8.2f}x"
    )


def draw_maps(model: nn.Module, method: str, data: digits.Digits, path: Path) -> None:
    """Saves what became of the patches of a few test digits, a row a digit."""
    chosen = torch.stack([(data.test_labels == digit).nonzero()[0, 0] for digit in MAPPED_DIGITS])
    ink = data.test_images[chosen]
    with tokenzoo.patched(model, method, flops=MAPPED_SHARE), torch.inference_mode():
        images = digits.normalize(ink)
        maps, answers = token_maps(model, images), model(images).argmax(1).tolist()
    drawn = []
    for index, answer in enumerate(answers):
        picture = Image.fromarray((ink[index, 0] * 255).round().byte().numpy())
        title = f"{method}, flops={MAPPED_SHARE}: a {data.test_labels[chosen[index]]}, read as {answer}"
        drawn.append(draw_token_maps(picture, maps, index, columns=len(maps.blocks) + 1, side=140, title=title))
    canvas = Image.new("RGB", (max(d.width for d in drawn), sum(d.height for d in drawn)), "white")
    top = 0
    for part in drawn:
        canvas.paste(part, (0, top))
        top += part.height
    canvas.save(path)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table shows, in words; `rows` starts with the unpatched model."""
    base, runs = rows[0], rows[1:]
    words = [
        f"Unpatched, the model reads {base['top1']:.1f} % of {base['n_images']} test digits, at {base['gmacs']:.4f} "
        f"GMACs and {base['infer_samples_per_sec']:.0f} img/s."
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for the table and the pictures")
    attending = [name for name in tokenzoo.list_methods() if not tokenzoo.create_method(name).reads_scan]
    parser.add_argument("--methods", nargs="+", default=attending, help="all for models that attend by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a single one is timed by its own clock")
    args = parser.parse_args()
    # fvcore's import calls torch.jit.script, which newer versions of torch announce as deprecated
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    data = digits.load_digits()
    model, about = digits.load_checkpoint()
    batches = list(zip(digits.normalize(data.test_images).split(120), data.test_labels.split(120)))
    shape = about["architecture"]
    patches = (shape["img_size"] // shape["patch_size"]) ** 2
    print(
        f"scikit-learn's handwritten digits, {len(data.test_labels)} test images, read by a ViT of "
        f"{shape['depth']} blocks, width {shape['embed_dim']}, {patches} patches.\n"
        f"Every method is solved for {', '.join(f'{share:.0%}' for share in SHARES)} of the model's multiply-adds.\n",
        flush=True,
    )
    rows = measure(model, args.methods, SHARES, batches, args.rounds)
    print(f"\n{HEADER}\n{'-' * len(HEADER)}\n" + "\n".join(map(line, rows)))
    print(
        "share: of the unpatched multiply-adds, reduction's own included (a grid can only come near what was asked)\n"
        "tokens: that reach the head, mean over the images; difference: in points, on the same images, with standard "
        f"error\nimg/s, speed-up: medians of {args.rounds} rounds, batch {BATCH}, CPU threads: {args.threads}"
    )

    written = [args.output / "table.csv", args.output / "curve.png", args.output / "speed.png"]
    write_results(written[0], rows, COLUMNS, environment("cpu"))
    title = f"scikit-learn digits, {len(data.test_labels)} test images; bars: standard error of the paired difference"
    common = {"error": "diff_top1_se", "ylabel": "test accuracy (%)", "title": title}
    plot_curves(rows, written[1], "gmacs", "top1", xlabel="GMACs per image", **common)
    plot_curves(rows, written[2], "infer_samples_per_sec", "top1", xlabel="images per second", **common)
    for method in MAPPED:
        written.append(args.output / f"token_maps_{method}.png")
        draw_maps(model, method, data, written[-1])

    print("\n" + "\n".join(summary(rows)))
    print(
        "\nSegmentation: scenes of digits, a class for every pixel, the same methods without retraining.\n", flush=True
    )
    written += demo_scenes.run(args.output, args.methods, rounds=args.rounds)
    print(f"\nWritten in {time.perf_counter() - start:.0f} s:")
    print("\n".join(f"  {path}" for path in written))


if __name__ == "__main__":
    main()
