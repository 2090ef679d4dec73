"""Images that strangers send: bounded in bytes and pixels, decoded in memory, never written to disk."""

from __future__ import annotations

import io
import warnings
from collections.abc import AsyncIterator

from PIL import Image, ImageOps, UnidentifiedImageError

MOST_BYTES = 8 << 20
MOST_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class Refused(ValueError):
    """A request that is answered with a sentence.

    Args:
        status: of HTTP.
        sentence: what to tell the person in front of the page.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def read_body(chunks: AsyncIterator[bytes], announced: str | None) -> bytes:
    """The bytes of a request, no more of them than are allowed.

    Args:
        chunks: of the body, as they come.
        announced: the header Content-Length, None without one.

    Raises:
        Refused: 413 above 8 MiB, announced or sent.
    """
    too_large = Refused(413, f"The image is too large: at most {MOST_BYTES >> 20} MiB are read.")
    if announced is not None and announced.isdigit() and int(announced) > MOST_BYTES:
        raise too_large
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > MOST_BYTES:
            raise too_large
    return bytes(data)


def decode(data: bytes) -> Image.Image:
    """An image as it is meant to be seen (turned as its EXIF says), RGB, its longer side at most 1024 pixels.

    Raises:
        Refused: 422 for what is no image in a usual format, is damaged, or has more than 40 million pixels.
    """
    if not data:
        raise Refused(422, "No image came with the request: choose one, or drop one onto the page.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is a lower one
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                wide, high = file.size
                if wide * high > MOST_PIXELS:
                    most = MOST_PIXELS // 10**6
                    raise Refused(422, f"The image has {wide} x {high} pixels; at most {most} million are decoded.")
                file.draft("RGB", (1024, 1024))  # JPEG decodes at a fraction of its size
                image = ImageOps.exif_transpose(file).convert("RGB")
    except (Refused, MemoryError):
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise Refused(422, f"This is not an image that can be read: it must be one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise Refused(422, "The image is damaged: it cannot be decoded to its end.") from error
    image.thumbnail((1024, 1024))
    return image
