"""Scores of answers in words: exact, by ten people, yes or no; means, paired differences and their standard errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_NUMBERS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")
_LEAST_PEOPLE = 4


def plain(text: str) -> str:
    """Small letters, single spaces, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def vqa_plain(text: str) -> str:
    """An answer as VQA compares it: no punctuation, no articles, numbers in figures.

    Apostrophes go, in place of the official list of contractions ("dont" is "don't").
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold().replace("'", ""))
    text = re.sub(r"\.(?!\d)", "", _MARKS.sub(" ", text))
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in ("a", "an", "the"))


def exact(answer: str, right: Sequence[str]) -> float:
    """1 where an answer is one of the right ones, by `plain`."""
    return float(plain(answer) in {plain(each) for each in right})


def vqa(answer: str, right: Sequence[str]) -> float:
    """How many of the others agree, at most 3 counting in full, as a mean over leaving each person out.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015.

    Raises:
        ValueError: fewer than four people, of whom never three agree when one is left out.
    """
    if len(right) < _LEAST_PEOPLE:
        raise ValueError(f"metric vqa compares with what ten people said, {len(right)} answers are given; use exact")
    given = vqa_plain(answer)
    same = np.array([vqa_plain(each) == given for each in right], dtype=np.float64)
    return float(np.minimum((same.sum() - same) / 3, 1).mean())


def says_yes(answer: str) -> bool:
    """Whether the first sentence has neither "no" nor "not".

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), EMNLP 2023.
    """
    words = answer.casefold().partition(".")[0].replace(",", "").split()
    return "no" not in words and "not" not in words


def yesno(answer: str, right: Sequence[str]) -> float:
    """1 where yes or no is right.

    Raises:
        ValueError: the right answer is neither.
    """
    if len(right) != 1 or plain(right[0]) not in ("yes", "no"):
        raise ValueError(f'metric yesno needs the answer "yes" or "no", it is {list(right)}')
    return float(says_yes(answer) == (plain(right[0]) == "yes"))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": exact, "vqa": vqa, "yesno": yesno}


class Score(NamedTuple):
    """Percent and its standard error (percent points), None with fewer than two questions."""

    mean: float
    se: float | None


def mean(values: np.ndarray) -> Score:
    """Mean and standard error of scores or paired differences [n]."""
    se = None if len(values) < 2 else 100 * float(values.std(ddof=1)) / len(values) ** 0.5
    return Score(100 * float(values.mean()), se)


class YesNo(NamedTuple):
    """Of "yes" as the one that is looked for, percent: means over categories of what each one has by itself.

    Attributes:
        precision: of answers "yes", how many are right.
        recall: of right answers "yes", how many are found.
        f1: the harmonic mean of both.
        yes: how many answers are "yes".
        without: f1 with each question left out [n], of which the standard error is made (jackknife).
    """

    precision: float
    recall: float
    f1: float
    yes: float
    without: np.ndarray


def yes_no(said: np.ndarray, right: np.ndarray, category: Sequence[str]) -> YesNo:
    """What POPE counts.

    Args:
        said: whether the answer is yes [n] bool.
        right: whether it should be [n] bool.
        category: of each question; POPE means over random, popular and adversarial.
    """
    names, group = np.unique(list(category), return_inverse=True)
    cells = np.stack([said & right, said & ~right, ~said & right], 1).astype(np.float64)  # true, false, missed
    counts = np.stack([cells[group == g].sum(0) for g in range(len(names))])
    f1 = _f1(counts)
    change = (_f1(counts[group] - cells) - f1[group]) / len(names)
    true, false, missed = counts.T
    precision, recall = (_share(true, true + other) for other in (false, missed))
    return YesNo(
        100 * float(precision.mean()), 100 * float(recall.mean()), 100 * float(f1.mean()), 100 * float(said.mean()),
        100 * (f1.mean() + change),
    )  # fmt: skip


def jackknife(without: np.ndarray) -> float | None:
    """Standard error of a figure, or of a difference of two, from its values with each question left out [n]."""
    n = len(without)
    return None if n < 2 else float(np.sqrt((n - 1) * without.var()))


def _f1(counts: np.ndarray) -> np.ndarray:
    true, false, missed = np.moveaxis(counts, -1, 0)
    return _share(2 * true, 2 * true + false + missed)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
