"""Token labelling: cross-entropy of the class token and of every patch token with a soft label of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TokenLabelLoss(nn.Module):
    """Loss of `LVViT.forward_train` (Jiang et al., NeurIPS 2021).

    Args:
        dense_weight: factor of the patch tokens' part.
        cls_weight: factor of the class token's part.
        ground_truth: mix the image's true label into the class token's soft one: half where both name the same
            class, a tenth where they do not.
    """

    def __init__(self, dense_weight: float = 1.0, cls_weight: float = 1.0, ground_truth: bool = False):
        super().__init__()
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight
        self.ground_truth = ground_truth

    def forward(self, output: tuple[Tensor, Tensor, tuple[int, int, int, int]], target: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            output: logits of the class token [B, K] and of the patch tokens [B, N, K], and the box of mixed patches
                (top, left, bottom, right), all 0 for none.
            target: soft labels [B, K, 2 + N]: true label, label of the image, labels of the patches in raster order.
                Or [B, K]: one label for the class token and all patches.

        Raises:
            ValueError: a target for another number of patches.
        """
        logits, dense, (top, left, bottom, right) = output
        patches = dense.shape[1]
        if target.dim() == 2:
            image, labels = target, target.unsqueeze(1).expand(-1, patches, -1)
        else:
            if target.shape[2] != 2 + patches:
                raise ValueError(
                    f"TokenLabelLoss: target {tuple(target.shape)} holds labels of {target.shape[2] - 2} patches, the "
                    f"model gave {patches}; make the label map as large as the model's grid"
                )
            true, image, labels = target[:, :, 0], target[:, :, 1], target[:, :, 2:].transpose(1, 2)
            if self.ground_truth:
                share = 0.9 - 0.4 * (true.argmax(1) == image.argmax(1)).to(image.dtype).unsqueeze(1)
                image = share * image + (1 - share) * true
        mixed = (bottom - top) * (right - left) / patches
        if mixed > 0:
            image = (1 - mixed) * image + mixed * image.flip(0)
        loss = self.cls_weight * _soft_cross_entropy(logits, image)
        return loss + self.dense_weight * _soft_cross_entropy(dense.flatten(0, 1), labels.flatten(0, 1))


def _soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
