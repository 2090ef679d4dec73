"""What is compared: runs (a method with its options), and the models that stand for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.inspect import describe, is_patched
from ..adapters.registry import around_of, family_of
from ..adapters.wrappers import backbone_of
from ..apply.patch import patch_model
from ..apply.saving import is_saved, load, saved_recipe
from ..core.method import Method
from ..core.recipe import Recipe, take_flops
from ..core.registry import list_methods
from ..cost.report import report
from ..cost.trace import count_macs
from ..ops.layer_macs import unwrapped


class Run(NamedTuple):
    """One row of a comparison: a method with its options, or the unpatched model (method None).

    Attributes:
        method: whatever `tokenzoo.patch_model` takes as its method, or a folder that `tokenzoo.save` or `tokenzoo
            train` wrote, whose weights the model then has too; None for the unpatched model.
        options: its options, `flops` included.
    """

    method: Any = None
    options: dict[str, Any] = {}

    @property
    def saved(self) -> bool:
        """Whether the method is a folder with weights; the name of a method is that method, whatever lies around."""
        return self.method not in list_methods() and is_saved(self.method)

    @property
    def label(self) -> str:
        """Short text for tables and legends."""
        first = str(self.method) if isinstance(self.method, str) or self.saved else self.name
        return " ".join([first, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def name(self) -> str:
        """Names of the methods, "unpatched" without one."""
        return "+".join(m.name for m in self.methods) or "unpatched"

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods in order; none of an unpatched model, nor of a folder that holds one.

        Raises:
            ValueError: an unknown method or option.
        """
        bare = self.method is None or self.saved and not self.options and saved_recipe(self.method) is None
        return () if bare else self.recipe().methods

    def settings(self) -> dict[str, Any]:
        """The options as given, or the whole recipe where they stand in an object or a file."""
        if not self.methods or self.method in list_methods():
            return dict(self.options)
        return {**self.recipe().to_dict(), **self.options}

    def recipe(self) -> Recipe:
        """The recipe of a reducing run (without `flops`, which patch_model takes itself).

        Raises:
            ValueError: an unknown method or option; a folder with options beside it, which it brings itself.
        """
        if self.saved:
            if self.options:
                raise ValueError(f"{self.method} brings a recipe of its own; leave {', '.join(self.options)} out")
            return Recipe.parse(saved_recipe(self.method))
        if isinstance(self.method, str) and "/" in self.method and not self.method.endswith((".yaml", ".yml")):
            raise ValueError(f"{self.method} is no method, and no folder that tokenzoo.save or tokenzoo train wrote")
        method, _ = take_flops(self.method, self.options.get("flops"))
        return Recipe.parse(method, **{k: v for k, v in self.options.items() if k != "flops"})

    @property
    def flops(self) -> float | None:
        """The budget, from the options or from a recipe file."""
        if self.saved:
            return None
        return take_flops(self.method, self.options.get("flops"))[1]

    def put_on(self, model: nn.Module) -> nn.Module:
        """The model of this run: the one given, patched in place, or a copy of it with the weights of the folder.

        Raises:
            ValueError: a run that cannot be reached on the model, or weights that do not fit it.
            TypeError: a model that the method cannot be put on.
        """
        if self.method is None:
            return model
        if self.saved:
            return load(self.method, copy.deepcopy(model))  # the model may share its weights with others
        return patch_model(model, self.recipe(), flops=self.flops)


class Precision(NamedTuple):
    """Number formats of a measurement.

    Attributes:
        dtype: of weights and images, None for the model's own.
        amp: what autocast computes in, None for no autocast.
    """

    dtype: torch.dtype | None = None
    amp: torch.dtype | None = None

    def of(self, model: nn.Module) -> Precision:
        """The same with the model's own type filled in."""
        return self if self.dtype else self._replace(dtype=next(model.parameters()).dtype)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which the models run."""
        return nullcontext() if self.amp is None else torch.autocast(device.type, self.amp)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.amp is None else f"{name}, amp {str(self.amp).removeprefix('torch.')}"


class Candidate(NamedTuple):
    """A run and its model, ready to be called.

    Attributes:
        run: what it stands for.
        model: in eval mode; weights are shared with the other candidates.
        gmacs: 1e9 multiply-adds of one image (of a random one where they depend on the image).
        attn_impl: "fused" if every attention runs on `scaled_dot_product_attention`, else "unfused"; "none" for models
            that scan; "" for a backbone that tokenzoo does not serve.
    """

    run: Run
    model: nn.Module
    gmacs: float
    attn_impl: str


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer with the original."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def prepare(
    model: nn.Module, runs: Sequence[Run], input_size: tuple[int, int, int], dtype: torch.dtype | None = None
) -> list[Candidate]:
    """One model a run, the unpatched one first; the model handed over stays as it is.

    Every run gets its own modules on shared weights: 25 ms once for a DeiT-S. Patching the one model in place for
    each batch would be as cheap, but a method's learned modules and a compiled graph would be lost with every change.

    Args:
        model: unpatched.
        runs: what to compare; a run without method is added if there is none.
        input_size: channels, height, width of the images.
        dtype: of the weights, None for the model's own; another one costs a full copy.

    Raises:
        ValueError: the model is patched already, or a run cannot be reached on it.
        TypeError: a model that is not served.
    """
    if is_patched(model):
        raise ValueError(
            f"{type(model).__name__} is patched already, so there is nothing to compare with; call "
            "tokenzoo.unpatch_model(model) and name the methods as runs"
        )
    if dtype not in (None, next(model.parameters()).dtype):
        model = copy.deepcopy(model).to(dtype)
    candidates = []
    for run in (Run(), *(r for r in runs if r.method is not None)):
        own = run.put_on(shared_copy(model).eval())
        costs = report(own, input_size[1:]) if is_served(own) else None
        # the formula equals tracing and is immediate; counts that depend on the image have to be traced on one
        by_formula = costs is not None and not costs.data_dependent
        macs = costs.total if by_formula else count_macs(own, input_size).total
        candidates.append(Candidate(run, own, macs / 1e9, costs.attn_impl if costs else ""))
    return candidates


def is_served(model: nn.Module) -> bool:
    """Whether tokenzoo knows the model's class, or what is around a model of its (a patched model is served)."""
    return family_of(model) is not None or around_of(model) is not None


def scores_of(output: Any) -> Tensor:
    """The scores, or whatever else a model's answer is about, of an output that may hold more than that."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


def forward_counted(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a model answers, scores [B, classes] or a map [B, C, H, W], and the tokens that reach the head [B] (prefix
    included, padding not).

    Counts are None for an unpatched model of a class that is not served.
    """
    if around_of(model) is not None:
        return scores_of(model(images)), _counts(backbone_of(model), images)
    family = family_of(model)
    if family is None:
        return scores_of(model(images)), None
    view = family.view(model)
    if is_patched(model) and view.gives_tokens:
        tokens = model.forward_tokens(images)
        logits = model.forward_head(tokens)
        if tokens.valid is not None:
            return logits, tokens.valid.sum(1)
        count = tokens.length
    elif is_patched(model) and not view.rebuilds:  # several sequences reach the head, of which the last one counts
        return scores_of(model(images)), _counts(model, images)
    else:
        grid = tuple(view.grid_of(images.shape[-2:]))
        info = describe(model, grid)
        layout = view.head_layout(info.sequence(info.depth - 1)[0])
        count = view.all_tokens(layout.num_prefix + layout.num_patches, grid, layout)
        logits = scores_of(model(images))
    return logits, torch.full((len(images),), count, device=images.device)


def _counts(backbone: nn.Module, images: Tensor) -> Tensor:
    """Tokens that reach the end of a backbone inside another model [B]; run again where they depend on the images."""
    costs = report(backbone, tuple(images.shape[-2:]))
    if costs.data_dependent:
        tokens = backbone.forward_tokens(images)
        tokens = tokens[-1] if isinstance(tokens, list) else tokens
        if tokens.valid is not None:
            return tokens.valid.sum(1)
        return torch.full((len(images),), tokens.length, device=images.device)
    return torch.full((len(images),), costs.tokens_out, device=images.device)


def gives_map(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Whether a model without classes answers with a map of features [B, C, H, W], found by one image of zeros.

    Args:
        model: in eval mode.
        input_size: channels, height and width of the image.
    """
    if getattr(model, "num_classes", None) != 0:  # a model that says nothing of them has some
        return False
    weight = next(model.parameters())
    with torch.inference_mode():
        return model(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)).dim() == 4


def image_size(model: nn.Module, img_size: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of a model's images.

    Args:
        model: a timm model, or one of another library that is served.
        img_size: overrides height and width, one side or two.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(config.get("input_size", (3, 224, 224)))
    if is_served(model):
        # what transformers says of the tower inside, and torchvision and open_clip of theirs: one side, or both
        backbone = backbone_of(model)
        own = getattr(backbone, "config", None)
        side = getattr(own, "image_size", getattr(backbone, "image_size", size[1:]))
        size = (getattr(own, "num_channels", size[0]), *((side, side) if isinstance(side, int) else side))
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        size = (size[0], *embed.img_size)
    if isinstance(getattr(embed, "backbone", None), nn.Module):  # patches of a network's features
        first = next((m for m in embed.backbone.modules() if isinstance(m, nn.Conv2d)), None)
        size = size if first is None else (first.in_channels, *size[1:])
    elif isinstance(proj := unwrapped(getattr(embed, "proj", embed)), (nn.Conv2d, nn.Linear)):
        size = (proj.in_channels, *size[1:]) if isinstance(proj, nn.Conv2d) else size
    elif hasattr(model, "in_chans"):  # a stem of several layers
        size = (model.in_chans, *size[1:])
    if img_size:
        size = (size[0], img_size[0], img_size[-1])
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"image size {size} is not channels, height, width; give --img-size one or two positive sides")
    return size


def param_count(model: nn.Module) -> float:
    """Parameters in millions, as timm's scripts print them."""
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
