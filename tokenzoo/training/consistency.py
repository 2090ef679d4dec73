"""Token reduction consistency: class tokens at two reduction strengths should agree (MCTF)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Consistency(NamedTuple):
    """Result of `token_consistency`.

    Attributes:
        loss: scalar, zero when no image is confident.
        per_image: squared distance of every image [B], before the choice.
        confidence: the student's probability of the target [B].
    """

    loss: Tensor
    per_image: Tensor
    confidence: Tensor


def token_consistency(
    student_class: Tensor, teacher_class: Tensor, student_logits: Tensor, target: Tensor, threshold: float = 0.4
) -> Consistency:
    """Mean squared distance of the class tokens of a strongly and a weakly reduced pass, over confident images.

    Args:
        student_class: normed class token of the strongly reduced pass [B, C]; gradients flow here.
        teacher_class: normed class token of the weakly reduced pass [B, C], detached.
        student_logits: [B, K].
        target: class indices [B], or soft targets [B, K] (mixup: the probabilities of all named classes add up).
        threshold: images count whose confidence exceeds this.

    Source: Lee, Choi, Kim, "Multi-criteria Token Fusion", CVPR 2024. The published total is
    CE(student) + CE(teacher) + 3 * this loss; the teacher's r is drawn anew each step.
    """
    per_image = F.mse_loss(student_class, teacher_class.detach(), reduction="none").mean(1)
    probabilities = student_logits.detach().float().softmax(1)
    if target.dim() == 1:
        confidence = probabilities.gather(1, target.unsqueeze(1)).squeeze(1)
    else:
        confidence = (probabilities * (target > target.amin(1, keepdim=True))).sum(1)
    counts = (confidence > threshold).to(per_image.dtype)
    return Consistency((per_image * counts).sum() / counts.sum().clamp(min=1), per_image, confidence)
