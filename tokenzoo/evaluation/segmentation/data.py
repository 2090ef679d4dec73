"""Opening segmentation data: the usual data sets in the layouts that users have on disk, and plain folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .classes import colours, read_classes
from .files import Archives, Files, Folder
from .kinds import KINDS, Kind
from .readers import Pair
from .samples import BrokenSample, Sample, SegmentationDataset

__all__ = ["KINDS", "BrokenSample", "Sample", "SegmentationDataset", "open_dataset"]


def open_dataset(
    root: str | Path,
    kind: str = "folder",
    split: str | None = None,
    *,
    ignore: int | Sequence[int] = (),
    zero_label: bool = False,
    classes: Sequence[str] | str | Path | None = None,
    num_classes: int | None = None,
    masks: bool = True,
) -> SegmentationDataset:
    """Finds images and their class masks.

    Args:
        root: folder of the data set or one above it; for "ade20k" and "cityscapes" the zip archives may stay packed.
        kind: a key of `KINDS`: "folder" for images/ with masks/, or a data set.
        split: None for the part that results are reported on; of a plain folder, a subfolder.
        ignore: further values of the mask files that count as 255 (plain folders only).
        zero_label: value 0 is ignored and the others are numbered from 0 (plain folders only).
        classes: names by index, a text file with one per line, or a JSON list (plain folders only).
        num_classes: without names (plain folders only).
        masks: False if masks are not needed; samples then hold None.

    Raises:
        ValueError: another layout than expected, no images, or options that do not fit.
    """
    files, pairs = _locate(kind, root, split)
    about = KINDS[kind]
    values = (ignore,) if isinstance(ignore, int) else tuple(ignore)
    if kind != "folder" and (values or zero_label or classes is not None or num_classes is not None):
        raise ValueError(
            f"{kind} has labels of its own; ignore, zero_label, classes and num_classes are for kind 'folder'"
        )
    if any(not 0 <= value <= 255 for value in values):
        raise ValueError(f"ignore={values} holds values that an 8-bit mask cannot hold; give values from 0 to 255")
    names = about.classes if kind != "folder" else read_classes(classes)
    if names is not None and num_classes not in (None, len(names)):
        raise ValueError(f"num_classes={num_classes}, but {len(names)} classes are named; give one of the two")
    count = num_classes if names is None else len(names)
    if count is not None and not 1 <= count <= 255:
        raise ValueError(f"{count} classes do not fit into 8-bit masks with 255 for ignored pixels; give 1 to 255")
    if masks and all(pair.mask is None for pair in pairs):
        raise ValueError(
            f"none of the {len(pairs)} images in {files} has a mask, such as {pairs[0].image}; expected {about.layout}"
        )
    # the first colour is black: for a background only
    palette = about.palette or (colours(count) if about.background else colours(1 + (count or 255))[1:])
    return SegmentationDataset(
        files,
        pairs,
        kind,
        split,
        None if names is None else list(names),
        count,
        palette,
        values,
        zero_label or about.zero_label,
        masks,
    )


def _locate(kind: str, root: str | Path, split: str | None) -> tuple[Files, list[Pair]]:
    """Finds the images of a split.

    Args:
        kind: a key of `KINDS`.
        root: folder of the data set or one above it, or a zip archive.
        split: None for the default.

    Raises:
        ValueError: an unknown kind or split, another layout, no images, or no mask for any of them.
    """
    if kind not in KINDS:
        raise ValueError(f"data set kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    about, root = KINDS[kind], Path(root)
    if not root.exists():
        raise ValueError(f"data set root {root} does not exist; {kind} expects {about.layout}")
    if about.splits and split is not None and split not in about.splits:
        raise ValueError(f"{kind} has no split {split!r}; use one of {', '.join(about.splits)}")
    chosen = (about.splits[split] if split else next(iter(about.splits.values()))) if about.splits else split or ""
    for files in _places(about, root):
        for inside in about.inside:
            base = f"{inside}/" if inside else ""
            if all(files.is_dir(f"{base}{need.format(chosen)}".rstrip("/")) for need in about.needs):
                return files, _checked(about.pairs(files, base, chosen), kind, files, chosen)
    raise ValueError(
        f"{root} is no {kind} data set{f' with a split {chosen!r}' if chosen else ''}; expected {about.layout}"
    )


def _places(about: Kind, root: Path) -> list[Files]:
    if root.is_file():
        if not any(len(names) == 1 for names in about.archives):
            raise ValueError(f"data set root {root} is a file; expected {about.layout}")
        return [Archives([root])]
    found: list[Files] = [Folder(root)]
    for inside in about.inside:
        for folder in {root / inside, (root / inside).parent if inside else root}:
            for names in about.archives:
                if all((folder / name).is_file() for name in names):
                    found.append(Archives([folder / name for name in names]))
    return found


def _checked(pairs: list[Pair], kind: str, files: Files, split: str) -> list[Pair]:
    if not pairs:
        raise ValueError(
            f"{files} holds no images{f' of split {split!r}' if split else ''}; {kind} expects {KINDS[kind].layout}"
        )
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{files} holds two images called {twice}, which would share one mask; rename one of them")
    return pairs
