"""Models around a backbone: which are looked through, and which have to come last."""

from __future__ import annotations

from torch import nn

from .classes import FIRST, path_of
from .registry import around_of

# wrappers of other libraries that call one backbone as it is, by module path and class name (none is imported)
# -> attribute that holds it; whatever else they hold (a head, a text tower) is left alone
_HOLDS = {
    ("transformers.models.timm_wrapper.modeling_timm_wrapper", "TimmWrapperModel"): "timm_model",
    ("transformers.models.timm_wrapper.modeling_timm_wrapper", "TimmWrapperForImageClassification"): "timm_model",
    ("transformers.models.timm_backbone.modeling_timm_backbone", "TimmBackbone"): "_backbone",
    ("open_clip.timm_model", "TimmModel"): "trunk",
}
# the same for classes that have many subclasses, one per task or kind of adapter
_BASES_HOLD = {
    ("peft.peft_model", "PeftModel"): "base_model",
    ("peft.tuners.tuners_utils", "BaseTuner"): "model",
}
# wrappers that have to come last, and the attribute that holds the model
_OUTERMOST = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def known_of(model: nn.Module) -> nn.Module:
    """The module that a family knows, a backbone or a model around one: what only calls it is looked through (wrappers
    of timm, Hugging Face and open_clip, peft, dense models).

    Raises:
        TypeError: a wrapper that has to be put on after patching, or no module.
    """
    from timm.models._features import FeatureGetterNet

    if isinstance(model, FeatureGetterNet):
        return known_of(model.model)
    if getattr(type(model), "tokenzoo_backbone", None) is not None:  # a dense model names the backbone inside it
        return known_of(model.tokenzoo_backbone)
    held = _held(model)
    if held is not None:
        return known_of(getattr(model, held))
    name = type(model).__name__
    if name in _OUTERMOST:
        held = _OUTERMOST[name]
        raise TypeError(f"model is wrapped in {name}; {FIRST.format('wrap')} (it holds the model as model.{held})")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {name}, not a torch.nn.Module")
    return model


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks: `known_of`, and models that a family knows around its own looked through too.

    Raises:
        TypeError: see `known_of`.
    """
    model = known_of(model)
    around = around_of(model)
    return model if around is None else backbone_of(model.get_submodule(around.path))


def backbone_to_patch(model: nn.Module) -> nn.Module:
    """`backbone_of`, where patching is asked for: wrappers of timm's models in other libraries stay as they are, and
    whoever patches one of those models names it.

    Raises:
        TypeError: with the module to patch; see `known_of` too.
    """
    backbone = backbone_of(model)
    for module in model.modules():
        if (type(module).__module__, type(module).__qualname__) in _HOLDS and _inside(module, backbone) is not None:
            raise TypeError(
                f"the model is wrapped in {path_of(type(module))}, which stays as it is; patch "
                f"model.{_inside(model, backbone)}"
            )
    return backbone


def _inside(model: nn.Module, inner: nn.Module) -> str | None:
    """The name of a module inside of another one."""
    return next((name for name, module in model.named_modules() if module is inner), None)


def _held(model: nn.Module) -> str | None:
    """The attribute of a wrapper that holds the backbone, None for all others."""
    held = _HOLDS.get((type(model).__module__, type(model).__qualname__))
    bases = [_BASES_HOLD.get((cls.__module__, cls.__qualname__)) for cls in type(model).__mro__]
    return next((name for name in (held, *bases) if name is not None), None)
