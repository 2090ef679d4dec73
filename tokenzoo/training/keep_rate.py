"""A keep rate that falls while a model trains (EViT)."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from ..adapters.inspect import is_patched
from ..adapters.wrappers import backbone_of
from ..apply.patch import update_method
from ..core.schedule import cosine_keep_rate


class KeepRateWarmup:
    """The keep rate of a patched model: 1, then a cosine down to the recipe's own, then that.

    Evaluations between two epochs run at the rate of the last update, as published.

    Args:
        model: patched with one method that has a keep rate.
        args: options of the run.
        updates: of one epoch.

    Raises:
        ValueError: a model without such a method, explicit counts, or a compiled model.

    Source: Liang, Ge, Tong, Song, Wang, Xie, "Not All Patches are What You Need", ICLR 2022.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace, updates: int) -> None:
        methods = backbone_of(model).tokenzoo_recipe.methods if is_patched(model) else ()
        found = [m for m in methods if "keep_rate" in m.options()]
        if len(found) != 1:
            raise ValueError(
                "--shrink-epochs lets a keep rate fall, but the recipe has "
                f"{len(found) or 'no'} method{'s' if len(found) > 1 else ''} with one; give --method evit, or leave "
                "--shrink-start-epoch and --shrink-epochs out"
            )
        (method,) = found
        if getattr(method, "tokens", None) is not None:
            raise ValueError(
                f"{method.name}: tokens={method.tokens} are fixed counts; give keep_rate to --shrink-epochs"
            )
        if args.torchcompile:
            raise ValueError("--shrink-epochs changes shapes with every update; leave --torchcompile out")
        self.name, self.target = method.name, method.keep_rate
        self.start, self.length, self.updates = args.shrink_start_epoch, args.shrink_epochs, updates

    def rate(self, epoch: int, update: int) -> Any:
        """The keep rate of an update, one a layer where the recipe has one a layer."""
        targets = self.target if isinstance(self.target, tuple) else (self.target,)
        rates = tuple(
            cosine_keep_rate(update, epoch, self.updates, self.start, self.length, target) for target in targets
        )
        return rates if isinstance(self.target, tuple) else rates[0]

    def set(self, model: nn.Module, epoch: int, update: int) -> Any:
        """Gives a model the rate of an update and returns it.

        Args:
            model: the model of the constructor, or a copy of it.
            epoch: number of the epoch.
            update: number of the update since the start of the run.
        """
        rate = self.rate(epoch, update)
        current = next(m for m in backbone_of(model).tokenzoo_recipe.methods if m.name == self.name)
        if current.keep_rate != rate:
            update_method(model, self.name, keep_rate=rate)
        return rate
