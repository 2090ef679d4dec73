"""Images that cannot be read."""

from __future__ import annotations

from typing import NamedTuple

from PIL import UnidentifiedImageError


class Broken(NamedTuple):
    """An image that could not be read.

    Attributes:
        name: file, archive member or index.
        reason: what the decoder said.
    """

    name: str
    reason: str


def reason_of(error: Exception) -> str:
    """What a decoder said, without the objects that it names or that readers of shards append."""
    if isinstance(error, UnidentifiedImageError):  # its text names a file object
        return "not an image in a format that Pillow knows"
    text = error.args[0] if error.args and not isinstance(error, OSError) else error
    return f"{type(error).__name__}: {text}"
