"""How good an answer is, image by image: right or wrong, or how far it agrees with the unpatched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AGREEMENTS = ("kl", "cosine")
_WORST = 100.0  # nats, for answers that are not finite
_FIELDS = ("logits", "logits_per_image", "image_embeds", "pooler_output", "last_hidden_state")


class Answer(NamedTuple):
    """What a model says about some images.

    Attributes:
        values: [B, K], tokens [B, N, C] or maps [B, C, H, W], float32, on the host.
        classes: whether they are scores of classes.
    """

    values: Tensor
    classes: bool


class Score(NamedTuple):
    """What is compared.

    Attributes:
        kind: "accuracy", "kl" or "cosine".
        title: for tables.
        percent: whether values are shares.
    """

    kind: str
    title: str
    percent: bool = False

    @property
    def agreement(self) -> bool:
        """Whether it compares with what the unpatched model says."""
        return self.kind != "accuracy"


SCORES = {
    "accuracy": Score("accuracy", "top-1 %", True),
    "kl": Score("kl", "-KL"),
    "cosine": Score("cosine", "cosine"),
}


def answer_of(output: Any, model: nn.Module) -> Answer:
    """Reads what a model returned: a tensor, or the usual field of an output of several.

    Raises:
        TypeError: nothing that can be compared.
    """
    field = "values"
    if not isinstance(output, Tensor):
        named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        field = next((name for name in _FIELDS if isinstance(named.get(name), Tensor)), None)
        if field is None:
            raise TypeError(
                f"{type(model).__name__} returns {type(output).__name__}, in which no logits or features were found; "
                "give forward=..., a function of model and images that returns a tensor"
            )
        output = named[field]
    if output.dim() not in (2, 3, 4):
        raise TypeError(f"{type(model).__name__} answers with shape {tuple(output.shape)}; give forward=...")
    scores = field.startswith("logits") or field == "values" and getattr(model, "num_classes", None) != 0
    return Answer(output.float().cpu(), scores and output.dim() == 2)


def choose_score(answer: Answer, labels: Tensor | None, agreement: str | None) -> Score:
    """The score for a model, by what it answers with and whether there are labels.

    Raises:
        ValueError: labels for a model without classes, labels that are none of its classes, or an unknown agreement.
    """
    if agreement is not None and agreement not in AGREEMENTS:
        raise ValueError(f"agreement={agreement!r}; give one of {', '.join(AGREEMENTS)}, or leave it out")
    if labels is None:
        return SCORES[agreement or ("kl" if answer.classes else "cosine")]
    if agreement is not None:
        raise ValueError(f"agreement={agreement!r} is for images without labels; leave one of the two out")
    if not answer.classes:
        raise ValueError(
            f"labels were given, but the model answers with {tuple(answer.values.shape[1:])} per image and no classes; "
            "leave labels out to search by agreement with the unpatched model"
        )
    low, high, classes = int(labels.min()), int(labels.max()), answer.values.shape[1]
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"labels hold class {wrong}, but the model answers with classes 0 to {classes - 1}")
    return SCORES["accuracy"]


def final(score: Score, answer: Tensor, reference: Tensor | None, labels: Tensor | None) -> Tensor:
    """The figure that is reported, per image [B]: 1 for a right answer and 0 for a wrong one, -KL, or cosine."""
    if score.kind == "accuracy":
        return (answer.argmax(1) == labels).float()
    return _agreement(score, answer, reference)


def search(score: Score, answer: Tensor, reference: Tensor | None, labels: Tensor | None) -> Tensor:
    """The figure that a search goes by, per image [B].

    Accuracy moves in steps of one image, and few images decide little; the mean of right or wrong and of the
    probability that the right class gets moves with it, and varies less.
    """
    if score.kind == "accuracy":
        share = answer.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1).nan_to_num(0.0)
        return ((answer.argmax(1) == labels).float() + share) / 2
    return _agreement(score, answer, reference)


def _agreement(score: Score, answer: Tensor, reference: Tensor) -> Tensor:
    if answer.shape != reference.shape:
        raise ValueError(
            f"an answer of {tuple(answer.shape[1:])} per image cannot be held against the unpatched model's "
            f"{tuple(reference.shape[1:])}"
        )
    if answer.dim() == 3:  # channels of tokens stand last
        answer, reference = answer.transpose(1, 2), reference.transpose(1, 2)
    if score.kind == "kl":
        if answer.shape[1] == 1:  # one score against none
            answer, reference = (torch.cat([torch.zeros_like(x), x], 1) for x in (answer, reference))
        ours, theirs = F.log_softmax(answer, 1), F.log_softmax(reference, 1)
        found = -(theirs.exp() * (theirs - ours)).sum(1)
        worst = -_WORST
    else:
        found, worst = F.cosine_similarity(answer, reference, dim=1), -1.0
    found = found.flatten(1).mean(1) if found.dim() > 1 else found
    return torch.nan_to_num(found, nan=worst, posinf=worst, neginf=worst)
