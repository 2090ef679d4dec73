"""BatchNorm of a map's channels on tokens that are no map any more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.rows import split_dim


def norm_tokens(norm: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Normalises tokens [B, N, C]; in training by their own statistics, which padding takes no part in.

    Args:
        norm: `nn.BatchNorm2d` of C channels, or a module that takes its place.
        x: tokens.
        valid: [B, N] bool, False for padding; None when all are real.

    Raises:
        ValueError: padding meets the training statistics of another module.
    """
    if valid is None or not norm.training or x.shape[0] == 0:  # no images, no statistics
        return norm(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
    if type(norm) is not nn.BatchNorm2d:
        raise ValueError(
            f"{type(norm).__name__} cannot leave padding out of its statistics; train with methods that keep as many "
            "tokens in every image, or with torch.nn.BatchNorm2d"
        )
    if valid.shape[1] != x.shape[1]:
        raise ValueError(
            f"BatchNorm of {x.shape[1]} merged tokens cannot tell which of {valid.shape[1]} are padding; train with "
            "methods that keep as many tokens in every image"
        )
    mean, var = _moments(x, valid)
    with torch.no_grad():
        count = valid.sum()
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var.dtype), norm.momentum)
    return _apply(norm, x, mean, var)


def norm_alike(norm: nn.Module, rows: Tensor, x: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Normalises other rows [B, M, C] as `norm_tokens` does x (None: as outside of training), updates nothing."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return norm(rows.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
    if not norm.training or x is None:
        kept = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return split_dim(F.batch_norm(rows.flatten(0, 1), *kept, eps=norm.eps), 0, *rows.shape[:2])
    return _apply(norm, rows, *_moments(x, valid))


def _moments(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel in float32, over real tokens."""
    x = x.float()
    weight = torch.ones_like(x[..., :1]) if valid is None else valid.unsqueeze(-1).float()
    mean = (x * weight).sum((0, 1)) / weight.sum()
    return mean, ((x - mean).square() * weight).sum((0, 1)) / weight.sum()


def _apply(norm: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = (x.float() - mean) * (var + norm.eps).rsqrt()
    return (y * norm.weight + norm.bias).to(x.dtype)
