"""What segmentation brings into the engine that all trainers share: views, loss, schedule and averaged weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...evaluation.runs import Precision
from ..batches import Batch
from ..owed import names_owed
from .augment import IGNORE, Gallery, Views

_log = logging.getLogger(__name__)


class ViewBatches:
    """Batches of views; order and views depend on the seed and the number of the epoch only.

    Args:
        data: images and masks.
        views: how views are cut out.
        batch_size: views per step; what is left over at the end of an epoch is not used.
        seed: of the run.
        model: says how images are normalised, and where they go.
    """

    def __init__(self, data: Gallery, views: Views, batch_size: int, seed: int, model: nn.Module) -> None:
        self.data, self.views, self.batch_size, self.seed = data, views, batch_size, seed
        self.device = next(model.parameters()).device
        self.mean, self.std = normalisation(model)

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the first ones are drawn as well where they are left out."""
        seed = self.seed * 1_000_003 + epoch
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # stochastic depth and dropout draw from here
        order = torch.randperm(len(self.data), generator=rng)[: len(self) * self.batch_size]
        for index, members in enumerate(order.split(self.batch_size)):
            drawn = [self.views.draw(self.data.images[i], self.data.masks[i], rng) for i in members.tolist()]
            if index < first:
                continue
            images = torch.stack([image for image, _ in drawn]).to(self.device)
            masks = torch.stack([mask for _, mask in drawn]).to(self.device)
            yield Batch(index, (images - self.mean) / self.std, masks)


class SegmentStep(nn.Module):
    """A segmentation model with its loss: cross-entropy of the pixels that have a class.

    Args:
        model: a `Segmenter`.
        weight: of classes [K], None for equal ones.
        amp: whether the model runs under autocast; the loss does not.
        frozen: whether the encoder stays as it is, in eval mode.
        steps: per epoch, for messages.
    """

    parts: tuple[str, ...] = ()  # the loss is one

    def __init__(self, model: nn.Module, weight: Tensor | None, amp: bool, frozen: bool, steps: int) -> None:
        super().__init__()
        if owed := names_owed(model):
            raise ValueError(
                f"{', '.join(owed)} would be left out: the trainer of segmentation models does not bring in losses of "
                "methods; train the backbone with tokenzoo train first"
            )
        self.model, self.weight, self.frozen, self.steps = model, weight, frozen, steps
        self.precision = Precision(amp=torch.bfloat16 if amp else None)

    def train(self, mode: bool = True) -> SegmentStep:
        """As of any module, except that a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.model.encoder.eval()
        return self

    def forward(self, images: Tensor, masks: Tensor, update: int) -> dict[str, Tensor]:
        with self.precision.autocast(images.device):
            logits = self.model(images)
        if bool((masks != IGNORE).any()):
            return {"loss": F.cross_entropy(logits.float(), masks, weight=self.weight, ignore_index=IGNORE)}
        # the mean over no pixels is no number
        _log.warning("epoch %d, step %d: every pixel is ignored; its loss counts as 0", *divmod(update, self.steps))
        return {"loss": 0 * logits.float().sum()}


class StepRates:
    """A schedule of timm's that goes by updates."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler

    def set(self, epoch: int, update: int) -> float:
        """Sets the learning rates of an update and returns the highest."""
        self.scheduler.step_update(update)
        return max(group["lr"] for group in self.optimizer.param_groups)


class RisingAverage:
    """Averaged weights whose decay rises to its full value with the first updates.

    Args:
        module: a copy of the model, which takes the average.
        decay: full value.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after an update.

        Args:
            model: that was updated.
            step: updates so far, this one included.
        """
        decay = min(self.decay, step / (step + 9))
        for kept, new in zip(self.module.state_dict().values(), model.state_dict().values()):
            if kept.is_floating_point():
                kept.lerp_(new, 1 - decay)
            else:
                kept.copy_(new)


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a model's images are normalised with, [1, 3, 1, 1] each, on its device."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (model.mean, model.std))
    return mean, std


def class_weights(data: Gallery, num_classes: int, kind: str) -> Tensor | None:
    """Weights of the classes [K] by their shares of the pixels; None for equal ones."""
    if kind == "none":
        return None
    share = data.class_pixels(num_classes)
    weight = torch.where(share > 0, (share / share.sum()).clamp(min=1e-4).rsqrt(), 0)
    return (weight / weight[share > 0].mean()).float()
