"""What the code around a method has to know about it, as one declared value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# in the order in which methods act; "embed" before block 0, "norm" after the final norm and "maps" on the output of a
# decoder are outside of the blocks
PLACES = ("embed", "before", "around", "ahead", "queries", "between", "after", "norm", "maps")


class Place(NamedTuple):
    """Where in a block a method acts.

    Attributes:
        name: one of `PLACES`.
        branches: branches that a method around them merges for: "attention", "mlp".
        once: one map per block, decided from the block's input, serves all branches.
        stream: the residual stream merges, in front of the norm of a branch.
        replaces_attention: the method is another form of attention: it wants a branch that is only that.
    """

    name: str
    branches: tuple[str, ...] = ()
    once: bool = False
    stream: bool = False
    replaces_attention: bool = False


EMBED, BEFORE, AHEAD, QUERIES, BETWEEN, AFTER, NORM, MAPS = (Place(name) for name in PLACES if name != "around")


def around(*branches: str, once: bool = False, stream: bool = False, replaces_attention: bool = False) -> Place:
    """Around branches of a block: tokens merge in front and come apart behind, the sequence keeps its length."""
    return Place("around", branches, once, stream, replaces_attention)


class Scans(NamedTuple):
    """How a method works on models that scan their tokens.

    Attributes:
        reads: the decision looks into a scan, so that the method works on no other models.
        values: the mixer has to hand out the values of its scan; None for "if it reads".
        ordered: maps leave patches in the order of the scan by themselves; else they are put into it.
        gap_rule: how pruned positions let the state decay, see `layers.scan.gaps.stretch`; None: not at all.
    """

    reads: bool = False
    values: bool | Callable[[Any], bool] | None = None
    ordered: bool = False
    gap_rule: str | Callable[[Any], str | None] | None = None


class Traits(NamedTuple):
    """Declared properties of a method; a function of the method stands where the value follows from its options.

    Attributes:
        place: where in a block it acts.
        sizes: token sizes have to be kept, although neither of the next two asks for them.
        proportional: attention adds log sizes to the keys (proportional attention).
        mass_pool: average pooling weighs tokens by size.
        positions: the original place of each token has to be kept.
        reads_attention: the decision looks at queries or keys (before attention, these have to be projected for it).
        reads_maps: the decision looks at attention between tokens: what the class token pays or what tokens receive;
            keys and values alone are none.
        merges: tokens come to stand for several patches; None for what the kind says.
        mixes: values of tokens are mixed, so that a mask has to treat all patches alike that it does not hide; None for
            what the kind says.
        either: for methods that drop in some blocks and merge in others: whether a step, given with the method, drops.
        scans: how it works on models that scan; None where it looks at attention, or changes it.
        carries: a score of every token travels from block to block, see `Method.carry`.
        carries_values: that score looks at the values of all tokens, also where a map ahead of attention leaves fewer.
        remembers: something of the tokens in front of its first block stays at hand, see `core.mixins.Remembering`.
        attends: it may run attention itself, to read or change its map on the way, see `core.mixins.OwnAttention`.
        data_dependent: token counts depend on the images (shapes are not static).
        static: option that makes shapes static then, for messages.
        pads: images may keep different counts, so that padding rows follow.
        opens_span: a later method may rebuild the tokens that this one reduces.
        closes_span: it rebuilds the tokens in front of the last open span, inside the model.
        keeps_trace: the forward pass has to remember its maps.
        products: where its maps are products with matrices: multiply-adds per channel of applying one and of its way
            back, of the method, tokens before and after, and the layout; None where rows are taken and added.
        decodes_reduced: published with decoders that run on the reduced tokens, class maps copied back.
    """

    place: Place | Callable[[Any], Place] = BETWEEN
    sizes: bool = False
    proportional: bool | Callable[[Any], bool] = False
    mass_pool: bool | Callable[[Any], bool] = False
    positions: bool = False
    reads_attention: bool = False
    reads_maps: bool | Callable[[Any], bool] = False
    merges: bool | Callable[[Any], bool] | None = None
    mixes: bool | Callable[[Any], bool] | None = None
    either: Callable[[Any, Any], bool] | None = None
    scans: Scans | None = None
    carries: bool = False
    carries_values: bool = False
    remembers: bool | Callable[[Any], bool] = False
    attends: bool | Callable[[Any], bool] = False
    data_dependent: bool | Callable[[Any], bool] = False
    static: str = ""
    pads: bool | Callable[[Any], bool] = False
    opens_span: bool = False
    closes_span: bool | Callable[[Any], bool] = False
    keeps_trace: bool | Callable[[Any], bool] = False
    products: Callable[[Any, int, int, Any], tuple[int, int]] | None = None
    decodes_reduced: bool | Callable[[Any], bool] = False
