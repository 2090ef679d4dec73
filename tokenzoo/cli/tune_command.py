"""`tokenzoo tune`: which method, how strong, in which blocks, for a model on a folder of images."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from ..evaluation.data import Pictures, open_pictures
from ..evaluation.distributed import World, join
from ..evaluation.environment import environment
from ..evaluation.loading import data_config
from ..evaluation.runs import gives_map
from ..tuning import tune
from ..tuning.advise import read_budgets
from ..tuning.candidates import chosen_methods
from ..tuning.plot import plot_tuning
from .common import add_model_arguments, add_precision_arguments, argv_of, load_model, precision_of, say
from .eval_command import check_classes
from .tune_images import Files, load_images

HELP = "search for the method, its strength and its blocks for a model, on images of your own"
EXAMPLE = (
    "tokenzoo tune --model vit_tiny_patch16_224 --num-classes 10 --data-dir images/ --flops 0.6 --budget-minutes 30 "
    "--output tuned/"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, budget, what takes part, and where the recipes go."""
    add_model_arguments(parser)
    add_precision_arguments(parser)
    group = parser.add_argument_group("search")
    cost = group.add_mutually_exclusive_group(required=True)
    cost.add_argument("--flops", type=float, nargs="+", help="share of the unpatched multiply-adds to spend at most")
    cost.add_argument("--latency", type=float, nargs="+", help="the same of the measured time of a batch")
    group.add_argument("--latency-batch", type=int, default=1, help="images of that batch")
    group.add_argument(
        "--methods", nargs="+", default=None, metavar="NAME", help="all that need no training by default"
    )
    group.add_argument("--pairs", action="store_true", help="also pairs of the best methods")
    group.add_argument("--refine", type=int, default=24, help="changes of single blocks to try on the best recipes")
    group.add_argument("--budget-minutes", type=float, default=None, help="report the best so far after this time")
    group.add_argument("--held-out", type=float, default=0.5, help="share of the images that only the report looks at")
    group.add_argument("--output", required=True, help="folder for recipes, table, plot and the state to resume from")
    add_image_arguments(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and how they become tensors."""
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data-dir", default=None, help="folder with one subfolder per class, or a tar file of such ones"
    )
    data.add_argument("--dataset", default="", help="timm data set name with its prefix: hfds/..., wds/..., torch/...")
    data.add_argument("--split", default="validation", help="split; a subfolder of that name is used if there is one")
    data.add_argument("--class-map", default=None, help="text file, one class folder per line; its number is the index")
    data.add_argument(
        "--no-labels", action="store_true", help="any folder of images, by agreement with the model as is"
    )
    data.add_argument("--max-images", type=int, default=512, help="draw this many of them")
    data.add_argument("--skip-broken", action="store_true", help="leave unreadable images out")
    data.add_argument("--batch-size", "-b", type=int, default=64, help="halved when memory runs out")
    data.add_argument("--workers", "-j", type=int, default=2, help="processes that decode, 0 for none")
    data.add_argument("--crop-pct", type=float, default=None)
    data.add_argument("--crop-mode", choices=("center", "squash", "border"), default=None)
    data.add_argument("--interpolation", choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"))
    data.add_argument("--mean", type=float, nargs="+", default=None)
    data.add_argument("--std", type=float, nargs="+", default=None)


def load(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor | None]:
    """The model of the arguments, the images that were drawn, and their class indices, None without labels."""
    if args.data_dir is None and not args.dataset:
        raise ValueError("no images named; give --data-dir (a folder with one subfolder per class) or --dataset")
    if args.no_labels and (args.dataset or args.class_map):
        raise ValueError("--no-labels reads a plain folder; leave --dataset and --class-map out")
    pictures = _pictures(args)
    model = load_model(args)
    config = data_config(model, args.img_size, args.crop_pct, args.crop_mode, args.interpolation, args.mean, args.std)
    labelled = not args.no_labels and not gives_map(model, config["input_size"])
    if labelled:
        check_classes(pictures.num_classes, model.num_classes, args.class_map)
    images, labels = load_images(
        pictures, config, args.max_images, args.seed, args.batch_size, args.workers, args.skip_broken
    )
    return model, images, labels if labelled else None


def run(args: argparse.Namespace) -> int:
    """Searches, prints the table, writes recipes, results and the plot."""
    methods = None if args.methods is None else chosen_methods(args.methods)
    read_budgets(args.flops, args.latency)
    with join(args.device) as world:
        args.device = str(world.device)
        return _search(args, methods, world)


def _search(args: argparse.Namespace, methods: list[str] | None, world: World) -> int:
    model, images, labels = load(args)
    output = Path(args.output)
    if world.main:
        output.mkdir(parents=True, exist_ok=True)
    found = tune(
        model,
        images,
        flops=args.flops,
        latency=args.latency,
        labels=labels,
        methods=methods,
        pairs=args.pairs,
        refine=args.refine,
        held_out=args.held_out,
        seed=args.seed,
        budget_minutes=args.budget_minutes,
        state=output / "state.jsonl",
        batch_size=args.batch_size,
        latency_batch=args.latency_batch,
        precision=precision_of(args),
        progress=False if args.no_progress else None,
        world=world,
    )
    if not world.main:
        return 0
    say(str(found))
    files = found.save(output, environment(args.device, argv_of(args)))
    if find_spec("matplotlib") is None:
        say("no plot, since matplotlib is missing; pip install 'tokenzoo[plot]'")
    else:
        files.append(output / "tune.png")
        plot_tuning(found, files[-1], f"{args.model}, {len(found.split.held_out)} held-out images")
    say("\n".join(str(file) for file in files if file.parent == output))
    return 0


def _pictures(args: argparse.Namespace) -> Pictures:
    if args.no_labels:
        return Pictures(Files(args.data_dir))
    return open_pictures(args.data_dir, args.dataset, args.split, args.class_map)
