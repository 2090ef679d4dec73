"""The classifier of a model whose last map is pooled, with timm's calls around it."""

# no postponed annotations here: TorchScript reads those of `forward_head`

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """Dropout, pooling and a linear classifier behind a map of `num_features` channels.

    A model calls `_set_classifier` once it has `num_features` and `head_drop`.
    """

    num_features: int
    head_drop: nn.Module

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"{type(self).__name__}: {num_classes} classes need pooled features; give global_pool, or num_classes=0"
            )
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        features = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(features, num_classes) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: classes; 0 has none.
            global_pool: new pooling, None keeps the present one, or takes "avg" where classes need one.

        Raises:
            ValueError: classes without pooling.
        """
        like = next(self.parameters())
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ("avg" if num_classes > 0 else "")
        self._set_classifier(num_classes, global_pool)
        self.global_pool.train(self.training)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> pooled features (pre_logits) or logits."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)
