"""Accuracy of every method on real pictures, off the shelf and after fine-tuning: tables and curves.

    python benchmarks/accuracy/accuracy_curves.py free --config benchmarks/models/tin100_vit.yaml --data-dir tin100 \
        --output benchmarks/accuracy/tin100_free.csv
    python benchmarks/accuracy/accuracy_curves.py tuned --config benchmarks/models/tin100_vit.yaml --data-dir tin100 \
        --methods evit tome mctf ats pool --runs runs \
        --output benchmarks/accuracy/tin100_tuned.csv --train --epochs 1 --lr 2e-4
    python benchmarks/accuracy/plot_accuracy.py benchmarks/accuracy/*_free.csv benchmarks/accuracy/*_tuned.csv

The configuration is one of `tokenzoo train` and names a model with its weights; DATA_DIR holds train/ and val/. `free`
takes every method at four strengths, shares of the unpatched multiply-adds. `tuned` trains one model a method with the
options behind its own, all from the same weights with the same budget, and the unpatched model beside them; runs that
are complete already are only evaluated. Differences are paired, picture by picture.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plot_accuracy import plot  # beside this script
from torch import Tensor, nn

import tokenzoo
from tokenzoo.evaluation import PictureLoader, data_config, environment, estimate, open_pictures, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.runs import forward_counted
from tokenzoo.training.build import build
from tokenzoo.training.options import parse_options

SHARES = (0.85, 0.7, 0.6, 0.5)
# where a method cannot go as far down, it gets strengths above its floor
SPARE = (0.95, 0.9, 0.8, 0.75, 0.65)
FREE = ("setting", "method", "share", "top1", "top1_se", "diff", "diff_se", "tokens_out", "gmacs", "images")
TUNED = ("setting", "method", "share", "top1", "top1_se", "diff", "diff_se", "free_top1", "diff_free", "diff_free_se",
         "diff_control", "diff_control_se", "tokens_out", "gmacs", "images")  # fmt: skip
COUNTED = 16  # pictures that counts are averaged over where these depend on the picture


class Result(NamedTuple):
    """What a model answered: right or wrong for each picture [n], tokens that reach its head, 1e9 multiply-adds."""

    hits: Tensor
    tokens: float
    gmacs: float


class Pictures(NamedTuple):
    """All pictures of a split [n, C, H, W] and their classes [n]."""

    images: Tensor
    targets: Tensor


def options(args: argparse.Namespace, *more: str) -> argparse.Namespace:
    """Options of `tokenzoo train` from the configuration."""
    return parse_options(["-c", args.config, "--data-dir", args.data_dir, "--output", "unused", *more])


def load(given: argparse.Namespace) -> nn.Module:
    """The model with its weights, in eval mode."""
    return build(given, given.num_classes, torch.device("cpu")).model.eval()


def read(model: nn.Module, given: argparse.Namespace) -> Pictures:
    """The evaluation split as the model takes it."""
    config = data_config(model, given.img_size, given.crop_pct, None, given.interpolation, given.mean, given.std)
    source = open_pictures(given.data_dir, "", given.val_split, given.class_map)
    batches = list(PictureLoader(source, config, 100))
    return Pictures(torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches]))


@torch.inference_mode()
def answer(model: nn.Module, pictures: Pictures) -> Result:
    """Runs a model over all pictures."""
    hits, tokens = [], []
    for images, targets in zip(pictures.images.split(100), pictures.targets.split(100)):
        logits, count = forward_counted(model, images)
        hits.append(logits.argmax(1) == targets)
        tokens.append(count)
    report = tokenzoo.report(model, pictures.images.shape[2:])
    macs = float(report.total)
    if report.data_dependent:
        some = pictures.images[:: len(pictures.images) // COUNTED][:COUNTED]
        macs = sum(tokenzoo.count_macs(model, image=image[None]).total for image in some) / len(some)
    return Result(torch.cat(hits), torch.cat(tokens).double().mean().item(), macs / 1e9)


def row(setting: str, method: str, share: float, found: Result, base: Result) -> dict[str, Any]:
    """One row of a table."""
    top1, diff = estimate(found.hits), estimate(found.hits.double() - base.hits.double())
    return {
        "setting": setting, "method": method, "share": round(share, 4), "top1": round(top1.mean, 2),
        "top1_se": round(top1.se, 2), "diff": round(diff.mean, 2), "diff_se": round(diff.se, 2),
        "tokens_out": round(found.tokens, 1), "gmacs": round(found.gmacs, 4), "images": len(found.hits),
    }  # fmt: skip


def strengths(model: nn.Module) -> list[tuple[str, Any, float]]:
    """(method, recipe, share asked for): every method that works on the model, four strengths that it can reach."""
    found = []
    for name in tokenzoo.list_methods():
        recipe: Any = name
        if tokenzoo.create_method(name).closes_span:  # rebuilds what clustering took away
            recipe = [{"method": "cluster"}, {"method": name, "layers": "norm"}]
        own: list[tuple[str, Any, float]] = []
        reached: set[int] = set()
        for share in (*SHARES, *SPARE):
            trial = copy.deepcopy(model)
            try:
                tokenzoo.patch_model(trial, recipe, flops=share)
            except (ValueError, TypeError) as error:
                print(f"left out: {name} at {share}: {error}", flush=True)
                if "cannot be reached" not in str(error):
                    break
                continue
            total = tokenzoo.report(trial).total
            if total not in reached and len(own) < len(SHARES):
                reached.add(total)
                own.append((name if isinstance(recipe, str) else f"cluster+{name}", recipe, share))
        found += sorted(own, key=lambda item: -item[2])
    return found


def free(args: argparse.Namespace) -> None:
    """The table of methods put on the model as it is."""
    given = options(args)
    model = load(given)
    pictures = read(model, given)
    base = answer(model, pictures)
    rows = [{**row("unpatched", "unpatched", 1.0, base, base), "command": evaluation(args, given, None, 0)}]
    for name, recipe, share in strengths(model):
        with tokenzoo.patched(model, recipe, flops=share):
            found = answer(model, pictures)
        rows.append(row(f"{name} flops={share}", name, found.gmacs / base.gmacs, found, base))
        rows[-1]["command"] = evaluation(args, given, recipe, share)
        print("  ".join(str(rows[-1][column]) for column in FREE), flush=True)
    write(args, rows, FREE)


def evaluation(args: argparse.Namespace, given: argparse.Namespace, recipe: Any, share: float) -> str:
    """The command that gives one row of `free` alone."""
    if isinstance(recipe, list):
        return f"{tool(args)} # {json.dumps(recipe)} flops={share}"
    words = ["--model", given.model, "--model-kwargs", *(f"{k}={v}" for k, v in given.model_kwargs.items())]
    words += ["--num-classes", str(given.num_classes), "--img-size", *map(str, given.img_size)]
    words += ["--checkpoint", given.initial_checkpoint, "--data-dir", Path(args.data_dir).name]
    words += ["--split", given.val_split]
    words += ["--crop-pct", f"{given.crop_pct:g}", "--mean", *map(str, given.mean), "--std", *map(str, given.std)]
    words += [] if recipe is None else ["--method", recipe, f"flops={share}"]
    return f"tokenzoo eval {shlex.join(words)}"


def tuned(args: argparse.Namespace) -> None:
    """The table of models that were trained on with a method, each beside the same method off the shelf."""
    given = options(args)
    model = load(given)
    pictures = read(model, given)
    base, rows, control = answer(model, pictures), [], None
    rows.append({**row("unpatched, as it was", "unpatched", 1.0, base, base), "command": ""})
    for name in ("unpatched", *args.methods):
        method = [] if name == "unpatched" else ["--method", name, "--flops", str(args.flops)]
        folder = args.runs / name
        words = ["-c", args.config, "--data-dir", args.data_dir, "--output", str(folder), *method, *args.train]
        if not (folder / "model.safetensors").is_file() or not finished(folder, words):
            subprocess.run([sys.executable, "train_imagenet.py", *words, "--resume"], check=True)
        after = load(options(args, "--initial-checkpoint", str(folder / "model.safetensors")))
        before = base
        if method:
            with tokenzoo.patched(model, name, flops=args.flops):
                before = answer(model, pictures)
            tokenzoo.patch_model(after, name, flops=args.flops)
        found = answer(after, pictures)
        control = control or found
        rows.append(row(f"{name}, fine-tuned", name, found.gmacs / base.gmacs, found, base))
        for key, other in (("free", before), ("control", control)):
            diff = estimate(found.hits.double() - other.hits.double())
            rows[-1] |= {f"diff_{key}": round(diff.mean, 2), f"diff_{key}_se": round(diff.se, 2)}
        rows[-1]["free_top1"] = round(estimate(before.hits).mean, 2)
        words[3], words[5] = Path(args.data_dir).name, f"runs/{name}"
        rows[-1]["command"] = f"tokenzoo train {shlex.join(words)}"
        print("  ".join(str(rows[-1][column]) for column in TUNED), flush=True)
    write(args, [dict.fromkeys(TUNED, "") | r for r in rows], TUNED)


def finished(folder: Path, words: Sequence[str]) -> bool:
    """Whether a run has all its epochs."""
    with (folder / "summary.csv").open() as file:
        epochs = len(list(csv.DictReader(file)))
    return epochs >= parse_options(words).epochs


def tool(args: argparse.Namespace) -> str:
    """This script's own command."""
    data = Path(args.data_dir).name
    return f"python benchmarks/accuracy/accuracy_curves.py {args.command} --config {args.config} --data-dir {data}"


def write(args: argparse.Namespace, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """The CSV file and its curves."""
    record = environment("cpu", None)
    record["command"] = tool(args)
    for line in rows:
        line["row_command"] = line.pop("command")
    print(table([[str(r[column]) for column in columns] for r in rows], columns))
    write_results(args.output, rows, (*columns, "row_command"), record)
    plot(args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("free", "tuned"):
        command = commands.add_parser(name)
        command.add_argument("--config", required=True)
        command.add_argument("--data-dir", required=True)
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--threads", type=int, default=1)
        if name == "tuned":
            command.add_argument("--methods", nargs="+", required=True)
            command.add_argument("--flops", type=float, default=0.6)
            command.add_argument("--runs", type=Path, default=Path("runs"))
            command.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="options of tokenzoo train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"free": free, "tuned": tuned}[args.command](args)


if __name__ == "__main__":
    main()
