"""Activations, gradients and attention maps of a patched model, carried back to the full grid for explainers.

Hooks on a patched model get the tokens that are left, in their own order. An `Explanation` watches the passes that run
inside it and remembers what every layer saw, so that what a hook has got can be put where it belongs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.registry import find_family
from ..adapters.wrappers import backbone_of
from ..core.lift import Fill, lift
from ..core.tokens import Layout, TraceStep, View
from ..ops.rows import split_dim


def explain(model: nn.Module, fill: Fill | str = "zero") -> Explanation:
    """Watches the passes of a model, for the way from its tokens back to the grid; see docs/explain.md.

    Args:
        model: patched or not; nothing of it changes but for hooks, which are gone when the context is left.
        fill: activations of dropped patches: "zero" (later layers do not see them), "nearest" or, at whole blocks,
            "stash"; see `tokenzoo.lifting.Fill`.

    Returns:
        A context manager and its own value: `with tokenzoo.explain(model) as seen:`.

    Raises:
        TypeError: a model of no served class, or a wrapper that has to be looked into first.
        ValueError: a model whose blocks see windows, stages or a scan.
    """
    return Explanation(model, fill)


class Explanation:
    """What the layers of a model saw in the last pass; made by `explain`.

    Layers are modules, or their names in the backbone: its blocks, everything inside of them, and its final norm.
    """

    def __init__(self, model: nn.Module, fill: Fill | str = "zero") -> None:
        self.model, self.fill = backbone_of(model), Fill.parse(fill)
        family = find_family(self.model)
        if not family.model_kind(self.model).takes_added:  # blocks see windows, stages or a scan
            raise ValueError(
                f"{type(self.model).__name__}: explain carries values back to one grid of patches, but the blocks of "
                "this model see windows, stages or a scan; use model.forward_intermediates, or for SViT "
                "model.lift_features"
            )
        self._seen: dict[nn.Module, list[_Call]] = {}
        self._run = object()  # of the block that runs
        self._now: View | None = None
        self._layout: Layout | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Explanation:
        if self._handles:
            raise ValueError("this explanation is watching already; call tokenzoo.explain once more for another one")
        view = find_family(self.model).view(self.model)
        # in front of all other hooks, which may ask at once
        for index, block in enumerate(view.served_blocks):
            begin = partial(self._begin, index)
            self._handles.append(block.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        if not hasattr(self.model, "tokenzoo_recipe"):
            self._handles.append(view.patch_embed.register_forward_pre_hook(self._plain))
        for layer in {**dict.fromkeys(view.blocks.modules()), view.norm: None}:
            self._handles.append(layer.register_forward_hook(self._record, prepend=True))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    # ---- what hooks have got, on the grid

    def activation(self, x: Tensor, layer: nn.Module | str) -> Tensor:
        """What a layer gave: merged patches read the token they went into, dropped ones get the fill.

        Args:
            x: values of the layer's tokens [B, N', C].
            layer: the layer that gave them.

        Returns:
            [B, C, H, W].
        """
        call = self._call(x, 1, layer)
        view = call.view
        x = x if view.merge is None else view.merge.lift(x)
        blocks = find_family(self.model).view(self.model).served_blocks
        if self.fill.kind == "stash" and call.layer not in tuple(blocks):
            if any(step.map.drops for step in view.trace):
                raise ValueError(
                    f"fill='stash': {type(call.layer).__name__} is not a whole block, and nobody kept what it would "
                    "have given for dropped tokens; use tokenzoo.explain(model, fill='zero') or 'nearest'"
                )
        with _gradients_of(x):
            return call.grid(lift(x, self._trace(view.trace), self.fill))

    def gradient(self, grad: Tensor, layer: nn.Module | str) -> Tensor:
        """Gradients at what a layer gave, or attributions of its tokens: each token's is divided among its patches.

        Sums over the grid are sums over the patch tokens, and so are those of activation times gradient.

        Args:
            grad: [B, N', C].
            layer: the layer.

        Returns:
            [B, C, H, W].
        """
        # A token moves as the mean of its patches does, so each of them gets its share of the gradient. Copies would
        # count a token once for every patch and let large tokens rule the weights of a CAM.
        call = self._call(grad, 1, layer)
        with _gradients_of(grad):
            return call.grid(self._shares(call, grad).to(grad.dtype) @ grad)

    def attention(self, attention: Tensor, layer: nn.Module | str) -> Tensor:
        """An attention map of the tokens, as that of all patches.

        A patch asks as its token does; what a token receives is divided among its patches, so that rows still sum to
        one. Patches that were dropped neither ask nor receive: their rows and columns are zero.

        Args:
            attention: [B, heads, N', N'], or with fewer rows where only some tokens ask.
            layer: the module that gave it, `attn_drop` of an attention layer.

        Returns:
            [B, heads, N, N], prefix tokens first.
        """
        call = self._call(attention, 3, layer)
        view = call.view
        # the attention that a token receives counts its patches (proportional attention adds their log number)
        columns = self._shares(call, attention).unsqueeze(1)
        rows = self._readers(call, view.trace if view.queries is None else view.queries, attention).unsqueeze(1)
        if attention.shape[2] != rows.shape[3]:
            raise ValueError(
                f"{type(call.layer).__name__}: a map with {attention.shape[2]} rows, but {rows.shape[3]} tokens asked"
            )
        rows = rows / _divisor(rows.sum(3, keepdim=True))  # soft maps may read less than a whole token
        with _gradients_of(attention):
            return (rows @ attention.float() @ columns.transpose(2, 3)).to(attention.dtype)

    def reshape(self, layer: nn.Module | str) -> Callable[[Tensor], Tensor]:
        """The `reshape_transform` of pytorch-grad-cam for one target layer.

        What the layer has just given is an activation, any other tensor of its shape a gradient.

        Args:
            layer: the target layer.
        """
        layer = self._module(layer)

        def transform(x: Tensor) -> Tensor:
            given = any(call.out() is x for call in self._seen.get(layer, ()))
            return self.activation(x, layer) if given else self.gradient(x, layer)

        return transform

    # ---- hooks

    def _begin(self, index: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._run = object()
        aside = kwargs.get("aside")
        if aside is None:  # not patched: the sequence is the grid
            return
        tokens = aside.state
        if tokens is None:  # called by hand
            self._now = None
            return
        if index == 0:
            layout = tokens.layout._replace(watch=self._tell)
            layout = layout._replace(keep_values=layout.keep_values or self.fill.kind != "zero")
            tokens = tokens._replace(layout=layout, trace=() if tokens.trace is None else tokens.trace)
            aside.state, self._layout = tokens, layout._replace(watch=None)
        self._now = None if tokens.trace is None else View(tokens.trace)

    def _plain(self, embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        view = find_family(self.model).view(self.model)
        self._layout = view.sequences(tuple(view.grid_of(args[0].shape[-2:])), None)[0]
        self._now = View(())

    def _tell(self, view: View) -> None:
        self._now = view

    def _record(self, layer: nn.Module, args: Any, out: Any) -> None:
        calls = [call for call in self._seen.pop(layer, ()) if call.run is self._run]
        if self._now is not None and isinstance(out, Tensor):
            layout = self._layout
            if out.dim() == 3 and not self._now.trace and self._now.merge is None:
                # a class token may have joined behind the blocks
                layout = layout._replace(num_prefix=max(0, out.shape[1] - layout.num_patches))
            calls.append(_Call(layer, self._now, layout, out.shape, weakref.ref(out), self._run))
        self._seen[layer] = calls

    # ---- the way back

    def _module(self, layer: nn.Module | str) -> nn.Module:
        return self.model.get_submodule(layer) if isinstance(layer, str) else layer

    def _call(self, x: Tensor, axis: int, layer: nn.Module | str) -> _Call:
        """The call of a layer in the last pass that x comes from: as many tokens as x has on an axis."""
        layer = self._module(layer)
        name = next((name for name, module in self.model.named_modules() if module is layer), type(layer).__name__)
        calls = self._seen.get(layer)
        if not calls:
            raise ValueError(
                f"{name} was not seen in a pass of the model; call the model, not its blocks, inside of `with "
                "tokenzoo.explain(model) as seen:`, and name a block, a module inside of one or the final norm"
                + (" (attn_drop runs where fused_attn is False)" if name.endswith("attn_drop") else "")
            )
        dims, form = (3, "[B, N', C]") if axis == 1 else (4, "[B, heads, N', N']")
        fit = [call for call in calls if call.out() is x] or [
            call
            for call in calls
            if x.dim() == len(call.shape) == dims and (x.shape[0], x.shape[axis]) == (call.shape[0], call.shape[axis])
        ]
        if not fit:
            gave = " and ".join(str(tuple(call.shape)) for call in calls)
            raise ValueError(
                f"{name} gave {gave} in the last pass, but got {tuple(x.shape)} to carry back; give what belongs to "
                f"that pass, {form}"
            )
        # a layer runs again where a method wants its values for fewer tokens
        if any(call.view.trace is not fit[0].view.trace or call.view.merge is not fit[0].view.merge for call in fit):
            raise ValueError(
                f"{name} ran {len(fit)} times in one pass, on as many tokens but not on the same; take the block "
                "before it or the layer behind it"
            )
        return fit[0]

    def _trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        recipe = getattr(self.model, "tokenzoo_recipe", None)
        return trace if recipe is None else recipe.lift_trace(trace)

    def _readers(self, call: _Call, trace: tuple[TraceStep, ...], like: Tensor, members: bool = False) -> Tensor:
        """What every token of the input reads of those behind a trace [B, N, N'], rows of dropped ones are zero.

        Args:
            call: the call of a layer.
            trace: reductions.
            like: a tensor on the device.
            members: of tokens merged around a branch, those that it counts in instead.
        """
        merge = call.view.merge
        count = merge.n_out if merge is not None else trace[-1].map.n_out if trace else call.length
        with torch.no_grad():
            eye = torch.eye(count, device=like.device).expand(like.shape[0], -1, -1)
            if merge is not None:
                eye = merge.lift_to_members(eye) if members else merge.lift(eye)
            return lift(eye, self._trace(trace), "zero")

    def _shares(self, call: _Call, like: Tensor) -> Tensor:
        """The share that each token of the input has in those that a layer saw [B, N, N'], the columns sum to one."""
        readers = self._readers(call, call.view.trace, like, members=True)
        return readers / _divisor(readers.sum(1, keepdim=True))


def _gradients_of(x: Tensor) -> torch.set_grad_enabled:
    """Gradients where the given values have some: maps that learned weights are part of bring none of their own."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total)


class _Call(NamedTuple):
    """One call of a layer."""

    layer: nn.Module
    view: View
    layout: Layout
    shape: torch.Size
    out: Callable[[], Tensor | None]  # what it gave, as long as somebody else holds it
    run: object

    @property
    def length(self) -> int:
        """Tokens of the input."""
        return self.layout.num_prefix + self.layout.num_patches

    def grid(self, x: Tensor) -> Tensor:
        """The patches of values [B, N, C] as a map [B, C, H, W]."""
        patches = x[:, x.shape[1] - self.layout.num_patches :].transpose(1, 2)
        return split_dim(patches, 2, *self.layout.grid).contiguous()
