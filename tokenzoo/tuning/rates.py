"""DiffRate's search: how many tokens each block prunes and merges, learned by gradient while the model is frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from ..adapters.inspect import blocks_of, is_patched
from ..adapters.wrappers import backbone_of
from ..apply.patch import patched, put_on, unpatch_model
from ..core.learned import Learned
from ..core.method import BlockShape, Method, Step
from ..core.prices import Prices
from ..core.registry import create_method
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..cost.prices import prices_of
from ..cost.report import report
from ..layers.rates import LearnedCount
from ..maps import Moves, TokenMap
from ..ops.attention import full_precision
from ..ops.matching.ranked import ranked_partners

_STEPS = 12  # of the bisection


@dataclass(frozen=True, kw_only=True)
class RateSearch(Learned, Method):
    """DiffRate while its rates are learned: nothing is removed, gates and moves carry the gradient.

    Args:
        patches: of the model.
        granularity: distance between candidate counts.
    """

    patches: int = 0
    granularity: int = 4

    name = "diffrate_search"
    source = "Chen et al., ICCV 2023"
    kind = "prune + merge"
    traits = Traits(reads_maps=True, proportional=True)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))  # block 0 has one candidate in the released search: all

    def strengths(self, depth: int) -> dict[int, None]:
        return dict.fromkeys(self.resolve_layers(depth))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n

    def module(self, dim: int, step: Step) -> nn.Module:
        return nn.ModuleDict({f"{what}_ddp": LearnedCount(self.patches, self.granularity) for what in _WHAT})

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        if not signals.training:
            return None
        prune, merge = (signals.module[f"{what}_ddp"] for what in _WHAT)
        prefix, left = tokens.layout.num_prefix, tokens.left[:, tokens.layout.num_prefix :] > 0.5
        current = int(left[0].sum())  # the same for all images
        kept = min(current, int(prune.kept()))
        stays = min(kept, int(merge.kept()))
        with torch.no_grad(), full_precision(tokens.x):
            scores = signals.importance[:, prefix:].masked_fill(~left, float("-inf"))
            units = F.normalize(tokens.x[:, prefix:].float(), dim=-1)
            order, partner, cosine = ranked_partners(scores, units, kept, stays)
            rank, src = order.argsort(dim=1), order[:, stays:kept]
            dst = order.gather(1, partner[:, : kept - stays].clamp(min=0))
            into = torch.arange(tokens.num_patches, device=order.device).expand_as(order).scatter(1, src, dst)
            taken = torch.zeros_like(scores).scatter(1, src, 1.0)
            size = tokens.sizes()[:, prefix:, 0]
            # as released: in training, and in training alone, a source counts for one patch at least
            part = (size * torch.ones_like(size).scatter(1, src, cosine[:, : kept - stays])).clamp(min=1) / size
        ranked = torch.ones(self.patches, device=rank.device)
        if kept < current:
            ranked = ranked * prune.mask(current)
        if stays < kept:
            ranked = ranked * merge.mask(kept)
        if kept == current and stays == kept:
            return None
        return self.gated(ranked[rank], tokens, step, sees_itself=True, moves=Moves(into, taken, None, part))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return 0


_WHAT = ("prune", "merge")


class LearnedRates(NamedTuple):
    """What `learn_rates` found.

    Attributes:
        recipe: what `tokenzoo.patch_model` takes.
        share: of the unpatched multiply-adds that it costs, by `tokenzoo.report`.
        learned: the same as the rates were learned, before the schedule was fitted to the budget.
        losses: mean loss of every epoch, without that on multiply-adds.
        counts: learned tokens after pruning and after merging, prefix included, by block.
    """

    recipe: dict[str, Any]
    share: float
    learned: float
    losses: tuple[float, ...]
    counts: tuple[tuple[int, int], ...]

    def save(self, file: str | Path) -> None:
        """Writes the recipe as YAML, which `--method` and `patch_model` read."""
        front = (
            f"# A schedule for diffrate, learned with frozen weights (Chen et al., ICCV 2023): {self.share:.1%} of the "
            f"unpatched multiply-adds.\n"
        )
        Path(file).write_text(front + yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None), "utf-8")


def learn_rates(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    flops: float,
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 0.01,
    min_lr: float = 0.001,
    weight: float = 100.0,
    granularity: int = 4,
    seed: int = 0,
) -> LearnedRates:
    """Learns how many tokens each block prunes and merges under DiffRate, for a share of the multiply-adds.

    The weights stay as they are; two distributions over token counts per block are learned. What comes out is an
    integer schedule; where it misses the budget a little, what is removed is scaled alike in all blocks.

    Args:
        model: a served model whose blocks attend in one sequence, unpatched, on the device to use. It is not changed.
        images: a tensor [N, C, H, W], shuffled anew in every epoch; or an iterable of batches (images, class indices),
            such as a DataLoader, gone through once per epoch.
        labels: class indices [N] beside a tensor; None learns to agree with the unpatched model.
        flops: share of the unpatched multiply-adds to land on, at most.
        epochs: passes over the images.
        batch_size: of a tensor of images.
        lr: learning rate of the first update, which falls to the next by half a cosine.
        min_lr: of the last one.
        weight: of the squared distance of the share from `flops`; the released 5 per squared GMAC is 106 on DeiT-S.
        granularity: distance between candidate counts.
        seed: of the order of the images.

    Raises:
        ValueError: a patched model, one whose multiply-adds do not follow from its tokens, or a budget out of reach.
        TypeError: a model that is not served.

    Source: Chen, Shao, Xu, et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
    2023: straight-through counts, masked attention, 5 (GMACs - target)^2, 3 epochs, learning rate 0.01 to 0.001.
    """
    if is_patched(model):
        raise ValueError("learn_rates: the model is patched; call tokenzoo.unpatch_model(model) first")
    if isinstance(flops, bool) or not isinstance(flops, (int, float)) or not 0 < flops < 1:
        raise ValueError(f"learn_rates: flops={flops!r}; give the share of the multiply-adds to spend, such as 0.6")
    if epochs < 1:
        raise ValueError(f"learn_rates: epochs={epochs}; give 1 at least")
    backbone, prices = backbone_of(model), prices_of(model)
    batches = _Batches(images, labels, batch_size, seed)
    search = RateSearch(patches=prices.patches, granularity=granularity)
    put_on(model, search)
    try:
        with _searching(model, backbone) as modules, torch.enable_grad():
            losses = _learn(model, modules, prices, batches, flops, epochs, (lr, min_lr), weight)
            counts = _counts(modules, prices)
    finally:
        unpatch_model(model)
    learned = float(_share([tuple(torch.tensor(float(c)) for c in each) for each in counts], prices))
    prefix = prices.prefix
    with_prefix = tuple((p + prefix, m + prefix) for p, m in counts)
    recipe, share = _fitted(model, with_prefix, prefix + prices.patches, prefix, flops)
    return LearnedRates(recipe, share, learned, tuple(losses), with_prefix)


class _Batches:
    """Batches of every epoch.

    Args:
        images, labels, batch_size, seed: see `learn_rates`.
    """

    def __init__(self, images: Any, labels: Any, batch_size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, batch_size, seed
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.whole = isinstance(images, Tensor)
        if self.whole and (images.dim() != 4 or len(images) == 0):
            raise ValueError(f"learn_rates: images have shape {tuple(images.shape)}; give [N, C, H, W], some of them")
        if self.whole and self.labels is not None and self.labels.shape != (len(images),):
            raise ValueError(f"learn_rates: {tuple(self.labels.shape)} labels for {len(images)} images; give one each")
        if not self.whole and not isinstance(images, Iterable):
            raise TypeError(f"learn_rates: images={type(images).__name__}; give a tensor, or batches to iterate over")

    def count(self) -> int | None:
        """Batches of an epoch, None where nobody knows."""
        if self.whole:
            return -(-len(self.images) // self.size)
        return len(self.images) if hasattr(self.images, "__len__") else None

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        if not self.whole:
            yield from ((batch[0], batch[1]) for batch in self.images)
            return
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed + epoch))
        for part in order.split(self.size):
            yield self.images[part], None if self.labels is None else self.labels[part]


@contextmanager
def _searching(model: nn.Module, backbone: nn.Module) -> Iterator[list[nn.ModuleDict | None]]:
    """The modules of all blocks, None for blocks without; everything else is frozen, and in eval mode, meanwhile."""
    blocks = blocks_of(backbone)
    modules = [
        next((getattr(block, step.key) for step in block.tokenzoo.steps if step.key is not None), None)
        for block in blocks
    ]
    own = {p for module in modules if module is not None for p in module.parameters()}
    frozen = [p for p in model.parameters() if p not in own and p.requires_grad]
    training = {module: module.training for module in model.modules()}
    for p in frozen:
        p.requires_grad_(False)
    model.eval()
    for block in blocks:
        block.training = True  # for the form of the decision alone: no dropout, no stochastic depth
    try:
        yield modules
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _learn(
    model: nn.Module, modules: list[nn.ModuleDict | None], prices: Prices, batches: _Batches, flops: float,
    epochs: int, rates: tuple[float, float], weight: float,
) -> list[float]:  # fmt: skip
    found = [p for module in modules if module is not None for p in module.parameters()]
    optimizer = torch.optim.AdamW(found, lr=rates[0], weight_decay=0.0)
    count, losses = batches.count(), []
    for epoch in range(epochs):
        total = seen = 0.0
        for index, (images, target) in enumerate(batches.epoch(epoch)):
            done = epoch if count is None else epoch + index / count
            for group in optimizer.param_groups:
                group["lr"] = rates[1] + (rates[0] - rates[1]) * (1 + math.cos(math.pi * done / epochs)) / 2
            images = images.to(found[0].device)
            task = _task(model, images, target)
            loss = task + weight * (_share(_kept(modules, prices), prices) - flops).square()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, seen = total + float(task.detach()) * len(images), seen + len(images)
        if not seen:
            raise ValueError("learn_rates: there were no images in an epoch; batches have to be iterable anew")
        losses.append(total / seen)
        if not math.isfinite(losses[-1]):
            raise ValueError(f"learn_rates: the loss of epoch {epoch} is {losses[-1]}; check images and labels")
    return losses


def _task(model: nn.Module, images: Tensor, target: Tensor | None) -> Tensor:
    """Cross entropy, or without labels the divergence from what the unpatched model says."""
    logits = model(images).float()
    if target is not None:
        return F.cross_entropy(logits, target.to(logits.device))
    blocks = [module for module in model.modules() if module.training]
    for block in blocks:
        block.training = False  # then nothing is gated
    with torch.no_grad():
        plain = model(images).float().log_softmax(1)
    for block in blocks:
        block.training = True
    return F.kl_div(logits.log_softmax(1), plain, reduction="batchmean", log_target=True)


def _kept(modules: Sequence[nn.ModuleDict | None], prices: Prices) -> list[tuple[Tensor, Tensor]]:
    """Patches left after pruning and after merging in every block, with gradient to what is smallest."""
    left, kept = torch.tensor(float(prices.patches)), []
    for module in modules:
        if module is not None:
            pruned = torch.minimum(left.to(module["prune_ddp"].kept_token_candidate.device), module["prune_ddp"].kept())
            left = torch.minimum(pruned, module["merge_ddp"].kept())
            kept.append((pruned, left))
        else:
            kept.append((left, left))
    return kept


def _share(kept: Sequence[tuple[Tensor, Tensor]], prices: Prices) -> Tensor:
    left = [merged for _, merged in kept]
    device = left[-1].device
    left = [torch.as_tensor(count, device=device) for count in left]
    return prices.share([torch.full_like(left[0], prices.patches), *left[:-1]], left)


def _counts(modules: Sequence[nn.ModuleDict | None], prices: Prices) -> list[tuple[int, int]]:
    with torch.no_grad():
        return [tuple(int(count) for count in each) for each in _kept(modules, prices)]


def _fitted(
    model: nn.Module, counts: Sequence[tuple[int, int]], n: int, prefix: int, flops: float
) -> tuple[dict[str, Any], float]:
    """The schedule that costs the budget at most, what is removed scaled alike in all blocks; and what it costs."""
    least = max(2, prefix + 1)

    def scaled(s: float) -> tuple[dict[str, Any], float]:
        prune, merge = ([max(least, n - round((n - count) * s)) for count in each] for each in zip(*counts))
        method = create_method("diffrate", prune=tuple(prune), merge=tuple(merge))
        with patched(model, method):
            return method.to_dict(), report(model).ratio

    low, high = 0.0, 1.0
    while scaled(high)[1] > flops:
        low, high = high, high * 2
        if high > 1e4:
            raise ValueError(
                f"learn_rates: flops={flops} is out of reach; blocks that never remove and the ends of the model cost "
                f"{scaled(high)[1]:.3f} already; raise it"
            )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle)[1] > flops else (low, middle)
    return scaled(high)
