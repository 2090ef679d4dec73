"""Answers of a vision-language model with recipes against those without, question by question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..apply.patch import patch_model
from ..vlm.family import vlm_family_of
from ..vlm.report import vlm_report
from .vlm_speed import shared_copy
from .vqa_answers import Answerer
from .vqa_data import Question, open_images
from .vqa_metrics import METRICS, Score, YesNo, jackknife, mean, plain, says_yes, yes_no


class VqaResult(NamedTuple):
    """What one run reached; differences are to the unpatched model on the same questions.

    Attributes:
        label: of the run.
        recipe: what `tokenzoo.patch_model` takes to get it again; None if unpatched.
        score: mean of the metric; accuracy for yes or no.
        diff: of the scores; None for the unpatched model.
        agreement: percent of questions that are answered alike.
        yes_no: of the metric yesno, else None.
        diff_f1: percent points and their standard error; None for the unpatched model and other metrics.
        rows: mean rows of a prompt in front of the language model, and behind its last layer, by formula.
        ratio: of the language model's multiply-adds of reading the prompts to those of the unpatched one.
        answers: of every question.
        scores: of every question [n].
    """

    label: str
    recipe: dict[str, Any] | None
    score: Score
    diff: Score | None
    agreement: float
    yes_no: YesNo | None
    diff_f1: Score | None
    rows: tuple[float, float]
    ratio: float
    answers: list[str]
    scores: np.ndarray


def evaluate_vqa(
    model: nn.Module,
    processor: Any,
    runs: Sequence[tuple[str, Any, dict[str, Any]]],
    questions: Sequence[Question],
    metric: str = "exact",
    batch_size: int = 1,
    max_new_tokens: int = 16,
    template: str = "{question}",
) -> list[VqaResult]:
    """Asks the unpatched model and every run the same questions, batch by batch.

    Args:
        model: unpatched, in eval mode; its weights are shared by all copies.
        processor: of the model.
        runs: label, method and options of `tokenzoo.patch_model`, one per recipe.
        questions: from `read_questions`.
        metric: a name of `METRICS`.
        batch_size: prompts at a time; halved when memory runs out.
        max_new_tokens: at most, per answer.
        template: what is asked, with {question} in it.

    Returns:
        The unpatched model, then a result per run.

    Raises:
        ValueError: unknown metric, numbers that are not positive, a template without {question}, answers that the
            metric cannot use, an image that cannot be read.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size={batch_size}, max_new_tokens={max_new_tokens}; give positive numbers")
    if "{question}" not in template:
        raise ValueError(f"the template {template!r} has no {{question}} in it, so that nothing would be asked")
    for question in questions:
        try:
            METRICS[metric]("", question.answers)
        except ValueError as error:
            raise ValueError(f"question {question.name}: {error}") from error
    named: list[tuple[str, Any, dict[str, Any]]] = [("unpatched", None, {}), *runs]
    models = [shared_copy(model) for _ in named]
    for each, (_, method, options) in zip(models, named):
        if method is not None:
            patch_model(each, method, **options)
    sides = [Answerer(each, processor) for each in models]
    answers: list[list[str]] = [[] for _ in named]
    prompts: list[tuple[tuple[int, ...], int]] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        asked = [_conversation(each, template) for each in batch]
        for one, found in zip(sides, answers):
            found += one(asked, max_new_tokens=max_new_tokens)
        prompts += _sizes(model, sides[0].inputs(asked), [len(each.images) for each in batch])
    return list(_results(named, models, answers, questions, metric, prompts))


def _conversation(question: Question, template: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in open_images(question)]
    text = template.replace("{question}", question.text)
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _sizes(model: nn.Module, inputs: dict[str, Tensor], images: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Rows of each image of each prompt (placeholders that stand in a row), and of the rest of it."""
    family = vlm_family_of(model)
    ids = inputs["input_ids"].cpu()
    visual = torch.isin(ids, torch.tensor(family.placeholders(family.inner(model).config)))
    real = inputs.get("attention_mask", torch.ones_like(ids)).cpu().bool()
    for own, there, count in zip(visual, real, images):
        edges = torch.diff(own.long(), prepend=torch.zeros(1, dtype=torch.int64)) == 1
        group = edges.cumsum(0)[own]
        sizes = torch.bincount(group)[1:].tolist() if len(group) else []
        if len(sizes) < count:  # nothing between them: images of equal size, others have marks around theirs
            sizes = [len(part) for part in np.array_split(np.arange(len(group)), count)]
        yield tuple(sizes), int(there.sum()) - sum(sizes)


def _costs(model: nn.Module, prompts: Sequence[tuple[tuple[int, ...], int]]) -> tuple[tuple[float, float], float]:
    """Mean rows in and out, and the share of multiply-adds."""
    known: dict[Any, Any] = {}
    for sizes, text in prompts:
        if (sizes, text) not in known:
            known[sizes, text] = vlm_report(model, text=text, images=list(sizes))
    found = [known[prompt] for prompt in prompts]
    rows = tuple(float(np.mean([getattr(r.layers[i], name) for r in found])) for i, name in
                 ((0, "rows_in"), (-1, "rows_out")))  # fmt: skip
    return rows, sum(r.prefill for r in found) / sum(r.unpatched for r in found)


def _results(
    named: Sequence[tuple[str, Any, dict[str, Any]]], models: Sequence[nn.Module], answers: list[list[str]],
    questions: Sequence[Question], metric: str, prompts: Sequence[tuple[tuple[int, ...], int]],
) -> Iterator[VqaResult]:  # fmt: skip
    base: tuple[np.ndarray, YesNo | None] | None = None
    for (label, _, _), model, found in zip(named, models, answers):
        scores = np.array([METRICS[metric](answer, q.answers) for answer, q in zip(found, questions)])
        counted = None
        if metric == "yesno":
            said = np.array([says_yes(answer) for answer in found])
            right = np.array([plain(q.answers[0]) == "yes" for q in questions])
            counted = yes_no(said, right, [q.category for q in questions])
        diff = diff_f1 = None
        if base is None:
            base = scores, counted
        else:
            diff = mean(scores - base[0])
            if counted is not None and base[1] is not None:
                diff_f1 = Score(counted.f1 - base[1].f1, jackknife(counted.without - base[1].without))
        alike = 100 * float(np.mean([plain(a) == plain(b) for a, b in zip(found, answers[0])]))
        recipe = getattr(model, "tokenzoo_recipe", None)
        rows, ratio = _costs(model, prompts)
        yield VqaResult(
            label, None if recipe is None else recipe.to_dict(), mean(scores), diff, alike, counted, diff_f1, rows,
            ratio, found, scores,
        )  # fmt: skip
