"""Accuracy of every method on real images, off the shelf and after fine-tuning: tables and curves.

    python benchmarks/accuracy/draw_subset.py --source tin100 --output tin100_part --train 25 --val 10 --val-skip 20 \
        --labels tin100_wnid_to_label.json
    python benchmarks/accuracy/accuracy_curves.py free --config benchmarks/models/vit_tiny_tin200.yaml \
        --data-dir tin100_part --output benchmarks/accuracy/tin200_free.csv
    python benchmarks/accuracy/accuracy_curves.py tuned --config benchmarks/models/vit_tiny_tin200.yaml \
        --data-dir tin100_part --methods evit tome mctf ats topk --runs runs \
        --output benchmarks/accuracy/tin200_tuned.csv --train --epochs 1 --lr 2e-5
    python benchmarks/accuracy/plot_accuracy.py benchmarks/accuracy/*_free.csv benchmarks/accuracy/*_tuned.csv

The configuration is one of `tokenzoo train` and names a model with its weights; DATA_DIR holds train/ and val/. `free`
takes every method that needs no training at four shares of the unpatched multiply-adds, and names those that cannot
have one. What was measured is kept beside the table (.jsonl): started again, it goes on. `--passes 2` takes every
second image first, so that the whole table is there when half of the time is over. `tuned` trains one model per method
with the options behind its own and those of tuned.yaml, all from the same weights with the same budget, and the
unpatched model beside them; runs that are complete already are only evaluated. Differences are paired, image by image;
times are those of batches that the unpatched model and the patched one run in turn, by the processor's clock.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from plot_accuracy import plot  # beside this script
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core.learned import needs_training
from tokenzoo.evaluation import PictureLoader, data_config, environment, estimate, open_pictures, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.runs import forward_counted, shared_copy
from tokenzoo.training.build import build
from tokenzoo.training.options import parse_options
from tokenzoo.tuning.images import fingerprint
from tokenzoo.tuning.state import State

SHARES = (0.6, 0.7, 0.85, 0.5)  # in the order in which they are measured
FREE = ("setting", "method", "asked", "share", "top1", "top1_se", "diff", "diff_se", "diff_random", "diff_random_se",
        "time_ratio", "time_q1", "time_q3", "tokens_out", "gmacs", "images", "note")  # fmt: skip
BATCH = 50
TIMED = 4  # every how many batches the unpatched model runs too
TUNED = ("setting", "method", "share", "top1", "top1_se", "diff", "diff_se", "free_top1", "diff_free", "diff_free_se",
         "diff_control", "diff_control_se", "tokens_out", "gmacs", "images")  # fmt: skip
OWN = Path(__file__).with_name("tuned.yaml")  # what some methods are trained with, besides
COUNTED = 16  # images that counts are averaged over where these depend on the image


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
    return Result(torch.cat(hits), torch.cat(tokens).double().mean().item(), gmacs(model, pictures))


def gmacs(model: nn.Module, pictures: Pictures) -> float:
    """1e9 multiply-adds of an image; means over some images where counts depend on them."""
    report = tokenzoo.report(model, pictures.images.shape[2:])
    macs = float(report.total)
    if report.data_dependent:
        some = pictures.images[:: max(1, len(pictures.images) // COUNTED)][:COUNTED]
        macs = sum(tokenzoo.count_macs(model, image=image[None]).total for image in some) / len(some)
    return macs / 1e9


def row(setting: str, method: str, share: float, found: Result, base: Result) -> dict[str, Any]:
    """One row of a table."""
    top1, diff = estimate(found.hits), estimate(found.hits.double() - base.hits.double())
    return {
        "setting": setting, "method": method, "share": round(share, 4), "top1": round(top1.mean, 2),
        "top1_se": round(top1.se, 2), "diff": round(diff.mean, 2), "diff_se": round(diff.se, 2),
        "tokens_out": round(found.tokens, 1), "gmacs": round(found.gmacs, 4), "images": len(found.hits),
    }  # fmt: skip


def recipes(model: nn.Module) -> list[tuple[str, Any]]:
    """(method, recipe) of every method that needs no training; what is left out is said."""
    found = []
    for name in tokenzoo.list_methods():
        if needs_training(tokenzoo.method_class(name)):
            print(f"left out: {name} learns what to decide", flush=True)
        elif tokenzoo.create_method(name).closes_span:  # rebuilds what clustering took away
            found.append((f"cluster+{name}", [{"method": "cluster"}, {"method": name, "layers": "norm"}]))
        else:
            found.append((name, name))
    return found


@torch.inference_mode()
def measure(model: nn.Module, plain: nn.Module, pictures: Pictures) -> dict[str, Any]:
    """What a model answers: a 0 or 1 per image, the mean count of tokens, and its time over the unpatched model's."""
    hits, tokens, ratios = "", [], []
    for index, (images, targets) in enumerate(zip(pictures.images.split(BATCH), pictures.targets.split(BATCH))):
        start = time.process_time()
        logits, count = forward_counted(model, images)
        own = time.process_time() - start
        if index % TIMED == 0:
            start = time.process_time()
            plain(images)
            ratios.append(round(own / (time.process_time() - start), 4))
        hits += "".join(str(int(hit)) for hit in logits.argmax(1) == targets)
        tokens += count.double().tolist()
    return {"hits": hits, "tokens": sum(tokens) / len(tokens), "ratios": ratios}


def free(args: argparse.Namespace) -> None:
    """The table of methods put on the model as it is."""
    given = options(args)
    model = load(given)
    plain, pictures = shared_copy(model), read(model, given)
    state = State(args.output.with_suffix(".jsonl"), {"images": fingerprint([*pictures]), "weights": given.model})
    parts = [Pictures(*(t[i :: args.passes] for t in pictures)) for i in range(args.passes)]
    names = [f"part {i} of {args.passes}" for i in range(args.passes)]
    bases = [state.value(name, None, partial(measure, model, plain, part)) for name, part in zip(names, parts)]
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    answers: dict[tuple[str, float], Result] = {}
    for through in range(1, args.passes + 1):
        base = joined(bases[:through], 1.0)
        first = {**row("unpatched", "unpatched", 1.0, base, base), "asked": 1.0, "note": ""}
        first |= dict.fromkeys(("diff_random", "diff_random_se", "time_q1", "time_q3"), "") | {"time_ratio": 1.0}
        first["command"] = evaluation(args, given, None, 0)
        for share, (name, recipe) in itertools.product(args.shares, recipes(model)):
            if args.methods and name not in args.methods:
                continue
            line = {"setting": f"{name} flops={share}", "method": name, "asked": share}
            try:
                tokenzoo.patch_model(model, recipe, flops=share)
            except (ValueError, TypeError) as error:
                if through == 1:
                    print(f"left out: {name} at {share}: {error}", flush=True)
                if "cannot be reached" in str(error):  # others do not work on this model at all
                    rows[name, share] = dict.fromkeys(FREE, "") | line | {"note": str(error), "command": ""}
                continue
            try:
                kept = [
                    state.value(part, tokenzoo.recipe(model), partial(measure, model, plain, some))
                    for part, some in zip(names[:through], parts)
                ]
                found = joined(kept, gmacs(model, pictures))
            finally:
                tokenzoo.unpatch_model(model)
            base = joined(bases[:through], gmacs(model, pictures))
            answers[name, share] = found
            ratios = [ratio for k in kept for ratio in k["ratios"]]
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            rows[name, share] = row(line["setting"], name, found.gmacs / base.gmacs, found, base) | line | {"note": ""}
            rows[name, share] |= dict(zip(("time_q1", "time_ratio", "time_q3"), (round(q, 3) for q in quarters)))
            rows[name, share]["command"] = evaluation(args, given, recipe, share)
            to_random(rows, answers)
            print("  ".join(str(rows[name, share][column]) for column in FREE), flush=True)
            write_table(args, [first, *ordered(rows)], FREE)
    state.close()
    write(args, [first | {"gmacs": round(base.gmacs, 4)}, *ordered(rows)], FREE)


def to_random(rows: dict[tuple[str, float], dict[str, Any]], answers: dict[tuple[str, float], Result]) -> None:
    """Notes the paired difference to patches drawn at random at the same share, over the images that both saw."""
    for (name, share), found in answers.items():
        rows[name, share] |= {"diff_random": "", "diff_random_se": ""}
        other = answers.get(("random", share))
        if other is not None and name != "random" and len(other.hits) == len(found.hits):
            diff = estimate(found.hits.double() - other.hits.double())
            rows[name, share] |= {"diff_random": round(diff.mean, 2), "diff_random_se": round(diff.se, 2)}


def ordered(rows: dict[tuple[str, float], dict[str, Any]]) -> list[dict[str, Any]]:
    """By method, the largest share first."""
    return [dict(rows[key]) for key in sorted(rows, key=lambda key: (key[0], -key[1]))]


def joined(parts: Sequence[dict[str, Any]], macs: float) -> Result:
    """What was measured on several parts of the images, as one."""
    hits = torch.tensor([int(hit) for part in parts for hit in part["hits"]]).bool()
    counts = [len(part["hits"]) for part in parts]
    tokens = sum(part["tokens"] * count for part, count in zip(parts, counts)) / sum(counts)
    return Result(hits, tokens, macs)


def evaluation(args: argparse.Namespace, given: argparse.Namespace, recipe: Any, share: float) -> str:
    """The command that gives one row of `free` alone."""
    if isinstance(recipe, list):
        return f"{tool(args)} # {json.dumps(recipe)} flops={share}"
    words = ["--model", given.model, "--model-kwargs", *(f"{k}={v}" for k, v in given.model_kwargs.items())]
    words += ["--num-classes", str(given.num_classes), "--img-size", *map(str, given.img_size)]
    words += ["--checkpoint", given.initial_checkpoint, "--data-dir", Path(args.data_dir).name]
    words += ["--split", given.val_split]
    words += ["--class-map", Path(given.class_map).name] if given.class_map else []
    words += ["--interpolation", given.interpolation] if given.interpolation else []
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
    own = yaml.safe_load(OWN.read_text())
    for name in ("unpatched", *args.methods):
        folder = args.runs / name
        brought = own.get(name, "").format(flops=args.flops, runs=args.runs).split()
        method = [] if name == "unpatched" else brought if "--method" in brought else ["--method", name, *brought]
        if method and "--method-kwargs" not in brought and method[1] == name:
            method += ["--flops", str(args.flops)]
        words = ["-c", args.config, "--data-dir", args.data_dir, "--output", str(folder), *method, *args.train]
        if not (folder / "model.safetensors").is_file() or not finished(folder, words):
            subprocess.run([sys.executable, "train_imagenet.py", *words, "--resume"], check=True)
        before, recipe = base, json.loads((folder / "recipe.json").read_text())
        if recipe is not None:
            torch.manual_seed(given.seed)  # modules that have not learned yet
            with warnings.catch_warnings(), tokenzoo.patched(model, recipe):
                before = answer(model, pictures)
        after = load(given)
        if recipe is not None:
            tokenzoo.patch_model(after, recipe)
        after.load_state_dict(load_file(folder / "model.safetensors"))
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
    print(table([[str(r[column]) for column in columns] for r in rows], columns))
    write_table(args, rows, columns)
    plot(args.output)


def write_table(args: argparse.Namespace, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """The CSV file."""
    record = environment("cpu", None)
    record["command"] = tool(args)
    rows = [{**line, "row_command": line["command"]} for line in rows]
    write_results(args.output, rows, (*columns, "row_command"), record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("free", "tuned"):
        command = commands.add_parser(name)
        command.add_argument("--config", required=True)
        command.add_argument("--data-dir", required=True)
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--threads", type=int, default=1)
        if name == "free":
            command.add_argument("--methods", nargs="+", default=None, help="names as in the table; all by default")
            command.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
            command.add_argument("--passes", type=int, default=1, help="parts of the images, measured one by one")
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
