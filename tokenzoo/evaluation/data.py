"""Pictures for evaluation: folders, tar files and timm's data sets, with broken files named instead of replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .runs import image_size

_log = logging.getLogger(__name__)


class Broken(NamedTuple):
    """A picture that could not be read.

    Attributes:
        name: file, archive member or index.
        reason: what the decoder said.
    """

    name: str
    reason: str


class Pictures(Dataset):
    """A timm or torchvision data set, read one by one; `transform` is set before use.

    timm's own `ImageDataset` answers for a broken file with its neighbour; here item i is picture i or `Broken`.
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
            return Broken(self.name(index), f"{type(error).__name__}: {error}")
        return self.transform(image), -1 if target is None else int(target)


class PictureStream(IterableDataset):
    """A timm data set that can only be read in order (wds/, tfds/, hfids/)."""

    def __init__(self, source: Any, num_classes: int | None = None) -> None:
        self.source = source
        self.num_classes = num_classes
        self.transform: Callable[[Image.Image], Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        stream, done = iter(self.source.reader), 0
        while True:
            try:
                image, target, *_ = next(stream)
            except StopIteration:
                return
            except Exception as error:  # what is read in order cannot be stepped over
                raise ValueError(
                    f"picture number {done} of the stream cannot be read ({type(error).__name__}: {error}); repair or "
                    "remove it, streams have no --skip-broken"
                ) from error
            yield self.transform(image), -1 if target is None else int(target)
            done += 1


def read_class_map(path: str | Path, root: str | Path | None = None) -> dict[str, int]:
    """Class folder names and their indices from a text file: one name a line, the line number is the index.

    Args:
        path: the file, as it stands or below `root` (as timm's --class-map).
        root: folder of the pictures.

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
        raise ValueError(f"class map {path} holds {wrong}; give every class folder name once, in the order of the model")
    return indices


def open_pictures(
    root: str | Path | None, dataset: str = "", split: str = "validation", class_map: str | Path | None = None
) -> Pictures | PictureStream:
    """Finds labelled pictures.

    Args:
        root: folder with one subfolder a class, or a tar file of such folders, or the cache of a named data set. A
            subfolder named after the split is used if there is one.
        dataset: timm's data set name with its prefix ("hfds/...", "wds/...", "torch/cifar10"); empty for folders and tar.
        split: which part.
        class_map: see `read_class_map`; by default classes are numbered in the order of their folder names.

    Raises:
        ValueError: nothing there, no pictures, pictures outside class folders, or an unusable class map.
        ImportError: a data set library that is not installed.
    """
    from timm.data import create_dataset, get_img_extensions

    local = dataset.partition("/")[0].lower() in ("", "folder", "tar")
    if local and (root is None or not Path(root).exists()):
        raise ValueError(f"--data-dir {root} does not exist; give a folder with one subfolder of pictures a class")
    if class_map is not None and dataset.lower().startswith("torch/"):
        raise ValueError(f"data set {dataset!r} has its own class numbers; leave --class-map out")
    indices = None if class_map is None else read_class_map(class_map, root)
    accepted = ", ".join(get_img_extensions())
    try:
        source = create_dataset(
            dataset, root=None if root is None else str(root), split=split, class_map=indices, download=False
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
        f"--data-dir {root} holds no pictures{extra}; give a folder with one subfolder a class, or a tar file of such "
        f"folders, with files ending in {accepted}"
    )


def _check_folder(reader: Any, indices: dict[str, int] | None) -> None:
    """Refuses pictures outside class folders, and says which classes the class map leaves out."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets

    if not isinstance(reader, ReaderImageFolder):
        return
    loose = [file for file, _ in reader.samples if Path(file).parent == Path(reader.root)]
    if loose:
        raise ValueError(
            f"{len(loose)} pictures, such as {Path(loose[0]).name}, lie in {reader.root} itself, so their class is unknown; "
            "move them into one subfolder a class"
        )
    if indices is not None:
        everything, names = find_images_and_targets(reader.root)
        missing = sorted(set(names) - set(indices))
        if missing:
            left = len(everything) - len(reader.samples)
            _log.warning("%d pictures left out: the class map does not name %s", left, ", ".join(missing))


def data_config(
    model: nn.Module,
    img_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """How pictures become images: timm's `resolve_data_config` at the size of the model, with overrides.

    Args:
        model: a timm model; its `pretrained_cfg` gives what is not overridden.
        img_size: one side or height and width.
        crop_pct: side of the crop over the side after resizing.
        crop_mode: "center", "squash" or "border".
        interpolation: of the resizing.
        mean: of the channels, one value or one a channel.
        std: likewise.

    Raises:
        ValueError: mean or std for another number of channels, a crop outside (0, 1].
    """
    from timm.data import resolve_data_config

    size = image_size(model, img_size)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct {crop_pct} is not in (0, 1]")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, size[0]):
            raise ValueError(f"--{name} has {len(values)} values; the images have {size[0]} channels, give 1 or {size[0]}")
    given = {"input_size": size, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    given |= {"mean": mean, "std": std}
    config = resolve_data_config({k: v for k, v in given.items() if v is not None}, model=model)
    for name in ("mean", "std"):
        if len(config[name]) != size[0]:
            raise ValueError(
                f"{type(model).__name__} takes {size[0]} channels, its configuration has a {name} for {len(config[name])}; "
                f"give --{name} with 1 or {size[0]} values"
            )
    return config


class PictureLoader:
    """Batches of images and targets; broken pictures raise, or are left out and listed in `skipped`.

    Args:
        pictures: from `open_pictures`.
        config: from `data_config`.
        batch_size: pictures read together; a batch with broken ones is shorter.
        workers: processes that decode, 0 decodes in this one.
        skip_broken: leave broken pictures out.
    """

    def __init__(
        self,
        pictures: Pictures | PictureStream,
        config: dict[str, Any],
        batch_size: int = 64,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        from timm.data import create_transform

        if batch_size < 1:
            raise ValueError(f"--batch-size {batch_size} is not positive")
        self.pictures = pictures
        self.skip_broken = skip_broken
        self.skipped: list[Broken] = []
        pictures.transform = _Transform("L" if config["input_size"][0] == 1 else "RGB", create_transform(**config))
        stream = isinstance(pictures, IterableDataset)  # more workers would read the stream more than once
        workers = 0 if stream else min(workers, -(-len(pictures) // batch_size))
        self._loader = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=_collate)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = []
        for images, targets, broken in self._loader:
            for name, reason in broken:
                if not self.skip_broken:
                    raise ValueError(
                        f"picture {name} cannot be read ({reason}); repair or remove it, or leave such files out with "
                        "--skip-broken"
                    )
                _log.warning("skipped %s (%s)", name, reason)
            self.skipped += broken
            if len(targets):
                yield images, targets


class _Transform:
    """Colour mode, then timm's transform."""

    def __init__(self, mode: str, rest: Callable[[Image.Image], Tensor]) -> None:
        self.mode = mode
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(image.convert(self.mode))


def _collate(items: list[tuple[Tensor, int] | Broken]) -> tuple[Tensor, Tensor, list[Broken]]:
    good = [item for item in items if not isinstance(item, Broken)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([target for _, target in good]), [item for item in items if isinstance(item, Broken)]
