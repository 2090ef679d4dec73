"""What `tokenzoo tune` found against every method as it comes, at the same cost, on the images the search did not see.

    tokenzoo tune --model vit_tiny_patch16_224 --checkpoint weights.safetensors --num-classes 200 --data-dir val \
        --class-map classes.txt --flops 0.6 --output tuned
    python benchmarks/accuracy/tune_against_defaults.py --model vit_tiny_patch16_224 --checkpoint weights.safetensors \
        --num-classes 200 --data-dir val --class-map classes.txt --flops 0.6 --output tuned

Takes the arguments of `tokenzoo tune` and reads what that left in OUTPUT. The best method as it comes is picked here by
the same images that it is judged by, which flatters it: the comparison is hard on the search.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

from tokenzoo.adapters.inspect import describe
from tokenzoo.cli import build_parser
from tokenzoo.cli.common import precision_of
from tokenzoo.cli.tune_command import load
from tokenzoo.core.plugins import import_plugins
from tokenzoo.evaluation.results import number, table
from tokenzoo.evaluation.runs import shared_copy
from tokenzoo.tuning.budget import Budget, Fitter
from tokenzoo.tuning.candidates import chosen_methods, seeds
from tokenzoo.tuning.images import Split
from tokenzoo.tuning.judge import Judge
from tokenzoo.tuning.outcome import values_of
from tokenzoo.tuning.scores import SCORES, Score
from tokenzoo.tuning.state import State


def main(words: list[str]) -> None:
    args = build_parser().parse_args(["tune", *words])
    import_plugins(args.imports)
    if args.latency:
        raise SystemExit("this script compares at equal multiply-adds; give --flops")
    found = json.loads((Path(args.output) / "tune.json").read_text())
    model, images, labels = load(args)
    own, score, split = shared_copy(model), SCORES[found["score"]], Split(**found["split"])
    judge = Judge(
        own, images, labels, split, score, precision_of(args), args.batch_size, lambda m, x: m(x), State(None, {})
    )
    fitter = Fitter(own, tuple(images.shape[-2:]), any("dense" in (row["recipe"] or {}) for row in found["rows"]))
    info = describe(own)
    plain = judge.final(None)
    for row in (row for row in found["rows"] if row["role"] == "winner"):
        budget = Budget("flops", float(row["budget"].partition("=")[2]))
        winner = judge.final(row["recipe"])
        lines = [_line(f"{row['label']} (found)", row["share"], winner, plain, winner, score)]
        for name in chosen_methods(args.methods):
            try:
                fitted = fitter.fit(next(iter(seeds(name, info))), budget)
            except (ValueError, TypeError) as error:
                sys.stderr.write(f"{name}: {error}\n")
                continue
            lines.append(_line(fitted.candidate.label, fitted.share, judge.final(fitted.recipe), plain, winner, score))
        lines.sort(key=lambda line: -line[0])
        print(f"{budget}, {len(split.held_out)} images, {score.title}; paired differences, ± one standard error")
        print(table([line[1:] for line in lines], ("recipe", "GMACs %", "to unpatched", "found minus this")))


def _line(label: str, share: float, values: Tensor, plain: Tensor, winner: Tensor, score: Score) -> tuple:
    digits = 2 if score.percent else 4
    differences = [values_of(values - plain, score), values_of(winner - values, score)]
    said = [f"{number(d.mean, digits, sign=True)} ± {number(d.se, digits)}" for d in differences]
    return values.mean().item(), label, number(100 * share, 1), *said


if __name__ == "__main__":
    main(sys.argv[1:])
