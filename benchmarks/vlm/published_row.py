"""A published row of LLaVA-1.5-7B again, with weights and data of your own: POPE or TextVQA under FastV or VisionZip.

    python benchmarks/vlm/published_row.py pope --model llava-1.5-7b-hf/ --questions pope/ --images val2014/ \
        --results-file pope.json
    python benchmarks/vlm/published_row.py textvqa --model llava-1.5-7b-hf/ --questions TextVQA_0.5.1_val.json \
        --prompts llava_textvqa_val_v051_ocr.jsonl --images train_images/ --results-file textvqa.json

Nothing is downloaded. POPE: the three files coco_pope_{random,popular,adversarial}.json of its authors, one JSON object
per line, and COCO val2014. TextVQA: its questions with ten answers each, and LLaVA's prompts with reference OCR tokens.
Images are padded to squares as LLaVA's authors do, and `tokenzoo vlm eval` asks unpatched, FastV and VisionZip.

The figures to meet are given, as `--published "unpatched=..." "visionzip 192=..."`: those of Yang et al., "VisionZip:
Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, table for LLaVA-1.5-7B, say. None stand here,
since none was checked against its paper. How rows of FastV are counted there is not known here; `removed` in front of
layer 2 is set to meet them on average over the layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenzoo.cli import main as tokenzoo
from tokenzoo.core.safe_files import parse_json
from tokenzoo.evaluation.results import number

TASKS = ("pope", "textvqa")
KINDS = ("random", "popular", "adversarial")
ASKED = "{question}\nAnswer the question using a single word or phrase."
GRAY = (122, 116, 104)  # CLIP's mean
LAYERS, ROWS = 32, 576


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, type=Path, help="folder with weights and processor of LLaVA-1.5-7B")
    parser.add_argument("--questions", required=True, type=Path, help="POPE: folder of its files; TextVQA: its file")
    parser.add_argument("--prompts", type=Path, default=None, help="TextVQA: LLaVA's prompts with OCR tokens")
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[192, 64])
    parser.add_argument("--published", nargs="+", default=[], metavar="NAME=FIGURE", help="figures in percent to meet")
    parser.add_argument("--rest", nargs=argparse.REMAINDER, default=[], help="more flags of `tokenzoo vlm eval`, last")
    parser.add_argument("--results-file", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        check(args)
        with tempfile.TemporaryDirectory() as folder:
            metric, template = prepare(args, Path(folder))
            words = ["vlm", "eval", "--model", str(args.model), "--data", folder, "--metric", metric]
            words += ["--template", template, "--results-file", str(args.results_file)]
            for rows in args.rows:
                words += ["--method", "visionzip", f"keep={rows}"]
                words += ["--method", "fastv", "layers=2", f"removed={removed(rows):.4f}"]
            if tokenzoo([*words, *args.rest]):
                return 2
    except ValueError as error:
        sys.stderr.write(f"published_row: {error}\n")
        return 2
    compare(args)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuses what is not there before anything is prepared."""
    figures(args)
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} holds no weights; get LLaVA-1.5-7B in the layout of transformers first")
    if not args.images.is_dir():
        raise ValueError(f"--images {args.images} is no folder")
    if args.results_file.suffix != ".json":
        raise ValueError(f"--results-file {args.results_file} does not end in .json")
    if args.task == "textvqa" and (args.prompts is None or not args.prompts.is_file()):
        raise ValueError(
            "textvqa needs --prompts, LLaVA's file with reference OCR tokens; published figures are with them"
        )
    needed = [args.questions / f"coco_pope_{kind}.json" for kind in KINDS] if args.task == "pope" else [args.questions]
    for file in needed:
        if not file.is_file():
            raise ValueError(f"--questions: {file} does not exist")


def figures(args: argparse.Namespace) -> dict[str, float]:
    """What was published, by the names of rows."""
    found = {}
    for word in args.published:
        name, _, figure = word.partition("=")
        try:
            found[name] = float(figure)
        except ValueError as error:
            raise ValueError(f"--published {word!r} is not NAME=FIGURE, such as 'visionzip 192=50'") from error
    return found


def removed(rows: int) -> float:
    """Share that FastV drops in front of layer 2, for that many rows on average over all layers."""
    return 1 - (rows - 2 * ROWS / LAYERS) / (LAYERS - 2) * LAYERS / ROWS


def prepare(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Writes questions and square images; returns metric and template."""
    lines = pope(args) if args.task == "pope" else textvqa(args)
    for name in {line["image"] for line in lines}:
        source = args.images / Path(name).name
        if not source.is_file():
            raise ValueError(f"image {source} does not exist")
        with Image.open(source) as file:
            square(file.convert("RGB")).save(folder / f"{Path(name).stem}.png")
    text = "".join(json.dumps({**line, "image": f"{Path(line['image']).stem}.png"}) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return ("yesno", ASKED) if args.task == "pope" else ("vqa", "{question}")  # LLaVA's prompts end that way


def square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of CLIP's mean colour."""
    side = max(image.size)
    whole = Image.new("RGB", (side, side), GRAY)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


def pope(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        for each in read_lines(args.questions / f"coco_pope_{kind}.json"):
            found.append({"id": f"{kind}-{each['question_id']}", "image": each["image"], "question": each["text"],
                          "answer": each["label"], "category": kind})  # fmt: skip
    return found


def textvqa(args: argparse.Namespace) -> list[dict[str, Any]]:
    """LLaVA's prompts, in the order of the questions that they belong to."""
    asked = parse_json(args.questions.read_bytes(), args.questions.name)["data"]
    prompts = read_lines(args.prompts)
    if len(asked) != len(prompts):
        raise ValueError(f"{args.prompts.name} has {len(prompts)} prompts for {len(asked)} questions")
    found = []
    for each, prompt in zip(asked, prompts):
        if prompt["question_id"] != each["image_id"] or not prompt["text"].startswith(each["question"].strip()[:1]):
            raise ValueError(f"{args.prompts.name}: prompts stand in another order than the questions")
        found.append({"id": str(each["question_id"]), "image": prompt["image"], "question": prompt["text"],
                      "answer": each["answers"]})  # fmt: skip
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    return [parse_json(line, f"{path.name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def compare(args: argparse.Namespace) -> None:
    """Measured beside published."""
    names = ["unpatched", *(f"{name} {rows}" for rows in args.rows for name in ("visionzip", "fastv"))]
    rows = json.loads(args.results_file.read_text(encoding="utf-8"))["results"]
    given = figures(args)
    figure = "f1" if args.task == "pope" else "score"
    for name, row in zip(names, rows):
        known = given.get(name)
        error = number(row[f"{figure}_se"])
        print(f"{name:<14} {row[figure]:6.2f} ± {error}, published {'-' if known is None else known}")


if __name__ == "__main__":
    sys.exit(main())
