"""Dense prediction: decoders on the patch grid, and the way back to it from reduced tokens."""

from .create import create_segmenter
from .dinov2 import load_dinov2_linear
from .dtop import DToP
from .dtop_head import DToPHead
from .eomt import EoMT
from .eomt_checkpoint import load_eomt
from .features import Encoded, encode
from .heads import HEADS, BNLinearHead, LinearHead, MaskTransformer
from .mmseg import load_dtop
from .multi import LayersSegmenter
from .official import load_official_segmenter
from .segmenter import Segmenter
from .storage import load_segmenter, save_segmenter

__all__ = [
    "HEADS",
    "BNLinearHead",
    "DToP",
    "DToPHead",
    "EoMT",
    "Encoded",
    "LayersSegmenter",
    "LinearHead",
    "MaskTransformer",
    "Segmenter",
    "create_segmenter",
    "encode",
    "load_dinov2_linear",
    "load_dtop",
    "load_eomt",
    "load_official_segmenter",
    "load_segmenter",
    "save_segmenter",
]
