"""What the methods of a model owe to the loss of a training step, whatever they are."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..adapters.wrappers import backbone_of
from ..core.learned import Learned, Teaching
from ..core.tokens import Tokens
from ..cost.prices import prices_of


def learned_methods(model: nn.Module) -> dict[int, Learned]:
    """Methods with losses of their own, by their number in the recipe.

    Args:
        model: patched or not.
    """
    methods = backbone_of(model).tokenzoo_recipe.methods if is_patched(model) else ()
    return {order: m for order, m in enumerate(methods) if isinstance(m, Learned) and m.owes}


def names_owed(model: nn.Module) -> tuple[str, ...]:
    """Names of all their losses, "<method>_<loss>"; methods of one name share them."""
    return tuple(dict.fromkeys(f"{m.name}_{name}" for m in learned_methods(model).values() for name in m.owes))


def asked(model: nn.Module) -> frozenset[str]:
    """Fields of `Teaching` that these losses cannot do without."""
    return frozenset(field for m in learned_methods(model).values() for field in m.asked())


def losses_owed(model: nn.Module, tokens: Tokens, teaching: Teaching) -> dict[str, Tensor]:
    """The losses of one forward pass, by the names of `names_owed`; zero where a method had nothing to decide.

    Args:
        model: patched.
        tokens: what its `forward_tokens` returned in training.
        teaching: what the teacher says, and what else the losses go by; prices are looked up where they are missing.

    Raises:
        ValueError: a method with other losses than it declares.
    """
    found = {name: tokens.x.new_zeros((), dtype=tokens.x.float().dtype) for name in names_owed(model)}
    methods = learned_methods(model)
    if teaching.prices is None and any(method.priced for method in methods.values()):
        teaching = teaching._replace(prices=prices_of(model))
    for order, method in methods.items():
        records = tuple(record for record in tokens.records if record.order == order)
        losses = method.losses(records, teaching) if records else {}
        if records and set(losses) != set(method.owes):
            raise ValueError(
                f"{method.name}: losses() returned {sorted(losses)}, but the class declares owes={method.owes}; name "
                "the same"
            )
        for name, loss in losses.items():
            found[f"{method.name}_{name}"] = found[f"{method.name}_{name}"] + loss
    return found
