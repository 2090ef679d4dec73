"""Known models that no family serves: why, in one sentence, and the nearest thing that works.

One table, by the full name of a class or by the module that it comes from (none is imported). A class that a family
serves is never looked up here, and one that stands in no row is refused without a reason of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Unserved(NamedTuple):
    """Why a model cannot reduce tokens.

    Attributes:
        why: goes on from "it".
        nearest: what to use instead.
    """

    why: str
    nearest: str


_VIT = "timm's vit_small_patch16_224, or another plain ViT of its size"
_MAPS = "timm's samvit_base_patch16 under 'cluster', or a plain ViT in tokenzoo.dense, which restores the grid"
_STAGES = "timm's pit_s_224, levit_256 or (at its end) hiera_small_224, whose stages attend globally, or a plain ViT"
_SMALL = "timm's vit_tiny_patch16_224 or deit_tiny_patch16_224"

WINDOWS = Unserved("attends inside windows of a fixed size, cut from the whole map: no token can leave one", _VIT)
MAPS = WINDOWS._replace(nearest=_MAPS)
POOLED = Unserved("shrinks its map from stage to stage, or inside of attention, by steps over the whole grid", _STAGES)
SEMANTIC = Unserved(
    "attends inside windows, and goes through a few semantic tokens of its own: its reduction is trained in", _VIT
)
CONVOLVED = Unserved("attends on maps of a convolutional network, whose convolutions need the whole grid", _SMALL)
CONVOLUTIONS = Unserved("is a convolutional network: its layers need the whole grid", _VIT)
MIXED = Unserved("mixes tokens by weights as long as the sequence: none can leave it", _VIT)
APART = Unserved(
    "is a model taken apart, or rebuilt as a graph",
    "features_only=True as timm makes it for ViTs (feature_cls='getter'), which is looked through",
)

# names of modules, "{}" of the package in its place
_MODULES: tuple[tuple[str, Unserved, str], ...] = (
    ("timm.models.{}", WINDOWS, "davit efficientvit_msra gcvit nest swin_transformer swin_transformer_v2"),
    ("timm.models.{}", WINDOWS, "swin_transformer_v2_cr tiny_vit"),
    ("timm.models.{}", MAPS, "hieradet_sam2"),
    ("timm.models.{}", POOLED, "coat mvitv2 nextvit pvt_v2 twins visformer"),
    ("timm.models.{}", CONVOLVED, "byobnet cpubone csatv2 edgenext efficientformer efficientformer_v2"),
    ("timm.models.{}", CONVOLVED, "efficientvit_mit fastvit iformer lowformer maxxvit metaformer mobilenetv5 shvit"),
    ("timm.models.{}", CONVOLVED, "swiftformer"),
    ("timm.models.{}", MIXED, "mlp_mixer"),
    ("timm.models.{}", CONVOLUTIONS, "convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet"),
    ("timm.models.{}", CONVOLUTIONS, "focalnet ghostnet hgnet hrnet inception_next inception_resnet_v2 inception_v3"),
    ("timm.models.{}", CONVOLUTIONS, "inception_v4 lcnetv2 mambaout mobilenetv3 nasnet nfnet pnasnet rdnet regnet"),
    ("timm.models.{}", CONVOLUTIONS, "repghost repvit resnet resnetv2 rexnet selecsls senet starnet tresnet vgg"),
    ("timm.models.{}", CONVOLUTIONS, "vovnet xception xception_aligned"),
    ("timm.models.{}", APART, "_features _features_fx"),
    ("torchvision.models.{}", WINDOWS, "maxvit swin_transformer"),
    ("torchvision.models.{}", CONVOLUTIONS, "alexnet convnext densenet efficientnet googlenet inception mnasnet"),
    ("torchvision.models.{}", CONVOLUTIONS, "mobilenetv2 mobilenetv3 regnet resnet shufflenetv2 squeezenet vgg"),
    ("transformers.models.{0}.modeling_{0}", WINDOWS, "dinat swin swin2sr swinv2"),
    ("transformers.models.{0}.modeling_{0}", MAPS, "sam sam2 vitdet"),
    ("transformers.models.{0}.modeling_{0}", POOLED, "cvt glpn hiera levit pvt pvt_v2 segformer"),
    ("transformers.models.{0}.modeling_{0}", CONVOLVED, "mobilevit mobilevitv2 swiftformer"),
    ("transformers.models.{0}.modeling_{0}", CONVOLUTIONS, "bit convnext convnextv2 dinov3_convnext efficientnet"),
    ("transformers.models.{0}.modeling_{0}", CONVOLUTIONS, "focalnet hgnet_v2 mobilenet_v1 mobilenet_v2 poolformer"),
    ("transformers.models.{0}.modeling_{0}", CONVOLUTIONS, "regnet resnet"),
)
_ROWS: dict[str, Unserved] = {
    # repositories whose classes are in no package index
    "dinov3.models.vision_transformer": Unserved(
        "is a class of a repository that is no package",
        "timm's vit_small_patch16_dinov3 or transformers' DINOv3ViTModel with the same weights, or register_family",
    ),
    "models_mae": Unserved("drops patches at random by itself, for pre-training", "timm's vit_base_patch16_224.mae"),
    "timm.models.efficientvim": Unserved("convolves the grid around a state space", "vim_tiny of tokenzoo.models"),
    "timm.models.sequencer": Unserved("runs recurrent layers along rows and columns of the grid", _VIT),
    "timm.models.tnt": Unserved("runs the pixels of every patch through a transformer beside that of patches", _VIT),
    "tokenzoo.models.stvit.model": SEMANTIC,
    "open_clip.modified_resnet": CONVOLUTIONS._replace(nearest="an open_clip model with a ViT tower (ViT-B-32)"),
    **{form.format(name): row for form, row, names in _MODULES for name in names.split()},
}


def why_not(cls: type) -> Unserved | None:
    """The row of a class, or of one that it is derived from; None where there is none.

    Args:
        cls: class of a model that no family serves.
    """
    for base in cls.__mro__:
        row = _ROWS.get(f"{base.__module__}.{base.__qualname__}", _ROWS.get(base.__module__))
        if row is not None:
            return row
    return None
