"""The flags of `tokenzoo train`; names are timm's where timm has them."""

from __future__ import annotations

import argparse

import torch

from ..core.registry import list_methods


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds every flag, in groups."""
    for add in (_data, _model, _method, _optimizer, _augmentation, _run, _output):
        add(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--data-dir", default=None, help="folder with train/ and val/ of class folders; root of shards or caches")
    add("--dataset", default="", help="timm data set name with its prefix: hfds/..., wds/..., tfds/...; empty: folders")
    add("--train-split", default="train", help="subfolder, tar file, split, or shards 'x-{0000..0009}.tar|5000'")
    add("--val-split", default="validation", help="the same to evaluate on; '' for no evaluation")
    add("--train-num-samples", type=int, default=None, help="pictures an epoch of a stream has")
    add("--class-map", default=None, help="text file, one class folder a line; line number = class index")
    add("--num-classes", type=int, default=None, help="by default as many as there are class folders")
    add("--batch-size", "-b", type=int, default=128, help="pictures a process and step")
    add("--validation-batch-size", "-vb", type=int, default=None)
    add("--workers", "-j", type=int, default=4, help="processes that decode, 0 for none")
    add("--shuffle-buffer", type=int, default=8192, help="pictures that a stream shuffles among")


def _model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", "-m", default=None, help="timm model name")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="passed to timm.create_model")
    add("--pretrained", action="store_true", help="timm's own weights (needs network or a warm cache)")
    add("--initial-checkpoint", default="", help="weights to start from (.pth or .safetensors)")
    add("--img-size", type=int, nargs="+", default=None, help="one side or height width")
    add("--drop", type=float, default=0.0, help="dropout")
    add("--drop-path", type=float, default=0.0, help="stochastic depth")
    add("--registers", type=int, default=0, help="register tokens to add to a ViT without any; the teacher has none")
    add(
        "--train-only", nargs="+", default=None, metavar="NAME",
        help="beginnings of the names of parameters that learn, such as reg_token blocks.11.; a method's own always do",
    )  # fmt: skip
    add("--grad-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    add("--channels-last", action="store_true")
    add("--torchcompile", action="store_true")
    add("--fsdp", action="store_true", help="part weights, gradients and moments among the processes (FSDP2)")
    add("--amp", action="store_true", help="run under autocast")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="float16 scales the loss")
    add("--model-ema", action="store_true", help="average the weights; the average is what is evaluated and saved")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--model-ema-warmup", action="store_true", help="let the decay rise from 0")


def _method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("token reduction, and what it brings into training")
    add = group.add_argument
    add(
        "--import", dest="imports", nargs="+", default=[], metavar="MODULE",
        help="modules or Python files that register methods or backbones of your own",
    )  # fmt: skip
    add("--method", default=None, help=f"one of {', '.join(list_methods())}, or a recipe.yaml; none trains unpatched")
    add("--method-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="options of the method")
    add("--flops", type=float, default=None, help="share of the unpatched multiply-adds to solve for")
    add("--shrink-start-epoch", type=int, default=0, help="epochs at keep rate 1 (EViT)")
    add("--shrink-epochs", type=int, default=0, help="epochs of the cosine down to the keep rate; 0 starts there")
    add("--consistency", type=float, default=0.0, help="weight of the consistency with a weaker reduction (MCTF: 3)")
    add(
        "--consistency-r", type=float, default=None, help="the weaker pass draws its r below this; half of r by default"
    )
    add("--consistency-threshold", type=float, default=0.4, help="images count whose confidence exceeds this")
    add("--consistency-task", type=float, default=1.0, help="weight of the weaker pass's own cross-entropy")
    add("--kd-model-name", default=None, help="teacher: 'unpatched' for the model before patching, or a timm model")
    add("--kd-checkpoint", default="", help="weights of the teacher")
    add("--kd-weight", type=float, default=0.5, help="weight of the Kullback-Leibler divergence from the teacher")
    add("--kd-temperature", type=float, default=1.0)
    add("--kd-token-weight", type=float, default=0.0, help="weight of the distance from the teacher's tokens (0.5)")
    add(
        "--kd-token-loss", choices=("squares", "cosine_squares"), default="squares",
        help="distance of tokens: squared, or 1 minus the cosine besides",
    )  # fmt: skip
    add("--kd-views", type=int, default=1, help="shifted and flipped views that the teacher's tokens are averaged over")
    add("--kd-shift", type=float, default=0.15, help="largest shift of these views, as a share of the patch grid")
    add("--task-weight", type=float, default=1.0, help="weight of the cross-entropy; 0 learns without labels")
    add(
        "--kd-token-scores", action="store_true",
        help="compare what a second classifier says of the tokens, not the tokens themselves (LV-ViT)",
    )  # fmt: skip
    add("--new-lr-scale", type=float, default=1.0, help="learning rate of a method's own parameters, as a factor")
    add("--freeze-epochs", type=int, default=0, help="epochs in which only a method's own parameters learn")


def _optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer and schedule")
    add = group.add_argument
    add("--opt", default="adamw", help="timm's name")
    add("--opt-eps", type=float, default=None)
    add("--opt-betas", type=float, nargs="+", default=None)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--layer-decay", type=float, default=None, help="factor of the learning rate from layer to layer")
    add("--clip-grad", type=float, default=None)
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm")
    add("--lr", type=float, default=None, help="by default --lr-base times batch over --lr-base-size")
    add("--lr-base", type=float, default=2e-5)
    add("--lr-base-size", type=int, default=512)
    add("--epochs", type=int, default=30)
    add("--sched", default="cosine", help="timm's name")
    add("--sched-on-updates", action="store_true", help="step the schedule with every update, not every epoch")
    add("--min-lr", type=float, default=0.0)
    add("--warmup-lr", type=float, default=1e-6)
    add("--warmup-epochs", type=int, default=0)
    add("--warmup-prefix", action="store_true", help="warm-up epochs come on top")
    add("--cooldown-epochs", type=int, default=0)
    add("--decay-epochs", type=float, default=30)
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270])
    add("--decay-rate", type=float, default=0.1)
    add("--grad-accum-steps", type=int, default=1, help="batches an update")


def _augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--no-aug", action="store_true")
    add("--train-crop-mode", default=None, help="timm's name: rrc, rkrc, rkrr")
    add("--scale", type=float, nargs=2, default=None, help="share of the area that a random crop covers")
    add("--ratio", type=float, nargs=2, default=None, help="aspect of a random crop")
    add("--hflip", type=float, default=0.5)
    add("--vflip", type=float, default=0.0)
    add("--color-jitter", type=float, default=0.4)
    add("--aa", default=None, help="timm's auto-augment string")
    add("--aug-repeats", type=int, default=0, help="times that a picture comes up in an epoch, of a third as many")
    add("--reprob", type=float, default=0.0, help="random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel")
    add("--recount", type=int, default=1)
    add("--mixup", type=float, default=0.0)
    add("--cutmix", type=float, default=0.0)
    add("--cutmix-minmax", type=float, nargs=2, default=None)
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")
    add("--mixup-off-epoch", type=int, default=0, help="no mixing from this epoch on; 0 mixes to the end")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--train-interpolation", default="random")
    add("--interpolation", default=None, help="of evaluation")
    add("--crop-pct", type=float, default=None)
    add("--mean", type=float, nargs="+", default=None)
    add("--std", type=float, nargs="+", default=None)


def _run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=None, help="CPU threads")
    add("--seed", type=int, default=42)
    add("--deterministic", action="store_true", help="deterministic kernels only")
    add("--resume", action="store_true", help="go on from the newest sound checkpoint in the output folder")
    add("--recovery-interval", type=int, default=0, help="updates between checkpoints inside an epoch, 0 for none")
    add("--checkpoint-hist", type=int, default=2, help="checkpoints to keep, at least 2")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--eval-unpatched", action="store_true", help="evaluate the weights without reduction, too")
    add("--log-interval", type=int, default=50, help="updates between looks at the loss on an accelerator")


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--output", default=None, help="folder for args.yaml, recipe.json, summary.csv, curve.png, checkpoints, weights"
    )
    add("--log-tensorboard", action="store_true")
    add("--log-wandb", action="store_true")
    add("--wandb-project", default="tokenzoo")
