"""`tokenzoo vlm eval`: how well questions about images are answered, unpatched and with recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.environment import environment
from ..evaluation.results import check_file, number, result_line, table, write_results
from ..evaluation.vqa_data import Question, read_questions
from ..evaluation.vqa_metrics import METRICS, Score, jackknife
from .common import argv_of, say
from .vlm_common import add_vlm_arguments, load, recipes_of

if TYPE_CHECKING:
    from ..evaluation.vqa import VqaResult

HELP = "answers to questions about images, unpatched and with recipes, on the same questions"
EXAMPLE = "tokenzoo vlm eval --model llava-hf/llava-1.5-7b-hf --data pope/ --metric yesno --method fastv removed=0.5"
_COLUMNS = (
    "model", "method", "metric", "score", "score_se", "diff", "diff_se", "precision", "recall", "f1", "f1_se",
    "diff_f1", "diff_f1_se", "yes_share", "agreement", "rows_in", "rows_out", "gmac_ratio", "n_questions",
    "batch_size", "max_new_tokens", "template", "dtype", "recipe",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, --method, the questions and how they are asked."""
    add_vlm_arguments(parser, words=False)
    data = parser.add_argument_group("questions")
    data.add_argument(
        "--data", required=True, help='file.jsonl or its folder; lines {"image": ..., "question": ..., "answer": ...}'
    )
    data.add_argument("--images", default=None, help="folder that paths of images start from; that of the file")
    data.add_argument("--metric", choices=METRICS, default="exact", help="vqa: soft accuracy; yesno: POPE's figures")
    data.add_argument("--template", default="{question}", help="what is asked, with {question} in it")
    data.add_argument("--limit", type=int, default=None, help="the first questions alone")
    data.add_argument("--batch-size", "-b", type=int, default=1, help="prompts at a time; halved when memory runs out")
    data.add_argument("--max-new-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--results-file", default=None, help="file.csv or file.json")
    parser.add_argument("--answers-file", default=None, help="file.jsonl with every answer of every run")


def run(args: argparse.Namespace) -> None:
    """Asks, prints a table and a --result line, writes the files."""
    from ..evaluation.vqa import evaluate_vqa  # imports transformers

    for path, endings, flag in (
        (args.results_file, (".csv", ".json"), "--results-file"),
        (args.answers_file, (".jsonl",), "--answers-file"),
    ):
        if path:
            check_file(path, endings, flag)
    runs = recipes_of(args)
    questions = read_questions(args.data, args.images)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} is not positive")
    questions = questions[: args.limit]
    model, processor = load(args)
    template = args.template.replace("\\n", "\n")
    results = evaluate_vqa(
        model, processor, runs, questions, args.metric, args.batch_size, args.max_new_tokens, template
    )
    common = {
        "model": args.model, "metric": args.metric, "n_questions": len(questions), "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens, "template": template, "dtype": args.dtype,
    }  # fmt: skip
    rows = [{**common, **_row(each)} for each in results]
    say(
        f"{args.model}, {len(questions)} questions, {args.metric}, {args.dtype}; percent with standard errors, "
        "differences to the unpatched model on the same questions"
    )
    header = ("method", "score", "difference", "agreement", "rows", "LM ratio")
    extra = ("precision", "recall", "F1", "F1 difference") if args.metric == "yesno" else ()
    say(table([_line(each) for each in results], (*header, *extra)))
    if args.results_file:
        write_results(args.results_file, rows, _COLUMNS, environment(args.device, argv_of(args)))
    if args.answers_file:
        _write_answers(Path(args.answers_file), results, questions)
    say(result_line(rows))


def _line(r: VqaResult) -> tuple[str, ...]:
    shown = (
        r.label, _with_error(r.score), _with_error(r.diff, sign=True), number(r.agreement),
        f"{number(r.rows[0], 1)} -> {number(r.rows[1], 1)}", number(r.ratio, 3),
    )  # fmt: skip
    if r.yes_no is None:
        return shown
    f1 = Score(r.yes_no.f1, jackknife(r.yes_no.without))
    return (
        *shown, number(r.yes_no.precision), number(r.yes_no.recall), _with_error(f1), _with_error(r.diff_f1, sign=True)
    )  # fmt: skip


def _with_error(score: Score | None, sign: bool = False) -> str:
    return "-" if score is None else f"{number(score.mean, sign=sign)} ± {number(score.se)}"


def _row(r: VqaResult) -> dict[str, Any]:
    counted = r.yes_no
    found: dict[str, Any] = {"method": r.label, "recipe": r.recipe}
    for name, score in (("score", r.score), ("diff", r.diff), ("diff_f1", r.diff_f1)):
        found |= {name: None if score is None else score.mean, f"{name}_se": None if score is None else score.se}
    for name, attribute in (("precision", "precision"), ("recall", "recall"), ("f1", "f1"), ("yes_share", "yes")):
        found[name] = None if counted is None else getattr(counted, attribute)
    found["f1_se"] = None if counted is None else jackknife(counted.without)
    found |= {"agreement": r.agreement, "rows_in": r.rows[0], "rows_out": r.rows[1], "gmac_ratio": r.ratio}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _write_answers(path: Path, results: list[VqaResult], questions: list[Question]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for r in results:
            for question, answer, score in zip(questions, r.answers, r.scores.tolist()):
                line = {"id": question.name, "method": r.label, "answer": answer, "score": score}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
