"""timm's readers of streams, with what cannot be read named: shard and key (wds/), or file (hfids/)."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from .broken import Broken, reason_of

IN_A_ROW = 50


class Unreadable(ValueError):
    """Too many images or shards in a row that cannot be read."""


class StreamWatch:
    """Notes what a reader leaves out.

    Attributes:
        found: since it was last taken; shards are named below the folder of the reader.
    """

    def __init__(self) -> None:
        self.root = ""
        self.found: list[Broken] = []

    def take(self) -> list[Broken]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return found

    def watch(self, reader: Any) -> Any:
        """A copy of a reader of shards (wds/) or of a Hugging Face stream (hfids/) that tells this watch what it steps
        over; other readers are returned as they are.

        Args:
            reader: timm's; to be called in the process that reads.
        """
        kind = type(reader).__name__
        if kind not in ("ReaderWds", "ReaderHfids"):  # importing them would need their libraries
            return reader
        reader = copy.copy(reader)
        if reader.ds is None:
            reader._lazy_init()  # what its first iteration would do
        if kind == "ReaderHfids":
            reader.ds = _Decoding(reader.ds, reader.input_key, self)
            return reader
        self.root = str(reader.root)
        reader.ds = copy.copy(reader.ds)
        reader.ds.pipeline = [
            _Stage(stage, self) if "handler" in getattr(stage, "kw", ()) else stage for stage in reader.ds.pipeline
        ]
        return reader

    def note(self, name: str, error: Exception, row: int) -> None:
        """One more that cannot be read.

        Args:
            name: of the image or shard.
            error: what was raised.
            row: how many it makes without a readable one between them.

        Raises:
            Unreadable: too many.
        """
        reason = reason_of(error).partition(" @ <")[0]  # webdataset puts the open file behind it
        self.found.append(Broken(name, reason))
        if row >= IN_A_ROW:  # some versions of webdataset would go round an unreadable list for ever
            raise Unreadable(
                f"{IN_A_ROW} images or shards in a row cannot be read, the last is {name} ({reason}); "
                "check --train-split and --data-dir"
            )

    def name(self, item: dict[str, Any]) -> str:
        """Shard and key of what went into a stage: {"url"} before shards are opened, {"__url__", "__key__"} after."""
        shard = str(item.get("__url__") or item.get("url")).removeprefix(self.root).lstrip("/")
        return f"{shard}/{item['__key__']}" if "__key__" in item else shard


class _Stage:
    """A stage of the pipeline whose handler hears which of its inputs an error came from.

    Stages are generators, each asking the one before for a single item at a time. So the last one asked for is the
    one that failed: errors themselves name a file object at best.
    """

    def __init__(self, stage: Any, watch: StreamWatch) -> None:
        self.watch, self.handler = watch, stage.kw["handler"]
        self.stage = copy.copy(stage)
        self.stage.kw = {**stage.kw, "handler": self._handle}
        self.item: dict[str, Any] = {}
        self.row = 0

    def __call__(self, source: Iterator[Any]) -> Iterator[Any]:
        for item in self.stage(self._remember(source)):
            self.row = 0
            yield item

    def _remember(self, source: Iterator[Any]) -> Iterator[Any]:
        for self.item in source:
            yield self.item

    def _handle(self, error: Exception) -> bool:
        if isinstance(error, Unreadable):  # stages inside a stage share the handler
            raise error
        self.row += 1
        self.watch.note(self.watch.name(self.item), error, self.row)
        return self.handler(error)


class _Decoding:
    """A stream of the datasets library that is decoded here, where an image that cannot be read does not end it."""

    def __init__(self, source: Any, key: str, watch: StreamWatch) -> None:
        import datasets

        self.source = source.cast_column(key, datasets.Image(decode=False))
        self.key, self.watch = key, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        row = 0
        for place, sample in enumerate(self.source):
            stored = sample[self.key]
            try:
                with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
                    image.load()
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
                row += 1
                self.watch.note(stored["path"] or f"number {place}", error, row)
                continue
            row = 0
            yield {**sample, self.key: image}
