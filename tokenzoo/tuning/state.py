"""What was measured, line by line in a file: a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = 1


class State:
    """Measurements by what they are of; in memory, and in a JSON-lines file where one is named.

    The first line says what the measurements depend on (model, images, split, score). A last line that was cut off is
    taken away. Values are read back exactly, so a resumed search decides as one that was never stopped.

    Args:
        path: the file, made where it is missing; None keeps nothing.
        about: what the measurements depend on, JSON safe.

    Raises:
        ValueError: a file of another search, or one that cannot be read.
    """

    def __init__(self, path: str | Path | None, about: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.about = json.loads(json.dumps({"version": VERSION, **about}))
        self.seconds = 0.0  # that the measurements took, those read included
        self._found: dict[tuple[str, str], Any] = {}
        self._file = None
        if self.path is not None:
            self._read()
            self._file = self.path.open("a", encoding="utf-8")
            if not self._found and self.path.stat().st_size == 0:
                self._write(self.about)

    def value(self, what: str, recipe: dict[str, Any] | None, measure: Callable[[], Any]) -> Any:
        """A measurement, made where it is not there yet.

        Args:
            what: kind of measurement, and of which images.
            recipe: of which recipe, None for the unpatched model.
            measure: gives a JSON-safe value.
        """
        key = (what, json.dumps(recipe, sort_keys=True))
        if key not in self._found:
            start = time.monotonic()
            value = measure()
            seconds = round(time.monotonic() - start, 4)
            self._write({"what": what, "recipe": recipe, "value": value, "seconds": seconds})
            self._found[key] = value
            self.seconds += seconds
        return self._found[key]

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
