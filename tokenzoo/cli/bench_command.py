"""`tokenzoo bench`: speed of several methods and strengths, measured round robin with the unpatched model."""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from ..evaluation.data import Pictures
from ..evaluation.environment import environment
from ..evaluation.loading import data_config
from ..evaluation.plots import plot_speed, require_matplotlib
from ..evaluation.results import BENCH_COLUMNS, check_file, number, result_line, table, write_results
from ..evaluation.runs import image_size
from ..evaluation.throughput import Speed, bench
from ..evaluation.timing import Spread
from .common import (
    add_method_arguments,
    add_model_arguments,
    add_precision_arguments,
    argv_of,
    load_model,
    precision_of,
    runs_of,
    say,
    say_scans,
)
from .tune_images import Files, load_images

HELP = "throughput and batch-1 latency of a model, unpatched and with methods, measured round robin"
EXAMPLE = (
    "tokenzoo bench --model vit_tiny_patch16_224 --threads 1 --batch-size 2 --num-bench-iter 5 --method tome r=13 "
    "--method evit keep_rate=0.7"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of timm's benchmark.py, and --method."""
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_precision_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch-size", "-b", type=int, default=8, help="images per step; halved when memory runs out")
    group.add_argument("--num-warm-iter", type=int, default=3, help="steps of each model before the timing")
    group.add_argument("--num-bench-iter", type=int, default=20, help="rounds; every model is timed once a round")
    group.add_argument("--no-latency", action="store_true", help="leave the batch-1 latency out")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        default=None,
        metavar="BACKEND",
        help="time torch.compile'd models",
    )
    data = parser.add_argument_group("images, for methods whose counts follow them; random ones without")
    data.add_argument("--data-dir", default=None, help="any folder of images; every round takes the next batch")
    data.add_argument("--max-images", type=int, default=32, help="draw this many of them, at least one batch")
    data.add_argument("--mean", type=float, nargs="+", default=None, help="of the channels; the model's by default")
    data.add_argument("--std", type=float, nargs="+", default=None)
    parser.add_argument("--results-file", default=None, help="file.csv or file.json")
    parser.add_argument("--plot", default=None, metavar="FILE.png", help="speed-up against the share of multiply-adds")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and timm's --result line, writes the results file and the plot."""
    if args.results_file:
        check_file(args.results_file, (".csv", ".json"), "--results-file")
    if args.plot:
        check_file(args.plot, (".png",), "--plot")
        require_matplotlib()
    runs, precision = runs_of(args), precision_of(args)
    model = load_model(args)
    results = bench(
        model,
        runs,
        batch_size=args.batch_size,
        rounds=args.num_bench_iter,
        warmup=args.num_warm_iter,
        latency=not args.no_latency,
        input_size=image_size(model, args.img_size),
        precision=precision,
        compiler=args.torchcompile,
        seed=args.seed,
        images=images_of(args, model),
        progress=False if args.no_progress else None,
    )
    record = environment(args.device, argv_of(args))
    rows = [{"model": args.model, **r.row()} for r in results]
    title = setting(args.model, results[0], record)
    say(title)
    _print(results)
    say_scans(model, results[0].input_size[1:])
    if args.results_file:
        write_results(args.results_file, rows, BENCH_COLUMNS, record)
    if args.plot:
        plot_speed(results, args.plot, title)
    say(result_line(rows))
    return 0


def images_of(args: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """A seeded draw of the images that --data-dir names [M, C, H, W]; None without."""
    if args.data_dir is None:
        return None
    config = data_config(model, args.img_size, mean=args.mean, std=args.std)
    pictures = Pictures(Files(args.data_dir))
    return load_images(pictures, config, args.max_images, args.seed, args.batch_size, workers=0, skip_broken=False)[0]


def setting(model: str, first: Speed, record: dict) -> str:
    """What was measured, in one line."""
    height, width = first.input_size[1:]
    threads = f", threads {record['threads']}" if not first.clock.endswith("synchronized") else ""
    how = f"torch.compile {first.compiled}" if first.compiled else "eager"
    return (
        f"{model} at {height}x{width}, batch {first.batch_size}, {how}, {first.precision}, {record['device']}{threads}"
    )


def _print(results: list[Speed]) -> None:
    header = ("method", "img/s", "ms per batch", "(quartiles)", "ms for one", "tokens", "GMACs", "GMAC ratio")
    header = (*header, "speed-up", "(quartiles)", "speed-up / GMAC ratio")
    if results[0].peak_memory_mb is not None:
        header = (*header, "peak MiB")
    body = []
    for r in results:
        step, ratio = Spread.of(r.step_times), Spread.of(r.speedups)
        row = [
            r.label,
            number(r.batch_size / step.median, 1),
            number(1e3 * step.median, 1),
            f"{number(1e3 * step.q1, 1)} to {number(1e3 * step.q3, 1)}",
            number(1e3 * Spread.of(r.latency_times).median, 1) if r.latency_times else "-",
            number(r.tokens_out, 1),
            number(r.gmacs),
            number(r.gmac_ratio),
            number(ratio.median),
            f"{number(ratio.q1)} to {number(ratio.q3)}",
            number(r.speedup_per_gmac_ratio),
        ]
        body.append(row if r.peak_memory_mb is None else [*row, number(r.peak_memory_mb, 0)])
    say(table(body, header))
    say(
        f"medians of {len(results[0].step_times)} rounds, {results[0].clock}; speed-up = unpatched / own time, by round"
    )
