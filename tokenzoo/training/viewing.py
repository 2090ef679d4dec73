"""A teacher that looks at every image several times: it says of a patch the mean over shifted, flipped views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.views import WHITE, Views
from .token_distillation import cosine_distance, full_layout, patch_tokens


@torch.no_grad()
def viewed_tokens(
    teacher: nn.Module, images: Tensor, views: Views, fill: tuple[float, ...] = WHITE, first: Tensor | None = None
) -> Tensor:
    """Normed patch tokens [B, H * W, C] in raster order, averaged over views; artefacts of single places go.

    Views run one after the other, so that memory is that of one pass.

    Args:
        teacher: not patched, in eval mode.
        images: [B, C, H, W].
        views: on the device of the images; the first is the image as it is.
        fill: what stands outside of an image, one value per channel; white behind ImageNet's mean and deviation.
        first: what the teacher says of the first view, where it is known [B, H * W, C].

    Raises:
        ValueError: images of parts of patches, or a teacher with another grid than that of the views.

    Source: Chen, Yan, Zhou, Dai, Luo, "Vision Transformers with Self-Distilled Registers", NeurIPS 2025.
    """
    layout = full_layout(teacher, images)
    if tuple(layout.grid) != tuple(views.grid):
        raise ValueError(
            f"views of {views.grid[0]} x {views.grid[1]} patches, but {type(teacher).__name__} makes "
            f"{layout.grid[0]} x {layout.grid[1]} of these images; draw views for that grid"
        )
    said = [] if first is None else [first]
    for view in range(len(said), views.count):
        said.append(patch_tokens(teacher.forward_features(views.images(images, view, fill)), layout))
    return views.average(said)


def self_distillation(student: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What a model with new registers owes to its denoised teacher: `cosine` and `mse`, weighed alike.

    Args:
        student: its normed patch tokens [B, M, C].
        target: those of the teacher, from `viewed_tokens`, detached here.

    Raises:
        ValueError: tokens of different shapes.

    Source: Chen, Yan, Zhou, Dai, Luo, "Vision Transformers with Self-Distilled Registers", NeurIPS 2025.
    """
    if student.shape != target.shape:
        raise ValueError(
            f"tokens {tuple(student.shape)} are compared place by place with a target {tuple(target.shape)}; give the "
            "patch tokens of both, without prefix tokens"
        )
    student, target = student.float(), target.detach().float()
    return {"cosine": cosine_distance(student, target).mean(), "mse": F.mse_loss(student, target)}
