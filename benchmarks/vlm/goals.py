"""Does the time follow the multiply-adds? What recipes cost besides, on random models of real shapes, one CPU thread.

    python benchmarks/vlm/goals.py --results-file benchmarks/vlm/goals_cpu.csv
    python benchmarks/vlm/goals.py --size clip-l --rounds 4 --results-file benchmarks/vlm/goals_cpu.csv --append

A CLIP-like tower of 12 layers and 384 channels at 336 pixels, a Llama-like model of 12 layers and 768 channels; 576
rows of an image and 64 of words; or, for selectors alone, the tower of LLaVA-1.5 (CLIP-L/14 at 336 pixels, 24 layers
and 1024 channels, rows of 4096 channels). Goals: the language model's prefill gets faster by at least 0.95 of its
multiply-add ratio; a selector, marks included, takes at most 2 % of the tower's time; a step of decoding takes at most
1 % more than one of the unpatched model on a cache of the same rows; the cache has exactly the bytes of the report. All
sides take turns; processor time, medians and quartiles of the ratio of each round, and the standard error of the median
by bootstrap. Two controls have no bound: `prefill` of "unpatched, N rows" is the unpatched language model on a prompt
as short as a selector leaves it (what the machine makes of so few rows); `decode` of "unpatched" holds the unpatched
model against a copy of itself. Times do not depend on weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.cache_utils import DynamicCache

import tokenzoo
import tokenzoo.vlm.model as hand_over
from tokenzoo.cli.vlm_common import image_side, inputs_of, load
from tokenzoo.evaluation.environment import environment
from tokenzoo.evaluation.timing import Spread, clock_for, interleave
from tokenzoo.evaluation.vlm_speed import shared_copy, vlm_bench
from tokenzoo.vlm import list_selectors
from tokenzoo.vlm.cache import CACHE
from tokenzoo.vlm.family import vlm_family_of
from tokenzoo.vlm.passing import PROMPT, Prompt, during

RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fastervlm keep=192": ("fastervlm", {"keep": 192}),
    "fastervlm keep=64": ("fastervlm", {"keep": 64}),
    "fastv removed=0.5 layers=2": ("fastv", {"removed": 0.5, "layers": 2}),
    "pyramiddrop layers=[3,6,9]": ("pyramiddrop", {"layers": (3, 6, 9)}),
}
GOALS = {"prefill": 0.95, "selector": 0.02, "decode": 1.01, "cache": 1.0}
CONTROL = "unpatched"
COLUMNS = (
    "goal", "recipe", "rows_in", "rows_out", "value", "error", "q1", "q3", "bound", "met", "unpatched_ms", "ms",
    "gmac_ratio", "rounds",
)  # fmt: skip


class Shares(NamedTuple):
    """Times of one tower pass with a selector behind it."""

    tower: list[float]
    choice: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "small", "clip-l"), default="small", help="tiny to try out")
    parser.add_argument("--parts", nargs="+", choices=("prefill", "selector", "decode"), default=None)
    parser.add_argument("--selectors", nargs="+", default=list_selectors())
    parser.add_argument("--keep", type=int, default=64, help="rows that selectors keep, for their share of the tower")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1000, help="rounds of decoding, which are short")
    parser.add_argument("--results-file", type=Path, default=None)
    parser.add_argument("--append", action="store_true", help="add to the results file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    given = Namespace(
        random="small" if args.size == "clip-l" else args.size, model=None, attn="sdpa", dtype="float32",
        device="cpu", threads=1, seed=0,
        prompt=" ".join(f"w{i}" for i in range(63)),
    )  # fmt: skip
    model = clip_l() if args.size == "clip-l" else load(given)[0]
    side = image_side(given)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    inputs = inputs_of(given, model, None, image)
    record = environment("cpu") | {"command": f"python {' '.join(sys.argv)}"}
    recipes = RECIPES if args.size != "tiny" else {
        "uniform keep=16": ("uniform", {"keep": 16}), "fastv layers=2": ("fastv", {"layers": 2})
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for part in args.parts or (("selector",) if args.size == "clip-l" else ("prefill", "decode", "selector")):
        if part == "prefill":
            rows += prefill(model, inputs, recipes, args.rounds)
        elif part == "decode":
            for name, (method, options) in {CONTROL: (None, {}), **recipes}.items():
                rows.append(decode(model, inputs, name, method, options, args.steps))
        else:
            keep = min(args.keep, visual(model, inputs) // 4)
            label = "selector, clip-l" if args.size == "clip-l" else "selector"
            rows += [selector(model, inputs, name, keep, args.rounds) | {"goal": label} for name in args.selectors]
        for row in rows:
            row.setdefault("said", False)
            if not row["said"]:
                row["said"] = True
                end = f"bound {row['bound']}: {'met' if row['met'] else 'MISSED'}" if row["bound"] else "no bound"
                spread = f"+- {row['error']} ({row['q1']}, {row['q3']})"
                print(f"{row['goal']:<9} {row['recipe']:<28} {row['value']} {spread}, {end}", flush=True)
    if args.results_file:
        old = args.append and args.results_file.exists()
        with args.results_file.open("a" if old else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *record], extrasaction="ignore")
            if not old:
                writer.writeheader()
            writer.writerows({**row, **record} for row in rows)


def prefill(model: nn.Module, inputs: dict[str, Tensor], recipes: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The language model's part of reading a prompt, and the cache behind it."""
    runs = [(name, method, options) for name, (method, options) in recipes.items()]
    results, _ = vlm_bench(model, runs, inputs, rounds=rounds, steps=1, warmup=2)
    plain, *others = results
    rows = []
    for r in others:
        shares = [each * r.ratio for each in r.speed_ups]
        common = {"recipe": r.label, "rows_in": r.rows[0], "rows_out": r.rows[1], "rounds": rounds}
        times = {"unpatched_ms": ms(plain.language_model.median), "ms": ms(r.language_model.median)}
        rows.append({"goal": "prefill", **common, **verdict(shares, GOALS["prefill"], least=True), **times,
                     "gmac_ratio": round(1 / r.ratio, 3)})  # fmt: skip
        patched = tokenzoo.patch_model(shared_copy(model), recipes[r.label][0], **recipes[r.label][1])
        text = inputs["input_ids"].numel() - visual(model, inputs)
        counted = tokenzoo.report(patched, text=text).cache_bytes
        exact = r.cache_bytes / counted
        rows.append({"goal": "cache", **common, "value": exact, "error": 0, "q1": exact, "q3": exact, "bound": 1.0,
                     "met": r.cache_bytes == counted, "unpatched_ms": "", "ms": "", "gmac_ratio": ""})  # fmt: skip
        if r.rows[0] == r.rows[1]:  # a selector: a prompt of so many rows is what an unpatched model could be given
            rows.append(short_prompt(model, plain.rows[0], r.rows[0], r.ratio, rounds))
    return rows


def short_prompt(model: nn.Module, whole: int, left: int, ratio: float, rounds: int) -> dict[str, Any]:
    """The unpatched language model on fewer rows, as "prefill" has it of a selector: what the machine makes of them."""
    family = vlm_family_of(model)
    lm = family.language_model(family.inner(model))
    weight = next(lm.parameters())
    long, short = (torch.randn(1, n, lm.config.hidden_size, dtype=weight.dtype) for n in (whole, left))
    calls = [lambda: lm(inputs_embeds=long, use_cache=True), lambda: lm(inputs_embeds=short, use_cache=True)]
    with torch.inference_mode():
        interleave(calls, 2, time.process_time)
        before, after = alternating(calls, rounds, time.process_time)
    found = verdict([a / b * ratio for a, b in zip(before, after)], GOALS["prefill"], least=True)
    return {
        "goal": "prefill", "recipe": f"{CONTROL}, {left} rows", "rows_in": left, "rows_out": left, **found, "bound": "",
        "met": "", "unpatched_ms": ms(Spread.of(before).median), "ms": ms(Spread.of(after).median),
        "gmac_ratio": round(1 / ratio, 3), "rounds": rounds,
    }  # fmt: skip


def decode(
    model: nn.Module, inputs: dict[str, Tensor], name: str, method: Any, options: dict[str, Any], steps: int
) -> dict[str, Any]:
    """A step behind the prompt, against the unpatched model on a cache of the very same rows."""
    patched = shared_copy(model) if method is None else tokenzoo.patch_model(shared_copy(model), method, **options)
    plain, ids = shared_copy(model), inputs["input_ids"][:, -1:]
    clock, _ = clock_for(ids.device)
    with torch.inference_mode():
        own = patched(**inputs, use_cache=True, logits_to_keep=1)[CACHE]
        same = DynamicCache(config=plain.config.get_text_config())
        for index, layer in enumerate(own.layers):
            same.update(layer.keys.clone(), layer.values.clone(), index)
        calls = [
            lambda: plain(ids, **{CACHE: same}, use_cache=True),
            lambda: patched(ids, **{CACHE: own}, use_cache=True),
        ]
        interleave(calls, 10, clock)
        before, after = alternating(calls, steps, clock)
    ratios = [b / a for a, b in zip(before, after)]
    held = [layer.keys.shape[2] for layer in own.layers]
    found = verdict(ratios, GOALS["decode"], least=False) | ({"bound": "", "met": ""} if method is None else {})
    return {
        "goal": "decode", "recipe": name, "rows_in": held[0], "rows_out": held[-1], **found,
        "unpatched_ms": ms(Spread.of(before).median), "ms": ms(Spread.of(after).median), "gmac_ratio": "",
        "rounds": steps,
    }  # fmt: skip


def alternating(calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Times two calls in turns, A B B A: what the first of a pair leaves warm helps neither."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            start = clock()
            calls[index]()
            times[index].append(clock() - start)
    return times


def selector(model: nn.Module, inputs: dict[str, Tensor], name: str, keep: int, rounds: int) -> dict[str, Any]:
    """What a selector takes, with the signals that it reads and the marks, as a share of the tower's time."""
    patched = tokenzoo.patch_model(shared_copy(model), name, keep=keep)
    family = vlm_family_of(patched)
    inner = family.inner(patched)
    tower, noted, began = family.vision_tower(inner), Shares([], []), []
    plain = hand_over.choose

    def timed(*args: Any) -> None:
        start = time.process_time()
        plain(*args)
        noted.choice.append(time.process_time() - start)

    hooks = [
        tower.register_forward_pre_hook(lambda *_: began.append(time.process_time())),
        tower.register_forward_hook(lambda *_: noted.tower.append(time.process_time() - began[-1])),
    ]
    hand_over.choose = timed
    warm = 2 if rounds > 4 else 1
    try:
        with torch.inference_mode(), during(PROMPT, Prompt(inputs["input_ids"], None)):
            for _ in range(rounds + warm):
                inner.get_image_features(inputs["pixel_values"])
    finally:
        hand_over.choose = plain
        for hook in hooks:
            hook.remove()
    tower_times, choices = noted.tower[warm:], noted.choice[warm:]
    shares = [c / t for c, t in zip(choices, tower_times)]
    return {
        "goal": "selector", "recipe": f"{name} keep={keep}", "rows_in": visual(model, inputs), "rows_out": keep,
        **verdict(shares, GOALS["selector"], least=False), "unpatched_ms": ms(Spread.of(tower_times).median),
        "ms": ms(Spread.of(choices).median), "gmac_ratio": "", "rounds": rounds,
    }  # fmt: skip


def clip_l() -> nn.Module:
    """The tower and the projector of LLaVA-1.5 with random weights, in front of a language model of one thin layer."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=300
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=250)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def visual(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Rows of images in the prompt."""
    family = vlm_family_of(model)
    tokens = torch.tensor(family.placeholders(family.inner(model).config))
    return int(torch.isin(inputs["input_ids"], tokens).sum())


def verdict(values: Sequence[float], bound: float, least: bool) -> dict[str, Any]:
    """A median with its error and quartiles, held against a bound."""
    spread = Spread.of(values)
    value, low, high = (round(each, 4) for each in spread)
    drawn = np.random.default_rng(0).choice(np.asarray(values), (1000, len(values)))
    met = spread.median >= bound if least else spread.median <= bound
    error = round(float(np.median(drawn, axis=1).std()), 5)
    return {"value": value, "error": error, "q1": low, "q3": high, "bound": bound, "met": met}


def ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
