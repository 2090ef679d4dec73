"""The models that a page can show: those given when it starts, and others by name, loaded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from .uploads import Refused

DEMO = "the demo's model, which knows twelve photographs and nothing else"
MOST_MODELS = 4  # loaded by name at a time


class Shown(NamedTuple):
    """A model, and how images go in and answers come out.

    Attributes:
        model: unpatched, in eval mode.
        transform: from an image to the model's input [C, H, W].
        restore: from the input back to an image.
        labels: names of the classes, () where they are not known.
        about: a sentence on where the weights come from.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    restore: Callable[[Tensor], Image.Image]
    labels: Sequence[str] = ()
    about: str = ""


def shown(model: nn.Module, labels: Sequence[str] = (), about: str = "", img_size: int | None = None) -> Shown:
    """A model of timm with its own transforms; names of ImageNet's classes are known.

    Args:
        model: of timm, in eval mode.
        labels: names of its classes.
        about: a sentence on its weights.
        img_size: side of its input, pixels; None for its own.
    """
    from timm.data import ImageNetInfo, create_transform
    from torchvision.transforms.functional import to_pil_image

    from ..evaluation.loading import data_config

    config = data_config(model, None if img_size is None else [img_size])
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    if not labels and getattr(model, "num_classes", 0) == 1000:
        info = ImageNetInfo()
        labels = [info.index_to_description(index) for index in range(1000)]
    transform = create_transform(**config)
    return Shown(model, transform, lambda x: to_pil_image((x * std + mean).clamp(0, 1)), labels, about)


class Shelf:
    """Models by name.

    Args:
        given: what the page starts with, loaded; the first is chosen at first.
        device: where models that are loaded by name go.
    """

    def __init__(self, given: Mapping[str, Shown], device: str = "cpu") -> None:
        self.given, self.device = dict(given), device
        self.loaded: OrderedDict[str, Shown] = OrderedDict()
        self.loading = threading.Lock()

    def get(self, name: str) -> Shown:
        """The model of a name; timm's and, with the prefix "hf:", image classifiers of transformers.

        Raises:
            Refused: 422 for a name that nothing is known by, or weights that cannot be had.
        """
        if name in self.given:
            return self.given[name]
        with self.loading:
            if name not in self.loaded:
                self.loaded[name] = self._load(name)
                while len(self.loaded) > MOST_MODELS:
                    self.loaded.popitem(last=False)
            self.loaded.move_to_end(name)
            return self.loaded[name]

    def _load(self, name: str) -> Shown:
        try:
            return _of_transformers(name[3:], self.device) if name.startswith("hf:") else _of_timm(name, self.device)
        except Refused:
            raise
        except Exception as error:  # network, cache, authorisation, configuration: all kinds of errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refused(422, f"The weights of {name} cannot be had here ({reason}).") from error


def _of_timm(name: str, device: str) -> Shown:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name[:40]}*")[:3] if name.replace("_", "").isalnum() else []
        hint = f"; did you mean {', '.join(near)}?" if near else " (those of transformers begin with hf:)."
        raise Refused(422, f"{name[:80]!r} is not the name of a timm model{hint}")
    model = timm.create_model(name, pretrained=True).to(device).eval()
    return shown(model, about=f"timm's weights of {name}")


def _of_transformers(name: str, device: str) -> Shown:
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise Refused(422, "Models of transformers need its package: pip install 'tokenzoo[hf]'.") from error
    model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True).to(device).eval()
    processor: Any = AutoImageProcessor.from_pretrained(name)
    side = model.config.image_size if isinstance(model.config.image_size, int) else tuple(model.config.image_size)
    size = (side, side) if isinstance(side, int) else side
    mean, std = (torch.tensor(getattr(processor, key)).view(-1, 1, 1) for key in ("image_mean", "image_std"))
    transform = transforms.Compose(
        [transforms.Resize(size), transforms.ToTensor(), lambda x: (x - mean) / std]  # all of the image is seen
    )
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    about = f"weights of {name}, by transformers"
    return Shown(model, transform, lambda x: to_pil_image((x * std + mean).clamp(0, 1)), labels, about)
