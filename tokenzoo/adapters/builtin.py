"""The families that come with the package; importing this file registers them."""

from __future__ import annotations

from .cait.model import FAMILY as CAIT
from .convit.model import FAMILY as CONVIT
from .eva.model import FAMILY as EVA
from .levit.model import FAMILY as LEVIT
from .pit.model import FAMILY as PIT
from .registry import register_family
from .sam.model import FAMILY as SAM
from .scan.plain_mamba import FAMILY as PLAIN_MAMBA
from .scan.vim import FAMILY as VIM
from .svit.model import FAMILY as SVIT
from .vit.model import FAMILY as VIT
from .vit.stems import FAMILY as STEMS
from .volo.model import FAMILY as VOLO
from .xcit.model import FAMILY as XCIT

for _family in (VIT, EVA, STEMS, SVIT, SAM, VIM, PLAIN_MAMBA, CAIT, XCIT, CONVIT, PIT, LEVIT, VOLO):
    register_family(_family)
