"""Questions about images, one JSON object per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..core.safe_files import parse_json
from .broken import reason_of


class Question(NamedTuple):
    """One line.

    Attributes:
        name: its "id", or the number of the line.
        images: files.
        text: what is asked.
        answers: all that count as right, or what ten people said.
        category: group whose scores are averaged, "" for none.
    """

    name: str
    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    category: str


def read_questions(data: str | Path, images: str | Path | None = None) -> list[Question]:
    """Reads all lines, and sees to it that every image is there.

    Args:
        data: file.jsonl, or a folder with one such file. Lines hold "image" (a path, or several), "question" and
            "answer" (one, or several); "id" and "category" if wanted.
        images: folder that paths of images start from; that of the file by default.

    Raises:
        ValueError: with the line: no JSON, something missing or of another kind, an image that is missing or outside
            of the folder.
    """
    file = _file(Path(data))
    root = Path(file.parent if images is None else images)
    if not root.is_dir():
        raise ValueError(f"--images {root} is no folder; give the one that paths of images start from")
    questions = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{file.name}, line {number}"
            questions.append(_question(parse_json(line, where), where, str(number), root.resolve()))
    if not questions:
        raise ValueError(f"{file} holds no questions; give one JSON object per line")
    return questions


def _file(data: Path) -> Path:
    if data.is_file():
        return data
    if not data.is_dir():
        raise ValueError(f"--data {data} does not exist; give a file of JSON lines, or a folder with one")
    found = sorted(data.glob("*.jsonl"))
    if len(found) != 1:
        raise ValueError(f"--data {data} holds {len(found)} files that end in .jsonl; name the one that is meant")
    return found[0]


def _question(value: Any, where: str, number: str, root: Path) -> Question:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is no JSON object; give {{"image": ..., "question": ..., "answer": ...}}')
    text, category = value.get("question"), value.get("category", "")
    if not isinstance(text, str) or not isinstance(category, str):
        raise ValueError(f'{where}: "question" and "category" have to be text, they are {text!r} and {category!r}')
    paths = tuple(_image(path, where, root) for path in _texts(value, "image", where))
    return Question(str(value.get("id", number)), paths, text, _texts(value, "answer", where), category)


def _texts(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """One text or several."""
    found = value.get(key, value.get(f"{key}s"))
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        raise ValueError(f'{where}: "{key}" is {found!r}; give one text, or a list of them')
    return tuple(found)


def _image(path: str, where: str, root: Path) -> Path:
    """A file inside the folder; links that lead out of it do not count as inside."""
    try:
        target = (root / path).resolve()
        there = target.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # bytes of value zero, names too long, links in a circle
        raise ValueError(f"{where}: image {path!r} is no path ({error})") from error
    if not target.is_relative_to(root):
        raise ValueError(
            f"{where}: image {path!r} lies outside of the folder of images; move it there, or give --images"
        )
    if not there:
        raise ValueError(f"{where}: image {path!r} does not exist in the folder of images")
    return target


def open_images(question: Question) -> list[Image.Image]:
    """The images of a question, in colour.

    Raises:
        ValueError: with the file that cannot be read.
    """
    found = []
    for path in question.images:
        try:
            with Image.open(path) as file:
                found.append(file.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"image {path.name} of question {question.name} cannot be read ({reason_of(error)})"
            ) from error
    return found
