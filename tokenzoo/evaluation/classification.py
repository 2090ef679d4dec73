"""Accuracy of several runs over the same images, and their paired differences to the unpatched model.

Models that answer with a map of features (SAM's image encoders) have no answer for an image: what is measured of them
is the agreement with the unpatched model, place by place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..apply.patch import recipe
from .distributed import ALONE, World
from .memory import Pieces
from .runs import Candidate, Precision, Run, forward_counted, image_size, param_count, prepare

_log = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """A mean in percent and its standard error.

    Attributes:
        mean: percent.
        se: percent points; None with fewer than two values.
    """

    mean: float
    se: float | None


@dataclass(frozen=True)
class Accuracy:
    """What one run reached.

    Attributes:
        method: names of the methods, "unpatched" without one.
        method_kwargs: options as given.
        label: both in one short text.
        recipe: what `tokenzoo.patch_model` takes to get this run again, solved strengths included; None if unpatched.
        n_images: images seen.
        top1, top5: share of right answers; None for a map.
        diff_top1, diff_top5: this run minus the unpatched model on the same images; None for the unpatched model.
        agreement: percent of images with the unpatched model's prediction; of a map, percent of its places with the
            same strongest channel.
        tokens_out: mean tokens that reach the head (prefix included, padding not); None if unknown.
        gmacs: 1e9 multiply-adds an image (of a random one where they depend on the image).
        attn_impl: "fused" or "unfused"; "" for an unpatched backbone that is not served.
        param_count: millions.
    """

    method: str
    method_kwargs: dict[str, Any]
    label: str
    recipe: dict[str, Any] | None
    n_images: int
    top1: Estimate | None
    top5: Estimate | None
    diff_top1: Estimate | None
    diff_top5: Estimate | None
    agreement: float
    tokens_out: float | None
    gmacs: float
    attn_impl: str
    param_count: float

    def row(self) -> dict[str, Any]:
        """Flat values under timm's column names; `top1_err` is 100 - top1 as there, `top1_se` the standard error."""
        t1, t5, d1, d5 = self.top1, self.top5, self.diff_top1, self.diff_top5
        return {
            "method": self.method,
            "method_kwargs": self.method_kwargs,
            "top1": None if t1 is None else round(t1.mean, 4),
            "top1_err": None if t1 is None else round(100 - t1.mean, 4),
            "top1_se": None if t1 is None else _rounded(t1.se),
            "top5": None if t5 is None else round(t5.mean, 4),
            "top5_err": None if t5 is None else round(100 - t5.mean, 4),
            "top5_se": None if t5 is None else _rounded(t5.se),
            "param_count": self.param_count,
            "tokens_out": _rounded(self.tokens_out, 2),
            "attn_impl": self.attn_impl,
            "gmacs": round(self.gmacs, 4),
            "n_images": self.n_images,
            "diff_top1": None if d1 is None else round(d1.mean, 4),
            "diff_top1_se": None if d1 is None else _rounded(d1.se),
            "diff_top5": None if d5 is None else round(d5.mean, 4),
            "diff_top5_se": None if d5 is None else _rounded(d5.se),
            "agreement": round(self.agreement, 4),
            "recipe": self.recipe,
        }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error, sample standard deviation / sqrt(n), in percent.

    Args:
        values: one per image [n]: 0 or 1 for right answers, -1, 0 or 1 for paired differences.
    """
    values = values.double()
    se = None if len(values) < 2 else 100 * values.std().item() / len(values) ** 0.5
    return Estimate(100 * values.mean().item(), se)


@dataclass
class _Tally:
    """What one run answered, image by image."""

    top1: list[Tensor] = field(default_factory=list)
    top5: list[Tensor] = field(default_factory=list)
    answer: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    not_finite: int = 0

    @classmethod
    def joined(cls, parts: Sequence[_Tally]) -> _Tally:
        """All parts as one, in their order, one tensor of each kind."""
        names = ("top1", "top5", "answer", "agrees", "tokens")
        lists = {name: [tensor for part in parts for tensor in getattr(part, name)] for name in names}
        joined = {name: [torch.cat(found)] if found else [] for name, found in lists.items()}
        return cls(**joined, not_finite=sum(part.not_finite for part in parts))

    def add(self, answers: Tensor, tokens: Tensor | None, targets: Tensor, base: Tensor | None = None) -> None:
        """Takes scores [B, classes], or a map [B, C, H, W] and `base`, the unpatched model's strongest channels."""
        self.not_finite += int((~answers.flatten(1).isfinite()).any(1).sum())
        if tokens is not None:
            self.tokens.append(tokens.cpu())
        if answers.dim() == 4:
            strongest = answers.argmax(1)
            same = torch.ones_like(strongest, dtype=torch.bool) if base is None else strongest == base
            self.agrees.append(same.flatten(1).double().mean(1))
            return
        best = answers.topk(min(5, answers.shape[1]), dim=1).indices
        hits = best == targets.unsqueeze(1)
        self.top1.append(hits[:, 0])
        self.top5.append(hits.any(1))
        self.answer.append(best[:, 0])


def evaluate(
    model: nn.Module,
    runs: Sequence[Run],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    input_size: tuple[int, int, int] | None = None,
    precision: Precision | None = None,
    progress: bool | None = False,
    world: World = ALONE,
) -> list[Accuracy]:
    """Top-1 and top-5 accuracy of the unpatched model and of every run, each batch going through all of them.

    The model is not changed. When memory runs out the batch is halved and the same images are tried again.

    Args:
        model: unpatched, on the device to use.
        runs: what to compare with it.
        loader: batches of images [B, C, H, W] and class indices [B]; a `PictureLoader`, or any DataLoader. Models that
            answer with a map do not look at the indices.
        input_size: channels, height and width that multiply-adds are counted at; the model's own by default.
        precision: number formats, the model's own by default.
        progress: bar on stderr; None shows it on a terminal only.
        world: processes that share the images, from `tokenzoo.evaluation.distributed.join`; `loader` gives this one's.

    Returns:
        One result a run, the same in all processes, the unpatched model first.

    Raises:
        ValueError: no images, a target the model has no class for, a run that cannot be reached, a patched model.
        TypeError: a model that is not served.
    """
    from tqdm import tqdm

    precision = (precision or Precision()).of(model)
    candidates = prepare(model, runs, input_size or image_size(model), precision.dtype)
    device = next(model.parameters()).device
    pieces = Pieces(device)
    tallies = [_Tally() for _ in candidates]
    hidden = True if not world.main else None if progress is None else not progress
    bar = tqdm(total=length_hint(loader) or None, unit="batch", disable=hidden)
    with world.together(), torch.inference_mode(), bar:
        for images, targets in loader:
            base = None  # what the unpatched model answers at every place of a map
            for candidate, tally in zip(candidates, tallies):
                answers, tokens = _answers(candidate, pieces, images, device, precision)
                _check_answers(answers, base, candidate.run.label)
                if answers.dim() == 2:
                    _check_targets(targets, answers.shape[1])
                tally.add(answers, tokens, targets, base)
                if answers.dim() == 4 and base is None:
                    base = answers.argmax(1)
            bar.update()
    if world.size > 1:
        parts = world.gather([_Tally.joined([tally]) for tally in tallies])
        tallies = [_Tally.joined(own) for own in zip(*parts)]
    if not tallies[0].top1 and not tallies[0].agrees:
        raise ValueError("there are no images to evaluate; give a folder with at least one readable image")
    return _results(candidates, tallies)


def _answers(
    candidate: Candidate, pieces: Pieces, images: Tensor, device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor | None]:
    """Scores or maps on the host in float32 [B, C, ...], and tokens that reach the head [B]."""

    def step(piece: Tensor) -> tuple[Tensor, Tensor | None]:
        with precision.autocast(device):
            logits, tokens = forward_counted(candidate.model, piece.to(device, precision.dtype))
        return logits.float().cpu(), tokens

    parts = pieces.run(step, images, candidate.run.label)
    tokens = None if parts[0][1] is None else torch.cat([t for _, t in parts])
    return torch.cat([logits for logits, _ in parts]), tokens


def _check_answers(answers: Tensor, base: Tensor | None, label: str) -> None:
    if answers.dim() not in (2, 4):
        raise ValueError(
            f"{label}: the model answers with tokens {tuple(answers.shape[1:])} and no scores to compare; create it "
            "with pooling and classes"
        )
    if base is not None and answers.shape[2:] != base.shape[1:]:
        raise ValueError(
            f"{label}: a map of {tuple(answers.shape[2:])} cannot be held against the unpatched model's "
            f"{tuple(base.shape[1:])}; give the recipe dense=True"
        )


def _check_targets(targets: Tensor, classes: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"an image has class index {low if low < 0 else high}, the model answers with {classes} classes; give "
            "--num-classes or a --class-map that fits the model"
        )


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def _results(candidates: list[Candidate], tallies: list[_Tally]) -> list[Accuracy]:
    base1, base5, base_answer = (_joined(part) for part in (tallies[0].top1, tallies[0].top5, tallies[0].answer))
    results = []
    for candidate, tally in zip(candidates, tallies):
        run, first = candidate.run, candidate is candidates[0]
        top1, top5 = _joined(tally.top1), _joined(tally.top5)
        maps = top1 is None
        agrees = torch.cat(tally.agrees) if maps else torch.cat(tally.answer) == base_answer
        if tally.not_finite:
            _log.warning("%s: scores of %d images are not finite; try --dtype float32", run.label, tally.not_finite)
        results.append(
            Accuracy(
                method=run.name,
                method_kwargs=run.settings(),
                label=run.label,
                recipe=recipe(candidate.model) if is_patched(candidate.model) else None,
                n_images=len(agrees),
                top1=None if maps else estimate(top1),
                top5=None if maps else estimate(top5),
                diff_top1=None if first or maps else estimate(top1.double() - base1.double()),
                diff_top5=None if first or maps else estimate(top5.double() - base5.double()),
                agreement=estimate(agrees).mean,
                tokens_out=torch.cat(tally.tokens).double().mean().item() if tally.tokens else None,
                gmacs=candidate.gmacs,
                attn_impl=candidate.attn_impl,
                param_count=param_count(candidate.model),
            )
        )
    return results
