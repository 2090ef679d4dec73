"""timm's optimizers and schedules, with groups of their own for the parameters that a method brings."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn
from torch.optim import Optimizer


def learning_rate(args: argparse.Namespace, processes: int) -> float:
    """The peak learning rate: as given, or --lr-base scaled with the global batch."""
    if args.lr is not None:
        return args.lr
    return args.lr_base * args.batch_size * args.grad_accum_steps * processes / args.lr_base_size


def new_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that a method brought: those of modules that patching put into the blocks."""
    return [name for name, _ in model.named_parameters() if ".tokenzoo_" in name]


def build_optimizer(model: nn.Module, args: argparse.Namespace, lr: float) -> Optimizer:
    """The optimizer; every group says with `new` whether its parameters are a method's.

    Raises:
        ValueError: an unknown optimizer, or an option for new parameters on a model without any.
    """
    from timm.optim import create_optimizer_v2

    fresh = set(new_parameters(model))
    if not fresh and (args.freeze_epochs or args.new_lr_scale != 1):
        raise ValueError(
            "--freeze-epochs and --new-lr-scale are for parameters that a method brings; this model has none"
        )
    options: dict[str, Any] = {}
    if args.opt_eps is not None:
        options["eps"] = args.opt_eps
    if args.opt_betas is not None:
        options["betas"] = tuple(args.opt_betas)
    try:
        return create_optimizer_v2(
            model, args.opt, lr, args.weight_decay, args.momentum,
            param_group_fn=lambda m: _groups(m, args, fresh), **options,
        )  # fmt: skip
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"--opt {args.opt}: {error}") from error


def _groups(model: nn.Module, args: argparse.Namespace, fresh: set[str]) -> list[dict[str, Any]]:
    """timm's groups, each parted into old and new parameters."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if args.layer_decay is None:
        groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=skip)
    else:
        groups = param_groups_layer_decay(
            model, args.weight_decay, no_weight_decay_list=skip, layer_decay=args.layer_decay
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parted = []
    for group in groups:
        for new in (False, True):
            members = [p for p in group["params"] if (names[id(p)] in fresh) == new]
            if members:
                scale = group.get("lr_scale", 1.0) * (args.new_lr_scale if new else 1.0)
                rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                parted.append({**rest, "params": members, "lr_scale": scale, "new": new})
    return parted


class Schedule:
    """timm's schedule of the learning rate; old parameters can wait while a method's own learn.

    Args:
        optimizer: from `build_optimizer`.
        args: options of the run.
        updates: of one epoch.

    Attributes:
        epochs: epochs of the run, cool-down and prefixed warm-up included.
    """

    def __init__(self, optimizer: Optimizer, args: argparse.Namespace, updates: int) -> None:
        from timm.scheduler import create_scheduler_v2

        if args.sched == "plateau":
            raise ValueError("--sched plateau depends on every result so far; use one that depends on time alone")
        self.timm, self.epochs = create_scheduler_v2(
            optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
            decay_milestones=args.decay_milestones, cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate,
            min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
            warmup_prefix=args.warmup_prefix, noise_seed=args.seed, step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=updates,
        )  # fmt: skip
        if self.timm is None and args.sched not in ("none", ""):  # older timm does not refuse unknown names
            raise ValueError(f"--sched {args.sched!r} is no schedule that timm knows; use cosine, step, poly or none")
        self.optimizer, self.freeze = optimizer, args.freeze_epochs
        self.initial = [group["lr"] for group in optimizer.param_groups]

    def set(self, epoch: int, update: int) -> float:
        """Sets the learning rates of an update and returns the highest.

        Args:
            epoch: number of the epoch.
            update: number of the update since the start of the run.
        """
        if self.timm is not None:
            self.timm.step(epoch)
            self.timm.step_update(update)
        else:
            for group, lr in zip(self.optimizer.param_groups, self.initial):
                group["lr"] = lr * group["lr_scale"]
        if epoch < self.freeze:
            for group in self.optimizer.param_groups:
                group["lr"] *= group["new"]
        return max(group["lr"] for group in self.optimizer.param_groups)
