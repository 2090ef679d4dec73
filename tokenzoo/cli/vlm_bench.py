"""`tokenzoo vlm bench`: what recipes save while a prompt is read, in decoding and in the cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from ..evaluation.environment import environment
from ..evaluation.peak import HOW
from ..evaluation.results import check_file, number, result_line, table, write_results
from .common import argv_of, say
from .vlm_common import add_vlm_arguments, image_side, inputs_of, load, recipes_of

if TYPE_CHECKING:
    from ..evaluation.vlm_speed import VlmSpeed

HELP = "prefill, decoding, cache and peak memory of a vision-language model, unpatched and with recipes, round robin"
EXAMPLE = "tokenzoo vlm bench --random tiny --rounds 5 --method uniform keep=16 --method fastv layers=2"
_COLUMNS = (
    "model", "method", "rows_in", "rows_out", "prefill_ms", "prefill_ms_q1", "prefill_ms_q3", "lm_ms", "lm_ms_q1",
    "lm_ms_q3", "decode_ms", "decode_ms_q1", "decode_ms_q3", "cache_bytes", "prefill_peak_bytes", "lm_gmacs",
    "gmac_ratio", "lm_speed_up", "lm_speed_up_q1", "lm_speed_up_q3",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, --method, and how often."""
    add_vlm_arguments(parser)
    parser.add_argument("--image", default=None, help="an image; noise by default")
    parser.add_argument("--rounds", type=int, default=10, help="every model reads the prompt once per round")
    parser.add_argument("--steps", type=int, default=4, help="tokens that are decoded per round")
    parser.add_argument("--results-file", default=None, help="file.csv or file.json")


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table and a --result line, writes the results file."""
    import numpy as np
    from PIL import Image

    from ..evaluation.vlm_speed import vlm_bench  # imports transformers

    if args.results_file:
        check_file(args.results_file, (".csv", ".json"), "--results-file")
    runs = recipes_of(args)
    model, processor = load(args)
    side = image_side(args)
    noise = np.random.default_rng(args.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(noise) if args.image is None else Image.open(args.image).convert("RGB")
    inputs = inputs_of(args, model, processor, image)
    results, clock = vlm_bench(model, runs, inputs, rounds=args.rounds, steps=args.steps)
    name = args.model or f"random {args.random} LLaVA"
    record = environment(args.device, argv_of(args))
    say(
        f"{name}, {inputs['input_ids'].shape[1]} rows in the prompt, {args.dtype}, {args.attn}, {record['device']}, "
        f"threads {record['threads']}, {clock}; medians (and quartiles) of {args.rounds} rounds"
    )
    header = ("method", "rows", "prefill ms", "", "LM ms", "decode ms", "cache MiB", "peak MiB", "LM GMACs")
    header = (*header, "ratio", "LM speed-up", "", "speed-up x ratio")
    say(table([_line(each) for each in results], header))
    how = HOW.get(torch.device(args.device).type)
    say(
        f"peak: {'not measured on this device' if how is None else f'of one prefill, beyond weights and inputs; {how}'}"
    )
    rows = [{"model": name, **_row(each)} for each in results]
    if args.results_file:
        write_results(args.results_file, rows, _COLUMNS, record)
    say(result_line(rows))


def _line(r: VlmSpeed) -> tuple[str, ...]:
    rows = str(r.rows[0]) if r.rows[0] == r.rows[1] else f"{r.rows[0]} -> {r.rows[1]}"
    return (
        r.label, rows, number(1e3 * r.prefill.median), f"({1e3 * r.prefill.q1:.2f}, {1e3 * r.prefill.q3:.2f})",
        number(1e3 * r.language_model.median), number(1e3 * r.decode.median), number(r.cache_bytes / 2**20, 3),
        number(None if r.peak_bytes is None else r.peak_bytes / 2**20, 1), number(r.macs / 1e9, 3), number(r.ratio, 3),
        number(r.speed_up.median), f"({r.speed_up.q1:.2f}, {r.speed_up.q3:.2f})", number(r.speed_up.median * r.ratio),
    )  # fmt: skip


def _row(r: VlmSpeed) -> dict[str, object]:
    found: dict[str, object] = {"method": r.label, "rows_in": r.rows[0], "rows_out": r.rows[1]}
    for name, spread in (("prefill_ms", r.prefill), ("lm_ms", r.language_model), ("decode_ms", r.decode)):
        found |= {name: 1e3 * spread.median, f"{name}_q1": 1e3 * spread.q1, f"{name}_q3": 1e3 * spread.q3}
    found |= {"cache_bytes": r.cache_bytes, "prefill_peak_bytes": r.peak_bytes, "lm_gmacs": r.macs / 1e9}
    found |= {"gmac_ratio": r.ratio, "lm_speed_up": r.speed_up.median}
    return found | {"lm_speed_up_q1": r.speed_up.q1, "lm_speed_up_q3": r.speed_up.q3}
