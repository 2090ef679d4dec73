"""`tokenzoo eval`: accuracy of several methods and strengths over the same images."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ..evaluation.broken import Broken
from ..evaluation.classification import Accuracy, Estimate, evaluate
from ..evaluation.data import open_pictures
from ..evaluation.distributed import World, join
from ..evaluation.environment import environment
from ..evaluation.loading import PictureLoader, data_config
from ..evaluation.results import EVAL_COLUMNS, check_file, number, result_line, table, write_results
from ..evaluation.runs import gives_map
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

_log = logging.getLogger(__name__)

HELP = "top-1 and top-5 of a model, unpatched and with methods, over the same images"
EXAMPLE = (
    "tokenzoo eval --model vit_tiny_patch16_224 --num-classes 10 --data-dir images/ --method tome r=13 "
    "--method evit keep_rate=0.7"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of timm's validate.py, and --method."""
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_precision_arguments(parser)
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data-dir", default=None, help="folder with one subfolder per class, or a tar file of such folders"
    )
    data.add_argument("--dataset", default="", help="timm data set name with its prefix: hfds/..., wds/..., torch/...")
    data.add_argument("--split", default="validation", help="split; a subfolder of that name is used if there is one")
    data.add_argument(
        "--class-map", default=None, help="text file, one class folder per line; line number = class index"
    )
    data.add_argument("--skip-broken", action="store_true", help="leave unreadable images out and name them at the end")
    data.add_argument("--batch-size", "-b", type=int, default=64, help="halved when memory runs out")
    data.add_argument("--workers", "-j", type=int, default=2, help="processes that decode, 0 for none")
    data.add_argument("--crop-pct", type=float, default=None)
    data.add_argument("--crop-mode", choices=("center", "squash", "border"), default=None)
    data.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"))
    data.add_argument("--mean", type=float, nargs="+", default=None)
    data.add_argument("--std", type=float, nargs="+", default=None)
    parser.add_argument("--results-file", default=None, help="file.csv or file.json")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table and timm's --result line, writes the results file."""
    if args.results_file:
        check_file(args.results_file, (".csv", ".json"), "--results-file")
    if args.data_dir is None and not args.dataset:
        raise ValueError("no images named; give --data-dir (a folder with one subfolder per class) or --dataset")
    with join(args.device) as world:
        return _evaluate(args, world)


def _evaluate(args: argparse.Namespace, world: World) -> int:
    args.device = str(world.device)
    runs, precision = runs_of(args), precision_of(args)
    pictures = open_pictures(args.data_dir, args.dataset, args.split, args.class_map)
    model = load_model(args)
    config = data_config(model, args.img_size, args.crop_pct, args.crop_mode, args.interpolation, args.mean, args.std)
    if not gives_map(model, config["input_size"]):
        check_classes(pictures.num_classes, model.num_classes, args.class_map)
    loader = PictureLoader(pictures, config, args.batch_size, args.workers, args.skip_broken, world)
    results = evaluate(
        model,
        runs,
        loader,
        input_size=config["input_size"],
        precision=precision,
        progress=False if args.no_progress else None,
        world=world,
    )
    skipped = [broken for part in world.gather(loader.skipped) for broken in part]
    if not world.main:
        return 0
    height, width = config["input_size"][1:]
    common = {
        "model": args.model,
        "img_size": height if height == width else f"{height}x{width}",
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "n_skipped": len(skipped),
        "precision": str(precision),
    }
    rows = [{**common, **r.row()} for r in results]
    _print(args, results, common, skipped)
    say_scans(model, (height, width))
    if args.results_file:
        record = environment(args.device, argv_of(args))
        record["processes"] = world.size
        record["skipped"] = ["/".join(Path(name).parts[-2:]) for name, _ in skipped]
        write_results(args.results_file, rows, EVAL_COLUMNS, record)
    say(result_line(rows))
    return 0


def check_classes(found: int | None, served: int, class_map: str | None) -> None:
    """Refuses more classes than the model has, and says how fewer are taken."""
    if found is not None and found > served:
        raise ValueError(
            f"the images have {found} classes, the model answers with {served}; give --num-classes {found} with "
            "weights to match, or a --class-map"
        )
    if found is not None and found < served and class_map is None:
        _log.warning(
            "the images have %d classes, the model %d: folders in sorted order are taken as its classes 0 to %d; "
            "give a --class-map if they are others",
            found,
            served,
            found - 1,
        )


def _print(args: argparse.Namespace, results: list[Accuracy], common: dict[str, Any], skipped: list[Broken]) -> None:
    say(
        f"{args.model} at {common['img_size']}, {results[0].n_images} images, {common['precision']}; percent with "
        "standard errors, differences to the unpatched model on the same images"
    )
    header = ("method", "top-1", "difference", "top-5", "agreement", "tokens", "GMACs", "attention")
    body = [
        (
            r.label,
            _with_error(r.top1),
            _with_error(r.diff_top1, sign=True),
            _with_error(r.top5),
            number(r.agreement),
            number(r.tokens_out, 1),
            number(r.gmacs),
            r.attn_impl,
        )
        for r in results
    ]
    say(table(body, header))
    if skipped:
        say(f"broken images skipped: {len(skipped)}")
        for name, reason in skipped:
            say(f"  {name} ({reason})")


def _with_error(estimate: Estimate | None, sign: bool = False) -> str:
    if estimate is None:
        return "-"
    return f"{number(estimate.mean, sign=sign)} ± {number(estimate.se)}"
