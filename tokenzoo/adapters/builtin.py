"""The families that come with the package; importing this file registers them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from .beit import FAMILY as BEIT
from .cait.model import FAMILY as CAIT
from .convit.model import FAMILY as CONVIT
from .crossvit.model import FAMILY as CROSSVIT
from .eva.model import FAMILY as EVA
from .hiera.model import FAMILY as HIERA
from .levit.model import FAMILY as LEVIT
from .naflex.model import FAMILY as NAFLEX
from .pit.model import FAMILY as PIT
from .registry import register_family, register_later
from .relpos import FAMILY as RELPOS
from .sam.model import FAMILY as SAM
from .scan.plain_mamba import FAMILY as PLAIN_MAMBA
from .scan.vim import FAMILY as VIM
from .svit.model import FAMILY as SVIT
from .torchvision import FAMILY as TORCHVISION
from .vit.model import FAMILY as VIT
from .vit.stems import FAMILY as STEMS
from .volo.model import FAMILY as VOLO
from .xcit.model import FAMILY as XCIT

_FAMILIES = (
    VIT, EVA, BEIT, RELPOS, NAFLEX, CAIT, XCIT, CONVIT, PIT, LEVIT, VOLO, HIERA, CROSSVIT, SAM, STEMS, SVIT, VIM,
    PLAIN_MAMBA, TORCHVISION,
)  # fmt: skip
for _family in _FAMILIES:
    register_family(_family)
register_later("dinov2", "tokenzoo.adapters.dinov2_hub")
register_later("open_clip", "tokenzoo.adapters.open_clip.model")
register_later("transformers", "tokenzoo.adapters.hf.family")
register_later("transformers", "tokenzoo.vlm.patching")

# files that only newer releases of timm have -> module here
_NEWER = {"qwen3_vit": "towers.qwen3", "deepseek_vit": "towers.deepseek", "gemma4_vit": "towers.gemma4"}
for _file, _module in _NEWER.items():
    if find_spec(f"timm.models.{_file}") is not None:
        register_family(import_module(f"{__package__}.{_module}").FAMILY)
