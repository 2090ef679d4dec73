"""Pictures to train on and to evaluate on: opened, held against each other, and refused where classes do not fit."""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..evaluation.data import Pictures, PictureStream, open_pictures, require_library
from ..evaluation.distributed import World

_log = logging.getLogger(__name__)


class Splits(NamedTuple):
    """What a run learns from.

    Attributes:
        train: pictures with an index, or timm's iterable data set.
        val: pictures to evaluate on, None for none.
        num_classes: of the classifier.
        val_index: class index of the training set for each class index of `val` [K], None where they are the same.
        stream: whether `train` can only be read in order.
    """

    train: Pictures | IterableDataset
    val: Pictures | PictureStream | None
    num_classes: int
    val_index: Tensor | None
    stream: bool


def open_splits(args: argparse.Namespace, world: World) -> Splits:
    """Opens the pictures of the options.

    Raises:
        ValueError: nothing there, empty class folders, splits that lie inside each other, class counts that do not
            fit, or fewer shards than processes that read them.
        ImportError: a data set library that is not installed.
    """
    stream = args.dataset.partition("/")[0].lower() in ("wds", "tfds", "hfids")
    if stream:
        train = _open_stream(args, world)
        found = max(class_names(train).values(), default=-1) + 1 or None
    else:
        train = open_pictures(args.data_dir, args.dataset, args.train_split, args.class_map)
        _refuse_empty_classes(train, args.class_map)
        found = train.num_classes
    num_classes = _count_classes(args.num_classes, found)
    val = None
    if args.val_split:
        val = open_pictures(args.data_dir, args.dataset, args.val_split, args.class_map)
        _refuse_overlap(train, val, args)
    return Splits(train, val, num_classes, _val_index(train, val), stream)


def _count_classes(asked: int | None, found: int | None) -> int:
    if asked is None and found is None:
        raise ValueError("the data set does not say how many classes it has; give --num-classes")
    if asked is not None and found is not None and asked != found:
        raise ValueError(
            f"class count mismatch: --num-classes {asked}, but the pictures have {found} classes; leave --num-classes "
            "out, correct it, or name all classes of the model in a --class-map"
        )
    return found if asked is None else asked


def _reader(source: Any) -> Any:
    return getattr(getattr(source, "source", source), "reader", None)


def _folder(source: Any) -> Path | None:
    """The folder or tar file that a split was read from, None for named data sets."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    reader = _reader(source)
    return Path(reader.root).resolve() if isinstance(reader, (ReaderImageFolder, ReaderImageInTar)) else None


def class_names(source: Any) -> dict[str, int]:
    """Class index by folder name, empty where a data set has none."""
    reader = _reader(source)
    return getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}


def _refuse_empty_classes(pictures: Pictures, class_map: str | None) -> None:
    """timm numbers the classes that it finds pictures of: an empty folder would shift all that follow."""
    root = _folder(pictures)
    if root is None or not root.is_dir():
        return
    full = {Path(file).parent.resolve() for file, _ in _reader(pictures).samples}
    leaves = [Path(place) for place, subfolders, _ in os.walk(root, followlinks=True) if not subfolders]
    empty = [leaf for leaf in leaves if leaf.resolve() not in full and not leaf.name.startswith(".")]
    if class_map is not None:  # folders that the map leaves out do not count
        empty = [leaf for leaf in empty if leaf.name in class_names(pictures)]
    if empty:
        names = ", ".join(sorted(leaf.relative_to(root).as_posix() for leaf in empty))
        raise ValueError(
            f"class folders without pictures in {root}: {names}; fill or remove them (the classes after them would "
            "get other numbers)"
        )


def _refuse_overlap(train: Any, val: Any, args: argparse.Namespace) -> None:
    one, other = _folder(train), _folder(val)
    if one is None or other is None:
        return
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"--train-split {args.train_split!r} is read from {one}, --val-split {args.val_split!r} from {other}: the "
            "same pictures; make --data-dir hold one folder or tar file for each, or give --val-split '' for no "
            "evaluation"
        )


def _val_index(train: Any, val: Any) -> Tensor | None:
    """Class folders are numbered as found: the two splits have to mean the same by a number."""
    learned, seen = class_names(train), class_names(val) if val is not None else {}
    if not learned or not seen or learned == seen:
        return None
    unknown = sorted(set(seen) - set(learned))
    if unknown:
        raise ValueError(
            f"class count mismatch: the evaluation pictures have {len(seen)} classes, the training pictures "
            f"{len(learned)}, without {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; give both splits "
            "the same class folders, or a --class-map"
        )
    _log.warning("no evaluation pictures of %s", ", ".join(sorted(set(learned) - set(seen))))
    index = torch.full((max(seen.values()) + 1,), -1)
    for name, number in seen.items():
        index[number] = learned[name]
    return index


def _open_stream(args: argparse.Namespace, world: World) -> IterableDataset:
    from timm.data import create_dataset

    if args.aug_repeats > 1:
        raise ValueError(
            f"--aug-repeats {args.aug_repeats} needs pictures with a number; a stream ({args.dataset}) is read in "
            "order, give --aug-repeats 0"
        )
    require_library(args.dataset)
    try:
        source = create_dataset(
            args.dataset, root=args.data_dir, split=args.train_split, class_map=args.class_map or "", is_training=True,
            batch_size=args.batch_size, num_samples=args.train_num_samples, seed=args.seed,
        )  # fmt: skip
    except ImportError:
        raise
    except Exception as error:  # readers fail in many ways
        raise ValueError(
            f"data set {args.dataset!r}, split {args.train_split!r}, could not be opened ({type(error).__name__}: "
            f"{error}); check its name, the split, --data-dir and --train-num-samples"
        ) from error
    source.set_loader_cfg(num_workers=max(1, args.workers))  # older timm takes 0 for no pictures
    reader = source.reader
    if hasattr(reader, "sample_shuffle_size"):
        reader.sample_shuffle_size = args.shuffle_buffer
        reader.sample_initial_size = min(reader.sample_initial_size, args.shuffle_buffer)
    shards = getattr(getattr(reader, "split_info", None), "filenames", None)
    _refuse_missing_shards(shards or (), args.data_dir)
    count = _files_of_stream(reader) if shards is None else len(shards)
    readers = world.size * max(1, args.workers)
    if count is not None and count < (max(1, args.workers) if shards is None else readers):
        raise ValueError(
            f"{count} shards cannot be spread over {readers} readers ({world.size} processes with "
            f"{max(1, args.workers)} workers each); lower --workers or write more shards"
        )
    return source


def _files_of_stream(reader: Any) -> int | None:
    """How many parts a Hugging Face stream gives this process to read, None for other readers."""
    if type(reader).__name__ != "ReaderHfids":
        return None
    probe = copy.copy(reader)
    probe.num_workers = 1
    probe._lazy_init()  # what its first iteration would do
    return getattr(probe.ds, "num_shards", None)


def _refuse_missing_shards(shards: Sequence[str], root: str | None) -> None:
    """The reader steps over a shard that it cannot open and repeats others in its place, which nobody would notice."""
    if root is None or not Path(root).is_dir():  # the root of remote shards is an address or a command
        return
    missing = [shard for shard in shards if ":" not in shard and not (Path(root) / shard).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards are not in {root}, the first is {missing[0]}; correct "
            "--train-split or --data-dir"
        )
