"""`tokenzoo.tune`: which method, how strong, in which blocks, for one model on its own images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inspect import describe, is_patched
from ..adapters.wrappers import backbone_of
from ..evaluation.distributed import ALONE, World
from ..evaluation.runs import Precision, shared_copy
from .budget import Budget, Fitter, Timer
from .candidates import chosen_methods
from .clock import Clock
from .images import fingerprint, read_images, split
from .judge import Judge
from .outcome import Tuning, make_rows
from .scores import answer_of, choose_score
from .search import Search
from .state import State

_MEASURED = 32  # images of the search that costs are measured on where they follow the images


def tune(
    model: nn.Module,
    images: Any,
    *,
    flops: float | Sequence[float] | None = None,
    latency: float | Sequence[float] | None = None,
    labels: Any = None,
    methods: Sequence[str] | None = None,
    pairs: bool = False,
    refine: int = 24,
    held_out: float = 0.5,
    seed: int = 0,
    budget_minutes: float | None = None,
    state: str | Path | None = None,
    batch_size: int = 64,
    latency_batch: int = 1,
    latency_rounds: int = 7,
    precision: Precision | None = None,
    agreement: str | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    progress: bool | None = None,
    world: World = ALONE,
) -> Tuning:
    """Searches methods and schedules for a model on images, and reports what it found on images it did not look at.

    All registered methods that need no training take part, each as it comes, in every block, early and late, all
    solved for the budget. Successive halving narrows them down by more and more images; coordinate descent then moves
    strength between the blocks of the best ones, at the same cost. The model is not changed.

    Args:
        model: a served model, unpatched, in eval mode, on the device to use.
        images: normalised images of the size that counts: a tensor [N, C, H, W], or a sequence of tensors [C, H, W] or
            of pairs with a label.
        flops: share of the unpatched multiply-adds that a recipe may cost at most; several are searched one by one.
        latency: the same of the time that a batch takes, measured in turn with the unpatched model; one of the two.
        labels: class indices [N]; without them recipes are judged by agreement with the unpatched model: -KL of the
            class scores, or the cosine of features and of maps, which all tokens are given back for.
        methods: names to search over, all registered ones by default.
        pairs: also try pairs of the best methods, one in the first half of the blocks and one in the second.
        refine: changes that coordinate descent may try on each of the two best recipes; 0 for none.
        held_out: share of the images that only the report looks at.
        seed: of the split.
        budget_minutes: time for all of it; when it is up, the best so far is reported.
        state: JSON-lines file of what was measured; a search that was killed goes on from there.
        batch_size: images per step.
        latency_batch: images per step that is timed.
        latency_rounds: steps of each model that are timed.
        precision: number formats, the model's own by default.
        agreement: "kl" or "cosine" in place of what the answers of the model suggest.
        forward: runs the model on a batch, by default `model(images)`.
        progress: bar on stderr; None shows it on a terminal only.
        world: processes that share the work, from `tokenzoo.evaluation.distributed.join`; all have all images.

    Returns:
        The table, the recipes, and what took no part.

    Raises:
        ValueError, TypeError: bad input, a model that is not served or is patched, a budget that nothing can reach.
    """
    from tqdm import tqdm

    budgets = read_budgets(flops, latency)
    names = chosen_methods(methods)
    _check_numbers(refine, budget_minutes, batch_size, latency_batch, latency_rounds)
    images, labels = read_images(images, labels)
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already; call tokenzoo.unpatch_model(model) first")
    parts = split(len(images), held_out, seed)
    precision = (precision or Precision()).of(model)
    if precision.dtype is not next(model.parameters()).dtype:  # copies that share weights would convert them too
        model = copy.deepcopy(model).to(precision.dtype)
    own, plain = shared_copy(model).eval(), shared_copy(model).eval()
    info = describe(backbone_of(own))  # refuses models that are not served
    forward = forward or _call
    device = next(own.parameters()).device
    with torch.inference_mode(), precision.autocast(device):
        first = answer_of(forward(own, images[:2].to(device, precision.dtype)), own)
    score = choose_score(first, labels, agreement)
    about = {
        "model": type(backbone_of(model)).__name__,
        "weights": fingerprint([*model.parameters(), *model.buffers()]),
        "images": fingerprint([images, *([] if labels is None else [labels])]),
        "split": [len(parts.search), len(parts.held_out), seed],
        "score": score.kind,
        "precision": str(precision),
    }
    if budgets[0].kind == "latency":
        about["timing"] = [str(device), torch.get_num_threads(), latency_batch]
    kept = State(state, about, world)
    hidden = True if not world.main else None if progress is None else not progress
    bar = tqdm(unit="image", disable=hidden)
    try:
        tick = partial(_tick, bar, world.size)
        judge = Judge(own, images, labels, parts, score, precision, batch_size, forward, kept, tick)
        timer = None
        if budgets[0].kind == "latency":
            batch = images[:1].expand(latency_batch, -1, -1, -1).to(device, precision.dtype).contiguous()
            timer = Timer(plain, own, batch, precision, latency_rounds, kept, forward)
        some = images[list(parts.search[:_MEASURED])].to(device, precision.dtype)
        fitter = Fitter(own, tuple(images.shape[-2:]), first.values.dim() > 2, timer, some)
        clock = Clock(budget_minutes, kept.seconds, judge)
        search = Search(judge, fitter, info, names, pairs, refine, clock, bar)
        findings = [found for budget in budgets for found in search.run(budget)]
        bar.set_description("held-out images")
        rows = make_rows(findings, judge.final, score)
    finally:
        bar.close()
        kept.close()
    return Tuning(
        rows=tuple(rows),
        refused=search.refused,
        score=score.kind,
        title=score.title,
        split=parts,
        tried=search.tried,
        stopped=clock.is_up,
        seconds=round(kept.seconds, 1),
    )


def _tick(bar: Any, processes: int, count: int) -> None:
    bar.update(processes * count)  # the others are about as far


def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def read_budgets(flops: Any, latency: Any) -> list[Budget]:
    """The budgets to search for, largest first.

    Raises:
        ValueError: none, both kinds, or a share outside (0, 1].
    """
    if (flops is None) == (latency is None):
        given = "both were given" if flops is not None else "neither was given"
        raise ValueError(f"tune needs either flops=... or latency=..., such as flops=0.6; {given}")
    kind, value = ("flops", flops) if latency is None else ("latency", latency)
    shares = list(value) if isinstance(value, (list, tuple)) else [value]
    for share in shares or [None]:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            what = "multiply-adds" if kind == "flops" else "time"
            raise ValueError(f"{kind}={share!r}; give a share of the unpatched {what} in (0, 1], such as 0.6")
    return [Budget(kind, share) for share in sorted(set(shares), reverse=True)]


def _check_numbers(refine: int, minutes: float | None, *positive: int) -> None:
    names = ("batch_size", "latency_batch", "latency_rounds")
    for name, value, least in (("refine", refine, 0), *((n, v, 1) for n, v in zip(names, positive))):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r}; give a whole number of at least {least}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"budget_minutes={minutes!r} has to be positive")
