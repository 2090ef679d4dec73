"""Labelled images: folders, tar files and timm's data sets, with broken files named instead of replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .broken import Broken, reason_of
from .streams import StreamWatch

_log = logging.getLogger(__name__)
_LIBRARIES = {  # what is imported, and what is installed
    "hfds": [("datasets", "datasets")],
    "hfids": [("datasets", "datasets")],
    "tfds": [("tensorflow", "tensorflow"), ("tensorflow_datasets", "tensorflow-datasets")],
    "wds": [("webdataset", "'tokenzoo[wds]'")],
}


class Pictures(Dataset):
    """A timm or torchvision data set, read one by one; `transform` is set before use.

    timm's own `ImageDataset` answers for a broken file with its neighbour; here item i is image i or `Broken`.
    """

    def __init__(self, source: Any, num_classes: int | None = None) -> None:
        self.source = source
        self.num_classes = num_classes
        self.transform: Callable[[Image.Image], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The file or archive member behind an index, as far as the source knows."""
        samples = getattr(self.source, "samples", None)  # torchvision
        if samples is not None:
            return str(samples[index][0])
        try:
            name = self.source.filename(index, absolute=True)  # timm
        except (AttributeError, NotImplementedError):
            name = None
        table = type(getattr(self.source, "reader", None)).__name__ == "ReaderHfds"
        if table and name and not Path(name).is_absolute():
            return f"{name}, number {index}"  # images inside tables: names without folders are not unique
        return str(name) if name else f"number {index}"

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Broken:
        reader = getattr(self.source, "reader", None)
        try:
            image, target, *_ = (self.source if reader is None else reader)[index]
            if not isinstance(image, Image.Image):
                with image:
                    image = Image.open(image)
                    image.load()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            return Broken(self.name(index), reason_of(error))
        return self.transform(image), -1 if target is None else int(target)


class PictureStream(IterableDataset):
    """A timm data set that can only be read in order (wds/, tfds/, hfids/)."""

    def __init__(self, source: Any, num_classes: int | None = None) -> None:
        self.source = source
        self.num_classes = num_classes
        self.transform: Callable[[Image.Image], Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Broken]:
        watch = StreamWatch()
        stream, done = iter(watch.watch(self.source.reader)), 0
        while True:
            try:
                image, target, *_ = next(stream)
            except StopIteration:
                yield from watch.take()
                return
            except Exception as error:  # what is read in order cannot be stepped over
                raise ValueError(
                    f"image number {done} of the stream cannot be read ({type(error).__name__}: {error}); repair or "
                    "remove it, streams have no --skip-broken"
                ) from error
            yield from watch.take()
            yield self.transform(image), -1 if target is None else int(target)
            done += 1


def require_library(dataset: str) -> None:
    """Refuses a data set whose library is not installed, before timm's readers do it in their several ways.

    Args:
        dataset: timm's name with its prefix, or empty.

    Raises:
        ImportError: names the library and what installs it.
    """
    prefix = dataset.partition("/")[0].lower()
    for library, package in _LIBRARIES.get(prefix, ()):
        if find_spec(library) is None:
            raise ImportError(f"--dataset {prefix}/ needs {library}; pip install {package}")


def read_class_map(path: str | Path, root: str | Path | None = None) -> dict[str, int]:
    """Class folder names and their indices from a text file: one name a line, the line number is the index.

    Args:
        path: the file, as it stands or below `root` (as timm's --class-map).
        root: folder of the images.

    Raises:
        ValueError: no such file, no text, an empty line, or a name given twice.
    """
    file = next((p for p in (Path(path), Path(root or ".") / path) if p.is_file()), None)
    if file is None:
        raise ValueError(f"class map {path} does not exist; give a text file with one class folder name a line")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"class map {path} is not UTF-8 text; give one class folder name a line") from error
    indices = {name: index for index, name in enumerate(names)}
    if "" in indices or len(indices) < len(names):
        wrong = "an empty line" if "" in indices else "a name twice"
        raise ValueError(f"class map {path} holds {wrong}; give every folder name once, in the order of the classes")
    return indices


def open_pictures(
    root: str | Path | None, dataset: str = "", split: str = "validation", class_map: str | Path | None = None
) -> Pictures | PictureStream:
    """Finds labelled images.

    Args:
        root: folder with one subfolder per class, or a tar file of such folders, or the cache of a named data set. A
            subfolder named after the split is used if there is one.
        dataset: timm's name with its prefix ("hfds/...", "wds/...", "torch/cifar10"); empty for folders and tar files.
        split: which part.
        class_map: see `read_class_map`; by default classes are numbered in the order of their folder names.

    Raises:
        ValueError: nothing there, no images, images outside class folders, or an unusable class map.
        ImportError: a data set library that is not installed.
    """
    from timm.data import create_dataset, get_img_extensions

    require_library(dataset)
    local = dataset.partition("/")[0].lower() in ("", "folder", "tar")
    if local and (root is None or not Path(root).exists()):
        raise ValueError(f"--data-dir {root} does not exist; give a folder with one subfolder of images per class")
    if class_map is not None and dataset.lower().startswith("torch/"):
        raise ValueError(f"data set {dataset!r} has its own class numbers; leave --class-map out")
    indices = None if class_map is None else read_class_map(class_map, root)
    accepted = ", ".join(get_img_extensions())
    # a stream of unknown length is refused, though this one is read to its end
    length = {"num_samples": 1} if dataset.lower().startswith("hfids/") else {}
    try:
        source = create_dataset(
            dataset, root=None if root is None else str(root), split=split, class_map=indices, download=False, **length
        )
        size = None if isinstance(source, IterableDataset) else len(source)
    except ImportError:
        raise
    except Exception as error:  # readers fail in many ways: assertions, KeyError, TarError, network errors
        if local:
            raise ValueError(_nothing(root, accepted, indices)) from error
        raise ValueError(
            f"data set {dataset!r}, split {split!r}, could not be opened ({type(error).__name__}: {error}); check its "
            "name, the split and --data-dir"
        ) from error
    if size == 0:
        raise ValueError(_nothing(root, accepted, indices))
    reader = getattr(source, "reader", None)
    found = indices or getattr(source, "class_to_idx", None) or getattr(reader, "class_to_idx", None)
    found = found or getattr(reader, "class_name_to_idx", None)
    num_classes = max(found.values()) + 1 if found else None
    if local:
        _check_folder(reader, indices)
    return (PictureStream if size is None else Pictures)(source, num_classes)


def _nothing(root: Any, accepted: str, indices: dict[str, int] | None) -> str:
    extra = " in subfolders named in the class map" if indices else ""
    return (
        f"--data-dir {root} holds no images{extra}; give a folder with one subfolder per class, or a tar file of such "
        f"folders, with files ending in {accepted}"
    )


def _check_folder(reader: Any, indices: dict[str, int] | None) -> None:
    """Refuses images outside class folders, and says which classes the class map leaves out."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets

    if not isinstance(reader, ReaderImageFolder):
        return
    loose = [file for file, _ in reader.samples if Path(file).parent == Path(reader.root)]
    if loose:
        raise ValueError(
            f"--data-dir {reader.root} itself holds images, such as {Path(loose[0]).name}, whose class is unknown; "
            "move them into one subfolder per class"
        )
    if indices is not None:
        everything, names = find_images_and_targets(reader.root)
        missing = sorted(set(names) - set(indices))
        if missing:
            left = len(everything) - len(reader.samples)
            _log.warning("%d images left out: the class map does not name %s", left, ", ".join(missing))
