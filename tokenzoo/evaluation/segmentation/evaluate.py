"""mIoU of several runs over the same images, and their paired differences to the unpatched model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...adapters.inspect import is_patched
from ..broken import Broken
from ..distributed import ALONE, World
from ..memory import free_memory, is_out_of_memory
from ..runs import Candidate, Precision, Run, shared_copy
from .confusion import IGNORE, areas, confusion_matrix
from .costs import DenseMacs, dense_macs, dense_speed
from .inference import Inference, Predictor
from .loading import first_crops, read_samples
from .results import Outcome, SegmentationReport, summarize
from .samples import Sample, SegmentationDataset
from .state import Row, StateFile, run_keys

_log = logging.getLogger(__name__)


def default_inference(model: nn.Module, kind: str = "folder", batch_size: int = 1) -> Inference:
    """Windows as the model was trained, images resized as is usual for the data set.

    Args:
        model: `model.window` and `model.stride` decide; without them images go through in one piece.
        kind: of the data set.
        batch_size: windows at a time.
    """
    window, stride = getattr(model, "window", None), getattr(model, "stride", None)
    if window is None:
        return Inference(batch_size=batch_size)
    limits = {
        "ade20k": (4 * window, window),
        "cityscapes": (2048, 1024),
        "pascal_context59": (4160, 520),
        "pascal_context60": (4160, 520),
    }.get(kind)
    return Inference("segmenter", window, stride or window, limits, batch_size=batch_size)


def evaluate_segmentation(
    model: nn.Module,
    runs: Sequence[Run],
    dataset: SegmentationDataset,
    *,
    inference: Inference | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    precision: Precision | None = None,
    state: str | Path | None = None,
    skip_broken: bool = False,
    workers: int = 0,
    speed_rounds: int = 0,
    speed_batch: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool | None = False,
    world: World = ALONE,
) -> SegmentationReport:
    """Scores of the unpatched model and of every run over a data set, each image going through all of them.

    Counts are summed over the whole data set before any share is taken. The model is not changed. When memory runs
    out, fewer windows go through at a time and the image is tried again.

    Args:
        model: unpatched, on the device to use; normalised images [B, 3, h, w] -> class logits [B, K, h, w].
        runs: what to compare with it.
        dataset: from `tokenzoo.evaluation.segmentation.data.open_dataset`.
        inference: how images go through; None for `default_inference`.
        mean: of red, green, blue, 0 to 1; the model's own by default.
        std: likewise.
        precision: number formats, the model's own by default.
        state: folder for counts of the images that are done; a run that was ended goes on from there.
        skip_broken: leave images out that cannot be used, and list them in the report.
        workers: processes that decode, 0 decodes in this one.
        speed_rounds: how often each run is timed on the same crops, round robin; 0 for not at all.
        speed_batch: crops a step of that.
        resamples: bootstrap draws for standard errors.
        seed: of the draws.
        progress: bar on stderr; None shows it on a terminal only.
        world: processes that share the images, from `tokenzoo.evaluation.distributed.join`; the first one is timed.

    Raises:
        ValueError: a broken image, no images, class numbers that do not fit, a run that cannot be reached, a model
            that is patched already.
        TypeError: a model that is not served.
    """
    from tqdm import tqdm

    dataset = _fitting(dataset, model)
    if not skip_broken and dataset.without_mask:
        names = dataset.without_mask
        raise ValueError(
            f"{len(names)} of {len(dataset)} images have no mask, such as {names[0]}; add the masks, or leave such "
            "images out with --skip-broken"
        )
    precision = (precision or Precision()).of(model)
    inference = inference or default_inference(model, dataset.kind)
    candidates = _candidates(model, runs, precision)
    device = next(model.parameters()).device
    mean, std = (_statistic(model, name, value) for name, value in (("mean", mean), ("std", std)))
    predictors = [Predictor(c.model, mean, std, inference, device, precision.dtype) for c in candidates]
    crops = first_crops(dataset, predictors[0], max(4, speed_batch))
    macs = [dense_macs(c.model, crops) for c in candidates]  # before hours of work: a recipe may not fit the crop
    keys = run_keys(model, [c.model for c in candidates], dataset, inference, precision, mean, std, device)
    folder = None if state is None else Path(state)
    files: list[StateFile] = []
    skipped: list[Broken] = []
    try:
        for candidate, key in zip(candidates, keys):
            files.append(StateFile(folder, candidate.run.label, key, dataset.num_classes, world.rank))
        _exchange(files, world)  # before anyone writes
        todo = [i for i, pair in enumerate(dataset.pairs) if any(pair.name not in f.rows for f in files)]
        done = len(dataset) - len(todo)
        if done:
            _log.info("%d of %d images are counted already in %s", done, len(dataset), folder)
        hidden = True if not world.main else None if progress is None else not progress
        bar = tqdm(total=len(dataset), initial=done, unit="image", disable=hidden)
        with world.together(), torch.inference_mode(), bar:
            for sample in read_samples(dataset, [todo[i] for i in world.share(len(todo))], workers):
                if isinstance(sample, Broken):
                    if not skip_broken:
                        raise ValueError(_broken(sample, folder))
                    skipped.append(sample)
                else:
                    predictors = _count(sample, predictors, candidates, files, dataset.num_classes, precision)
                bar.update(world.size)
        _exchange(files, world)
        skipped = [broken for part in world.gather(skipped) for broken in part]
    finally:
        for file in files:
            file.close()
    lost = {name for name, _ in skipped}
    names = [pair.name for pair in dataset.pairs if pair.name not in lost]
    if not names:
        raise ValueError(f"none of the {len(dataset)} images could be used; the first: {skipped[0].reason}")
    if skipped:
        _log.warning("%d broken images left out: %s", len(skipped), ", ".join(name for name, _ in skipped))
    outcomes = [_outcome(*of_run, names) for of_run in zip(candidates, files, macs)]
    timed = speed_rounds and world.main
    speeds = dense_speed(candidates, crops[:speed_batch], speed_rounds, precision) if timed else None
    results = summarize(outcomes, speeds, resamples, seed)
    classes = dataset.classes or getattr(model, "classes", None) or [str(k) for k in range(dataset.num_classes)]
    return SegmentationReport(results, skipped, done, list(classes), tuple(crops.shape[-2:]), predictors[0].inference)


def _exchange(files: Sequence[StateFile], world: World) -> None:
    """Gives every process the rows of all of them."""
    if world.size > 1:
        for part in world.gather([file.rows for file in files]):
            for file, rows in zip(files, part):
                file.rows.update(rows)


def _fitting(dataset: SegmentationDataset, model: nn.Module) -> SegmentationDataset:
    """The data set, its number of classes known and the model's."""
    served = getattr(model, "num_classes", None)
    if dataset.num_classes is None and served is None:
        raise ValueError("neither the data set nor the model says how many classes there are; give num_classes")
    if None not in (served, dataset.num_classes) and served != dataset.num_classes:
        raise ValueError(
            f"the model answers with {served} classes, the data set has {dataset.num_classes}; evaluate on data with "
            "the classes that the model was trained on"
        )
    if not dataset.masks:
        raise ValueError("the data set was opened without masks; there is nothing to compare predictions with")
    fitting = dataset.subset(range(len(dataset)))
    fitting.num_classes = served if dataset.num_classes is None else dataset.num_classes
    return fitting


def _statistic(model: nn.Module, name: str, given: Sequence[float] | None) -> tuple[float, ...]:
    value = getattr(model, name, None) if given is None else given
    if value is None or len(tuple(value)) != 3:
        raise ValueError(f"{name}={value}: give three values from 0 to 1, for red, green and blue")
    return tuple(float(v) for v in value)


def _candidates(model: nn.Module, runs: Sequence[Run], precision: Precision) -> list[Candidate]:
    """One model a run on shared weights, the unpatched one first; costs are filled in later."""
    if is_patched(model):
        raise ValueError(
            f"{type(model).__name__} is patched already, so there is nothing to compare with; call "
            "tokenzoo.unpatch_model(model) and name the methods as runs"
        )
    if precision.dtype != next(model.parameters()).dtype:
        model = copy.deepcopy(model).to(precision.dtype)
    candidates = []
    for run in (Run(), *(r for r in runs if r.method is not None)):
        own = run.put_on(shared_copy(model).eval())
        candidates.append(Candidate(run, own, 0.0, ""))
    return candidates


def _broken(sample: Broken, folder: Path | None) -> str:
    kept = f"; counts so far are kept in {folder}, the same command goes on from there" if folder else ""
    return f"{sample.reason}; repair or remove it, or leave such images out with --skip-broken{kept}"


def _count(
    sample: Sample,
    predictors: list[Predictor],
    candidates: Sequence[Candidate],
    files: Sequence[StateFile],
    num_classes: int,
    precision: Precision,
) -> list[Predictor]:
    """Counts one image for all runs that lack it; returns the predictors, with smaller batches if memory ran out."""
    labelled = sample.mask != IGNORE
    base = None
    for index, (candidate, file) in enumerate(zip(candidates, files)):
        if index and sample.name in file.rows:
            continue
        labels, finite, predictors = _predict(sample.image, index, predictors, candidate.run.label, precision)
        base = labels if base is None else base  # needed for agreement, even where its own counts are there
        if sample.name not in file.rows:
            area = areas(confusion_matrix(labels, sample.mask, num_classes))
            file.add(sample.name, Row(area, int(((labels == base) & labelled).sum()), finite))
    return predictors


def _predict(
    picture: Image.Image, index: int, predictors: list[Predictor], label: str, precision: Precision
) -> tuple[np.ndarray, bool, list[Predictor]]:
    while True:
        predictor = predictors[index]
        try:
            with precision.autocast(torch.device(predictor.device)):
                return *predictor(picture), predictors
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
        batch = predictor.inference.batch_size // 2  # outside of the handler: the traceback held the tensors
        if batch == 0:
            raise ValueError(
                f"{label}: not even one window of an image of {picture.width}x{picture.height} fits into the memory "
                f"of {predictor.device} ({reason}); use smaller windows, a smaller model or another --device"
            )
        _log.warning("%s: out of memory, going on with %d windows at a time (%s)", label, batch, reason)
        free_memory(torch.device(predictor.device))
        predictors = [replace(p, inference=replace(p.inference, batch_size=batch)) for p in predictors]


def _outcome(candidate: Candidate, file: StateFile, macs: DenseMacs | None, names: Sequence[str]) -> Outcome:
    rows = [file.rows[name] for name in names]
    bad = sum(not row.finite for row in rows)
    if bad:
        _log.warning("%s: scores of %d images are not finite; try --dtype float32", candidate.run.label, bad)
    area = np.stack([row.area for row in rows])
    return Outcome(candidate.run, candidate.model, area, sum(row.agreeing for row in rows), macs)
