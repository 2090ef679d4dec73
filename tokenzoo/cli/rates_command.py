"""`tokenzoo rates`: how many tokens each block prunes and merges under DiffRate, learned for a budget."""

from __future__ import annotations

import argparse

from ..tuning import learn_rates
from .common import add_model_arguments, say
from .tune_command import add_image_arguments, load

HELP = "learn a schedule for diffrate on images of your own, the weights frozen, and write it as a recipe"
EXAMPLE = (
    "tokenzoo rates --model deit_small_patch16_224 --pretrained --data-dir imagenet --split train --flops 0.6 "
    "--max-images 4096 --output diffrate.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, images, budget, and how the rates are learned."""
    add_model_arguments(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--flops", type=float, required=True, help="share of the unpatched multiply-adds to spend")
    group.add_argument("--epochs", type=int, default=3, help="passes over the images")
    group.add_argument("--lr", type=float, default=0.01, help="learning rate of the rates at the start")
    group.add_argument("--min-lr", type=float, default=0.001, help="at the end")
    group.add_argument("--weight", type=float, default=100.0, help="of the squared distance from --flops")
    group.add_argument("--granularity", type=int, default=4, help="distance between candidate counts")
    group.add_argument("--output", required=True, help="file for the recipe (YAML)")
    add_image_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Learns, writes the recipe, and says what it costs."""
    model, images, labels = load(args)
    found = learn_rates(
        model,
        images,
        labels,
        flops=args.flops,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        min_lr=args.min_lr,
        weight=args.weight,
        granularity=args.granularity,
        seed=args.seed,
    )
    found.save(args.output)
    for epoch, loss in enumerate(found.losses):
        say(f"epoch {epoch}  loss {loss:.4f}")
    say(f"learned {found.learned:.1%} of the multiply-adds, fitted to {found.share:.1%}: {args.output}")
    return 0
