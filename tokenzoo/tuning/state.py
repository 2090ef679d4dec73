"""What was measured, line by line in a file: a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.distributed import ALONE, World

VERSION = 1


class Job(NamedTuple):
    """A measurement to make.

    Attributes:
        what: kind of measurement, and of which images.
        recipe: of which recipe, None for the unpatched model.
        measure: gives a JSON-safe value.
    """

    what: str
    recipe: dict[str, Any] | None
    measure: Callable[[], Any]

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others."""
        return self.what, json.dumps(self.recipe, sort_keys=True)


class State:
    """Measurements by what they are of; in memory, and in a JSON-lines file where one is named.

    The first line says what the measurements depend on (model, images, split, score). A last line that was cut off is
    taken away. Values are read back exactly, so a resumed search decides as one that was never stopped.

    Args:
        path: the file, made where it is missing; None keeps nothing.
        about: what the measurements depend on, JSON safe.
        world: processes that know the same measurements; the first one reads and writes the file.

    Raises:
        ValueError: a file of another search, or one that cannot be read.
    """

    def __init__(self, path: str | Path | None, about: dict[str, Any], world: World = ALONE) -> None:
        self.path = None if path is None or not world.main else Path(path)
        self.world = world
        self.about = json.loads(json.dumps({"version": VERSION, **about}))
        self.seconds = 0.0  # that the measurements took, those read included
        self._found: dict[tuple[str, str], Any] = {}
        self._file = None
        with world.together():
            if self.path is not None:
                self._read()
                self._file = self.path.open("a", encoding="utf-8")
                if not self._found and self.path.stat().st_size == 0:
                    self._write(self.about)
        self._found, self.seconds = world.of_main((self._found, self.seconds))

    def value(self, what: str, recipe: dict[str, Any] | None, measure: Callable[[], Any]) -> Any:
        """A measurement, made by the first process where it is not there yet.

        Args:
            what: kind of measurement, and of which images.
            recipe: of which recipe, None for the unpatched model.
            measure: gives a JSON-safe value.
        """
        job = Job(what, recipe, measure)
        if job.key not in self._found:
            with self.world.together():
                own = self._made(job) if self.world.main else None
            self._keep(job, *self.world.of_main(own), took=True)
        return self._found[job.key]

    def values(self, jobs: Sequence[Job]) -> list[Any]:
        """Measurements; those that are not there yet are shared out among the processes.

        Args:
            jobs: the same in all processes.
        """
        missing = list({job.key: job for job in jobs if job.key not in self._found}.values())
        if self.world.size == 1:
            for job in missing:  # kept at once: the search may be killed
                self._keep(job, *self._made(job), took=True)
        elif missing:
            with self.world.together():
                made = [self._made(job) for job in missing[self.world.rank :: self.world.size]]
            parts = self.world.gather(made)
            slowest = max(range(len(parts)), key=lambda rank: sum(seconds for _, seconds in parts[rank]))
            for index, job in enumerate(missing):
                place, rank = divmod(index, self.world.size)
                self._keep(job, *parts[rank][place], took=rank == slowest)
        return [self._found[job.key] for job in jobs]

    def _made(self, job: Job) -> tuple[Any, float]:
        start = time.monotonic()
        value = job.measure()
        return value, round(time.monotonic() - start, 4)

    def _keep(self, job: Job, value: Any, seconds: float, took: bool) -> None:
        """Adds a measurement; those made meanwhile by other processes took no time of their own."""
        seconds = seconds if took else 0.0
        self._write({"what": job.what, "recipe": job.recipe, "value": value, "seconds": seconds})
        self._found[job.key] = value
        self.seconds += seconds

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _read(self) -> None:
        if not self.path.parent.is_dir():
            raise ValueError(f"state={self.path}: the folder {self.path.parent} does not exist; create it first")
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed while writing
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and lines[0] != self.about:
                raise ValueError(self._differs(lines[0]))
            for line in lines[1:]:
                self._found[line["what"], json.dumps(line["recipe"], sort_keys=True)] = line["value"]
                self.seconds += line["seconds"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"state={self.path} is not a state of `tune`; name another file") from error

    def _differs(self, first: Any) -> str:
        said = first if isinstance(first, dict) else {}
        names = [name for name in {**self.about, **said} if self.about.get(name) != said.get(name)]
        return (
            f"state={self.path} belongs to another search (its {', '.join(names)} differ); name another file, or "
            "delete it to begin anew"
        )
