"""`tokenzoo segment eval`: mIoU of several methods and strengths over the same images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation.classification import Estimate
from ..evaluation.distributed import World, join
from ..evaluation.environment import environment
from ..evaluation.results import check_file, number, result_line, table, write_results
from ..evaluation.segmentation.data import KINDS, open_dataset
from ..evaluation.segmentation.evaluate import evaluate_segmentation
from ..evaluation.segmentation.results import SEGMENT_COLUMNS, SegmentationReport
from ..evaluation.timing import Spread
from .common import add_method_arguments, add_precision_arguments, argv_of, precision_of, runs_of, say, say_scans
from .segment_common import add_checkpoint_arguments, add_inference_arguments, inference_of, load_checkpoint

HELP = "mIoU of a segmentation model, unpatched and with methods, over the same images"
EXAMPLE = (
    "tokenzoo segment eval --checkpoint model.safetensors --data-dir camvid/ --split test --ignore 11 --method tome r=8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, data, methods, inference, and what to write."""
    add_checkpoint_arguments(parser)
    add_method_arguments(parser)
    add_precision_arguments(parser)
    add_inference_arguments(parser)
    data = parser.add_argument_group("images")
    data.add_argument("--data-dir", required=True, help="root of the data set, or a folder with images/ and masks/")
    data.add_argument("--dataset", choices=tuple(KINDS), default="folder", help="whose layout and labels")
    data.add_argument("--split", default=None, help="by default the one that results are reported on")
    data.add_argument(
        "--ignore", type=int, nargs="+", default=[], help="values of the masks that do not count, besides 255 (folder)"
    )
    data.add_argument("--zero-label", action="store_true", help="value 0 does not count, classes start at 1 (folder)")
    data.add_argument("--classes", default=None, help="text file with one class name a line, or JSON list (folder)")
    data.add_argument(
        "--skip-broken", action="store_true", help="leave images out that cannot be used and name them at the end"
    )
    data.add_argument("--workers", "-j", type=int, default=0, help="processes that decode, 0 for none")
    group = parser.add_argument_group("measurement")
    group.add_argument("--num-bench-iter", type=int, default=10, help="rounds of timing on the same crops, 0 for none")
    group.add_argument("--bench-batch-size", type=int, default=1, help="crops a step of the timing")
    group.add_argument("--resamples", type=int, default=1000, help="bootstrap draws for the standard errors")
    parser.add_argument("--results-file", default=None, help="file.csv or file.json")
    parser.add_argument(
        "--state",
        default=None,
        metavar="FOLDER",
        help="keeps counts of the images that are done, so that the same command goes on where it was ended and new "
        "methods can be added; by default <results file>.state, none without a results file",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table, IoU by class and a --result line, writes the results file."""
    if args.results_file:
        check_file(args.results_file, (".csv", ".json"), "--results-file")
    if args.num_bench_iter < 0 or args.bench_batch_size < 1 or args.resamples < 2:
        raise ValueError(
            "--num-bench-iter cannot be negative, --bench-batch-size is at least 1, --resamples at least 2"
        )
    with join(args.device) as world:
        return _evaluate(args, world)


def _evaluate(args: argparse.Namespace, world: World) -> int:
    args.device = str(world.device)
    runs, precision = runs_of(args), precision_of(args)
    own = {"ignore": args.ignore, "zero_label": args.zero_label, "classes": args.classes}
    dataset = open_dataset(args.data_dir, args.dataset, args.split, **{k: v for k, v in own.items() if v})
    model = load_checkpoint(args)
    report = evaluate_segmentation(
        model,
        runs,
        dataset,
        inference=inference_of(args, model, args.dataset),
        precision=precision,
        state=args.state or (f"{args.results_file}.state" if args.results_file else None),
        skip_broken=args.skip_broken,
        workers=args.workers,
        speed_rounds=args.num_bench_iter,
        speed_batch=args.bench_batch_size,
        resamples=args.resamples,
        seed=args.seed,
        progress=False if args.no_progress else None,
        world=world,
    )
    if not world.main:
        return 0
    common = {
        "model": Path(args.checkpoint).name,
        "data": args.dataset if args.dataset != "folder" else Path(args.data_dir).resolve().name,
        "split": args.split or "",
        "precision": str(precision),
    }
    rows = [{**common, **row} for row in report.rows()]
    record = environment(args.device, argv_of(args))
    record["processes"] = world.size
    _print(report, common, record)
    say_scans(model, report.crop)
    if args.results_file:
        record["skipped"] = [name for name, _ in report.skipped]
        write_results(args.results_file, rows, SEGMENT_COLUMNS, record)
    say(result_line(rows))
    return 0


def _print(report: SegmentationReport, common: dict, record: dict) -> None:
    first, crop = report.results[0], f"{report.crop[0]}x{report.crop[1]}"
    split = f" {common['split']}" if common["split"] else ""
    say(
        f"{common['model']} on {common['data']}{split}, {first.n_images} images, {report.inference}, "
        f"{common['precision']}, {record['device']}, threads {record['threads']}"
    )
    if report.resumed:
        say(f"{report.resumed} images were counted already")
    header = ("method", "mIoU", "difference", "mAcc", "pixel acc.", "difference", "agreement", "tokens")
    header = (*header, "GMACs", "encoder", "decoder")
    if first.speed is not None:
        header = (*header, "img/s", "speed-up", "(quartiles)")
    body = []
    for r in report.results:
        macs = r.macs
        row = [
            r.label,
            _with_error(r.miou),
            "-" if r.diff_miou is None else _with_error(r.diff_miou, sign=True),
            number(100 * r.scores.macc),
            number(100 * r.scores.aacc),
            "-" if r.diff_pixel_acc is None else _with_error(r.diff_pixel_acc, sign=True),
            number(r.agreement),
            number(macs and macs.tokens_out, 1),
            number(macs and (macs.encoder + macs.decoder) / 1e9, 3),
            number(macs and macs.encoder / 1e9, 3),
            number(macs and macs.decoder / 1e9, 3),
        ]
        if r.speed is not None:
            ratio = Spread.of(r.speed.speedups)
            row += [number(r.img_per_sec, 1), number(ratio.median), f"{number(ratio.q1)} to {number(ratio.q3)}"]
        body.append(row)
    say(table(body, header))
    say(
        "percent; differences to the unpatched model on the same images: of the mIoU of the whole set, and mean over "
        "images of the pixel accuracy; ± standard errors over images (bootstrap for mIoU)"
    )
    speed = f", img/s of {first.speed.batch_size} at a time ({first.speed.clock})" if first.speed is not None else ""
    say(f"GMACs of one crop of {crop}{speed}")
    names = [r.label for r in report.results]
    by_class = [
        (name, *(number(100 * r.scores.iou[k]) for r in report.results)) for k, name in enumerate(report.classes)
    ]
    say(table(by_class, ("IoU by class", *names)))
    if report.skipped:
        say(f"broken images skipped: {len(report.skipped)}")
        for name, reason in report.skipped:
            say(f"  {name} ({reason})")


def _with_error(value: Estimate, sign: bool = False) -> str:
    return f"{number(value.mean, sign=sign)} ± {number(value.se)}"
