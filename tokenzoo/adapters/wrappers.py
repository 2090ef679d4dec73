"""Models around a backbone: which are looked through, and which have to come last."""

from __future__ import annotations

from torch import nn

from .classes import FIRST, path_of
from .registry import around_of

# wrappers of other libraries that hand on what timm's model returns, by module path and class name (none is imported)
# -> attribute that holds the model
_THIN = {
    ("transformers.models.timm_wrapper.modeling_timm_wrapper", "TimmWrapperModel"): "timm_model",
    ("transformers.models.timm_wrapper.modeling_timm_wrapper", "TimmWrapperForImageClassification"): "timm_model",
    ("transformers.models.timm_backbone.modeling_timm_backbone", "TimmBackbone"): "_backbone",
    ("open_clip.timm_model", "TimmModel"): "trunk",
}
# wrappers that have to come last, and the attribute that holds the model
_OUTERMOST = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks: looks through thin wrappers of timm, Hugging Face and open_clip, dense models,
    and models that a family knows around its own.

    Raises:
        TypeError: a wrapper that has to be patched before wrapping.
    """
    from timm.models._features import FeatureGetterNet

    if isinstance(model, FeatureGetterNet):
        return model.model
    inner = getattr(type(model), "tokenzoo_backbone", None)
    if inner is not None:  # a dense model names the backbone inside it
        return backbone_of(model.tokenzoo_backbone)
    thin = _thin(model)
    if thin is not None:
        return backbone_of(getattr(model, thin))
    around = around_of(model) if isinstance(model, nn.Module) else None
    if around is not None:
        return backbone_of(model.get_submodule(around.path))
    name = type(model).__name__
    if name in _OUTERMOST:
        held = _OUTERMOST[name]
        raise TypeError(f"model is wrapped in {name}; {FIRST.format('wrap')} (it holds the model as model.{held})")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {name}, not a torch.nn.Module")
    return model


def backbone_to_patch(model: nn.Module) -> nn.Module:
    """`backbone_of`, where the model itself may be patched: wrappers of other libraries are asked for what they hold.

    Raises:
        TypeError: with the module to patch.
    """
    thin = _thin(model)
    if thin is not None:
        raise TypeError(f"the model is wrapped in {path_of(type(model))}, which stays as it is; patch model.{thin}")
    return backbone_of(model)


def _thin(model: nn.Module) -> str | None:
    """The attribute of a thin wrapper that holds the model, None for all others."""
    return _THIN.get((type(model).__module__, type(model).__qualname__))
