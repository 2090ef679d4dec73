"""Checkpoints that are whole or not there: written beside, read back, renamed; the newest sound one is gone on from."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.safe_files import read_torch

_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)-(\d+)\.pt")
FORMAT = 1


class Place(NamedTuple):
    """Where a run goes on.

    Attributes:
        epoch: number of the epoch.
        batch: number of the first batch that is still to come.
    """

    epoch: int
    batch: int


class Checkpoints:
    """The checkpoints of an output folder.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def list(self) -> list[tuple[Place, Path]]:
        """What is there, newest first."""
        found = []
        for path in self.folder.glob("checkpoint-*.pt"):
            match = _NAME.fullmatch(path.name)
            if match:
                found.append((Place(int(match.group(1)), int(match.group(2))), path))
        return sorted(found, reverse=True)

    def save(self, place: Place, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; at every moment at least one sound file lies in the folder.

        Args:
            place: where the run would go on.
            state: tensors and plain values.

        Raises:
            ValueError: what was written cannot be read back (a full disk, for instance).
        """
        path = self.folder / f"checkpoint-{place.epoch:05d}-{place.batch:07d}.pt"
        write_whole(path, {"format": FORMAT, "place": tuple(place), **state})
        for _, old in self.list()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> tuple[Place, dict[str, Any]] | None:
        """The newest sound checkpoint, on the CPU; None where there is none at all.

        Raises:
            ValueError: all of them are torn, or written by another version.
        """
        torn = []
        for place, path in self.list():
            damage = damage_of(path)
            if damage is None:
                state = read_torch(path)
                if state.get("format") != FORMAT:
                    raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
                if torn:
                    _log.warning("going on from %s instead", path.name)
                return place, state
            _log.warning("checkpoint %s is torn (%s)", path.name, damage)
            torn.append(path.name)
        if torn:
            raise ValueError(f"all checkpoints in {self.folder} are torn: {', '.join(torn)}; start the run anew")
        return None


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside its place, reads it back and renames it: it is whole, or the one before is there.

    Raises:
        ValueError: what was written cannot be read back (a full disk, for instance).
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"checkpoint {path} could not be written ({error}); the one before is kept") from error
    damage = damage_of(part)
    if damage:
        part.unlink(missing_ok=True)
        raise ValueError(f"checkpoint {path} could not be read back ({damage}); the one before is kept")
    os.replace(part, path)
    _sync(path.parent)


def damage_of(path: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote, None if nothing is.

    Such a file is a ZIP archive: its directory stands at the end, so a file cut short has none, and every record
    carries a CRC-32 of its bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return None if bad is None else f"the checksum of {bad} does not fit"


def _sync(folder: Path) -> None:
    """Makes a renaming last through a power cut, where the system offers it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
