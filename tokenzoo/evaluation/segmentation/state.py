"""What a segmentation run has counted so far, image by image on disk, so that a run that was ended goes on."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...adapters.inspect import is_patched
from ...apply.patch import recipe
from ..environment import git_state
from ..runs import Precision
from .inference import Inference
from .samples import SegmentationDataset

_FORMAT = 1


class Row(NamedTuple):
    """Counts of one image.

    Attributes:
        area: right, predicted and labelled pixels of each class [3, K] float64.
        agreeing: labelled pixels with the unpatched model's prediction.
        finite: all scores were finite numbers.
    """

    area: np.ndarray
    agreeing: int
    finite: bool


class StateFile:
    """Rows of one run, in memory and, if a folder is given, in a file whose name stands for everything they depend on.

    A row is one line, written by one system call; a line that was cut off is dropped when the file is read again.
    Processes that share a run have a file each, and read all of them.

    Args:
        folder: None keeps rows in memory only.
        label: what the run is called, for the file name.
        key: everything that the counts depend on; JSON safe.
        num_classes: K.
        part: number of this process.

    Raises:
        ValueError: a damaged file, or a folder that does not exist and cannot be made.
    """

    def __init__(
        self, folder: Path | None, label: str, key: Mapping[str, Any], num_classes: int, part: int = 0
    ) -> None:
        self.rows: dict[str, Row] = {}
        self.path: Path | None = None
        self.num_classes = num_classes
        self._file: int | None = None
        if folder is None:
            return
        text = json.dumps({"format": _FORMAT, "label": label, **key}, sort_keys=True)
        slug = re.sub(r"[^\w.=+-]+", "-", label)[:60]
        name = f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.path = folder / f"{name}{f'.{part}' if part else ''}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{folder} is not a folder; name another one for the state of the run") from error
        for path in sorted({*folder.glob(f"{glob.escape(name)}.*jsonl"), self.path}):
            self._read(path, text)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if os.fstat(self._file).st_size == 0:
            self._write(text)

    def _read(self, path: Path, header: str) -> None:
        if not path.is_file():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content) and path == self.path:  # the run was ended while it wrote
            os.truncate(path, len(whole))
        lines = whole.decode("utf-8").splitlines()
        try:
            if lines and json.loads(lines[0]) != json.loads(header):
                raise ValueError("it belongs to another run")
            for line in lines[1:]:
                name, agreeing, finite, counts = json.loads(line)
                area = np.zeros((3, self.num_classes))
                for index, *values in counts:
                    area[:, index] = values
                self.rows[name] = Row(area, agreeing, finite)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"state file {path} is damaged ({error}); delete it to start this run anew") from error

    def _write(self, line: str) -> None:
        os.write(self._file, (line + "\n").encode())

    def add(self, name: str, row: Row) -> None:
        """Keeps the counts of an image.

        Args:
            name: of the image.
            row: its counts.
        """
        self.rows[name] = row
        if self._file is not None:
            counts = [[int(k), *map(int, row.area[:, k])] for k in np.flatnonzero(row.area.any(0))]
            self._write(json.dumps([name, row.agreeing, row.finite, counts]))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's structure and weights.

    Args:
        model: unpatched.
    """
    return _digest(model.state_dict(), repr(model))


def _digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shared(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether both are the very same memory."""
    return other is not None and tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape


def run_keys(
    model: nn.Module,
    patched: Sequence[nn.Module],
    dataset: SegmentationDataset,
    inference: Inference,
    precision: Precision,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Everything that the counts of each run depend on, images by name and size.

    Args:
        model: unpatched.
        patched: models of the runs.
        dataset: images and masks.
        inference: how they go through.
        precision: number formats.
        mean: of the normalisation.
        std: likewise.
        device: where models run.
    """
    sizes = dataset.sizes()
    listing = [(pair.name, pair.image, pair.mask, *size) for pair, size in zip(dataset.pairs, sizes)]
    import tokenzoo

    common = {
        "tokenzoo": [tokenzoo.__version__, git_state(Path(tokenzoo.__file__).parent)[0]],
        "data": [dataset.kind, dataset.split, str(dataset.files), list(dataset.ignore), dataset.zero_label],
        "classes": dataset.num_classes,
        "pictures": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        "checkpoint": fingerprint(model),
        "inference": {k: v for k, v in asdict(inference).items() if k != "batch_size"},
        "precision": str(precision),
        "normalisation": [list(mean), list(std)],
        "device": device.type,
    }
    common = json.loads(json.dumps(common))  # tuples become lists, as they will be read
    base = model.state_dict()
    return [
        {
            **common,
            "recipe": recipe(run) if is_patched(run) else None,
            # a run that comes from a folder has weights of its own under the very names of the unpatched model
            "learned": _digest({k: v for k, v in run.state_dict().items() if not _shared(v, base.get(k))}),
        }
        for run in patched
    ]
