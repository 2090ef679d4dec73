"""One pass of a block's tokens through its attention layers, each of them called once, as a module.

A reduction inside of attention has to decide between projecting and attending. The block therefore hands its layers,
as the argument `attend`, what they do with what they read; hooks, shards and offloaded weights of a layer see an
ordinary call: a tensor goes in, a tensor comes out. Tokens travel in an object that lives for this call only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.learned import Note
from ..core.method import Step
from ..core.mixins import Beside
from ..core.signals import Signals, attend_through
from ..core.tokens import Tokens
from ..maps import TokenMap
from ..ops.attention import Heads
from ..ops.map_reading import MapStatistics
from .merging import Merging, lifted_heads
from .plan import BlockPlan


class AttentionLayer:
    """Mixin of an attention layer whose parts a reducing block runs one by one.

    A family's subclass says how they are spelled: `project`, `project_values`, `output`.
    """

    output_reads_input: bool = False  # whether `output` needs z (a gate, an MLP beside attention)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        """Heads of inputs z [B, N, C]; `v` is None without values.

        Args:
            z: what the layer reads.
            rows: rotations of these tokens, None without.
            with_values: project the values too.
        """
        raise NotImplementedError

    def project_values(self, z: Tensor) -> Tensor:
        """Values of inputs z [B, N, C] -> [B, H, N, Dv]; worth spelling where `project` does more than that."""
        return self.project(z, None).v

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        """What the layer returns [B, N, C] for attention outputs [B, N, H * Dv]; z as `output_reads_input` asks for."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, attend: Callable[..., Tensor] | None = None, **kwargs: Any) -> Tensor:
        """Called by a block: attention of the tokens that attend; called by hand, the layer as it was before patching.

        Args:
            x: what the layer reads [B, N, C].
            *args: arguments of the layer itself.
            attend: given by the block: takes the layer and x.
            **kwargs: arguments of the layer itself.
        """
        if attend is None:
            return super().forward(x, *args, **kwargs)
        return attend(self, x)


def join_heads(parts: list[Heads]) -> Heads:
    """Heads of layers side by side as those of one layer."""
    first = parts[0]
    if len(parts) == 1:
        return first
    q, k = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("q", "k"))
    v = None if first.v is None else torch.cat([part.v for part in parts], dim=1)
    lam = None
    if first.lam is not None:  # one factor a layer, broadcast over its heads
        lam = torch.cat([part.lam.expand(part.q.shape[1] // 2) for part in parts]).view(1, -1, 1, 1)
    return first._replace(q=q, k=k, v=v, lam=lam)


class Decided(NamedTuple):
    """What the steps in and in front of attention have made of the tokens.

    Attributes:
        tokens: the tokens behind attention, their values those of the residual stream in front of it.
        signals: lazy view of the attention.
        merging: the merges around the branches.
        merge: the map to the tokens that attend where these come apart again, else None.
        maps: maps of methods inside of attention where merged tokens attend, to be applied to its output.
    """

    tokens: Tokens
    signals: Signals
    merging: Merging
    merge: TokenMap | None
    maps: list[TokenMap]


class Attending:
    """One pass through attention: every layer projects, the steps decide on all heads together, every layer attends.

    Layers side by side enter each other: the last one to be entered decides, when all of them are at work. A layer may
    run again (recomputed activations): what it starts from is not changed.

    Args:
        block: the block.
        tokens: at its input.
        rope: the family's rotary table or None.
        mask: the user's attention mask or None.
    """

    def __init__(self, block: Any, tokens: Tokens, rope: Any, mask: Tensor | None) -> None:
        self.block, self.rope, self.mask = block, rope, mask
        if mask is not None:
            _refuse_mask(block.tokenzoo.at("around"))
        self.tokens, self.before = tokens, ()
        self.merging: Merging | None = None
        if block.tokenzoo.steps:
            self._start(block.tokenzoo)
        else:
            self.merging = self._merging(tokens)
        self.layers = block.attention_layers()
        self.entered = list(self.layers)  # the layers themselves, without what is wrapped around them
        self.inputs: list[Tensor | None] = [None] * len(self.layers)  # what they read, as hooks and wrappers hand it on
        self.outputs: list[Tensor | None] = [None] * len(self.layers)
        self.seen: list[MapStatistics | None] = [None] * len(self.layers)  # what methods read of the maps
        self.merge: TokenMap | None = None

    def _start(self, plan: BlockPlan) -> None:
        """The steps in front of the layers.

        A decision that needs queries or keys in front of attention is made where their weights are: in the layer.
        """
        before = plan.at("before")
        outside = next((i for i, step in enumerate(before) if step.method.reads_attention), len(before))
        for step in before[:outside]:
            signals = self.block._signals_of(step, self.tokens, self.rope, self.mask)
            self.tokens = self.block._act(step, self.tokens, signals)[0]
        self.before = before[outside:]
        if not any(step.method.reads_attention for step in (*self.before, *plan.at("around"))):
            self.merging = self._merging(self.tokens)

    def result(self) -> tuple[list[Tensor], Decided]:
        """Outputs of all layers [B, N', C], and what was decided on the way."""
        block = self.block
        if self.merging is None:
            self.z = block.attention_input(self.tokens.x)
        else:
            self.merge, self.z = self.merging.enter("attention", self.tokens, block.attention_input)
        self._call(0)
        if all(seen is not None for seen in self.seen):
            self.decided.signals.seen = MapStatistics.joined(self.seen, 1)
        return self.outputs, self.decided

    def _call(self, index: int) -> None:
        layer, z = self.layers[index], self.block.layer_input(index, self.z)
        run = partial(self.run, index)
        self.outputs[index] = run(layer, z) if layer is self.block else self.block.call_layer(layer, z, run)

    def run(self, index: int, layer: AttentionLayer, z: Tensor) -> Tensor:
        """What one layer does.

        Args:
            index: which of the layers.
            layer: the layer itself; wrappers stand between it and the block.
            z: what it reads, as hooks and wrappers hand it on.
        """
        self.entered[index], self.inputs[index] = layer, z
        if index + 1 < len(self.layers):
            self._call(index + 1)
        else:
            self._decide()
        asking, decided = self.asking, self.decided.tokens
        # maps that were decided ahead are applied to what a map gives, unless they are no matrices: then to its rows
        whole = self.merge is not None or (self.ahead and all(token_map.linear for token_map in self.ahead))
        asking.tell(self.merge, None if whole else decided.trace)
        out = self._attended(index)
        (decided if self.merge is None else asking).tell(self.merge)
        return layer.output(out, self.reads[index] if layer.output_reads_input else None)

    def _attended(self, index: int) -> Tensor:
        """Output of one layer: the layer's own attention, or that of a method which reads its map on the way."""
        heads, alone = self.parts[index], not self.ahead and not self.kept
        alone = alone and (self.merge is None or self.merge.in_place)
        for step in self.block.tokenzoo.steps if alone else ():
            if not step.method.attends:
                continue
            module = getattr(self.block, step.key, None) if step.key else None
            first = sum(part.q.shape[1] for part in self.parts[:index])
            beside = Beside(self.inputs[index], step, module, self.block.training, first)
            found = step.method.attend(heads, self.bias, self.asking, beside)
            if found is None:
                continue
            self.seen[index] = found.seen
            if found.note is not None:
                tokens = self.decided.tokens
                records = (*tokens.records, Note(step.order, step.block, found.note))
                self.decided = self.decided._replace(tokens=tokens._replace(records=records))
            return found.out
        return attend_through(heads, self.bias, self.ahead, self.kept)

    # ---- the decision; every layer is at work meanwhile

    def _decide(self) -> None:
        block, tokens, merging, inputs = self.block, self.tokens, self.merging, self.inputs
        for step in self.before:
            project = partial(self._query_keys, tokens, inputs)
            fewer = block._act(step, tokens, block._signals_of(step, tokens, self.rope, self.mask, project))[0]
            if fewer is not tokens:
                tokens, inputs = fewer, self._inputs(fewer)
        if merging is None:
            merging = self._merging(tokens)
            self.merge, z = merging.enter("attention", tokens, block.attention_input)
            inputs = inputs if self.merge is None else self._split(z)
        if self.merge is None:
            self._decide_plain(tokens, inputs, merging)
        else:
            self._decide_merged(tokens, inputs, merging, self.merge)

    def _decide_plain(self, tokens: Tokens, inputs: list[Tensor], merging: Merging) -> None:
        """Steps inside of attention act on the tokens that attend."""
        self.asking = tokens
        block = self.block
        ahead, queries = block.tokenzoo.at("ahead"), block.tokenzoo.at("queries")
        scored = any(step.method.traits.carries_values for step in block.tokenzoo.steps)
        parts = self._project(tokens, inputs, with_values=len(ahead) == 0 or scored)
        bias = block._bias(tokens, self.mask, self.rope)
        signals = Signals(join_heads(parts), bias, tokens, block.training)
        tokens = block._scored(tokens, signals)
        self.ahead, self.kept = [], []
        for step in ahead:
            tokens, signals = block._act(step, tokens, block._with_module(signals, step), self.ahead)
        if ahead:
            inputs = self._inputs(tokens) if self.ahead else inputs
            values = [layer.project_values(z) for layer, z in zip(self.entered, inputs)]
            parts = [part._replace(v=v) for part, v in zip(parts, values)]
            signals = signals.with_values(values[0] if len(values) == 1 else torch.cat(values, dim=1))
        for step in queries:
            tokens, signals = block._act(step, tokens, block._with_module(signals, step), self.kept)
        if self.kept and any(layer.output_reads_input for layer in self.entered):
            inputs = self._inputs(tokens)
        self.parts, self.bias, self.reads = parts, bias, inputs
        self.decided = Decided(tokens, signals, merging, None, [])

    def _decide_merged(self, tokens: Tokens, inputs: list[Tensor], merging: Merging, merge: TokenMap) -> None:
        """Merged tokens attend, and every token reads their output back.

        Steps inside of attention see every token with the keys of the one it merged into, and act on the output.
        """
        block = self.block
        self.asking = tokens = merging.recorded(tokens, merge, "attention")
        inner = tokens._replace(trace=None).reduce(merge, values=inputs[0])
        parts = self._project(inner, inputs)
        heads, bias = join_heads(parts), block._bias(inner, self.mask, self.rope)
        tokens = block._scored(tokens, Signals(heads, bias, inner, block.training), merge)
        bias_behind = block._bias(tokens, self.mask, self.rope)
        signals = Signals(partial(lifted_heads, heads, merge), bias_behind, tokens, block.training)
        maps: list[TokenMap] = []
        for step in (*block.tokenzoo.at("ahead"), *block.tokenzoo.at("queries")):
            tokens, signals = block._act(step, tokens, block._with_module(signals, step), maps)
        self.parts, self.bias, self.reads, self.ahead, self.kept = parts, bias, inputs, [], []
        self.decided = Decided(tokens, signals, merging, merge, maps)

    def _project(self, tokens: Tokens, inputs: list[Tensor], with_values: bool = True) -> list[Heads]:
        """Heads of every layer."""
        rows = self.block.rotations(tokens, self.rope)
        return [layer.project(z, rows, with_values) for layer, z in zip(self.entered, inputs)]

    def _inputs(self, tokens: Tokens) -> list[Tensor]:
        """What every layer reads of the residual stream."""
        return self._split(self.block.attention_input(tokens.x))

    def _split(self, z: Tensor) -> list[Tensor]:
        parts = []
        for index, given in enumerate(self.inputs):
            part = self.block.layer_input(index, z)
            if given is not None and part.dtype != given.dtype:  # a wrapper chose the precision of what a layer reads
                part = part.to(given.dtype)
            parts.append(part)
        return parts

    def _query_keys(self, tokens: Tokens, inputs: list[Tensor]) -> Heads:
        return join_heads(self._project(tokens, inputs, with_values=False))

    def _merging(self, tokens: Tokens) -> Merging:
        signals = partial(self.block._signals_of, rope=self.rope, mask=self.mask)  # no reference back to this object
        return Merging(self.block.tokenzoo.at("around"), tokens, signals)


def _refuse_mask(steps: tuple[Step, ...]) -> None:
    """A mask says which tokens see which; it says nothing about tokens that another form of attention makes."""
    for step in steps:
        if step.method.replaces_attention:
            raise step.error("its attention runs among tokens that no attn_mask covers; call the model without a mask")
