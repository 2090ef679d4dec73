"""Language models of transformers and their layers, by exact class; families share them.

All of these call `decoder_layer(hidden_states, attention_mask=..., position_embeddings=..., **kwargs)`, rotate with the
`apply_rotary_pos_emb` of their own file, and make their masks from `attention_mask` of two dimensions or take those of
four as they are.
"""

from __future__ import annotations

from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextModel

from ...adapters.classes import path_of
from ..layer import ReducingDecoderLayer
from ..lm import ReducingLm
from ..standing_in import stand_in

LMS: dict[type, type] = {}
LAYERS: dict[type, type] = {}


def serve(model: type, layer: type) -> None:
    """Adds a language model and its layer."""
    LMS[model] = stand_in(ReducingLm, model, __name__)
    LAYERS[layer] = stand_in(ReducingDecoderLayer, layer, __name__)


serve(LlamaModel, LlamaDecoderLayer)
serve(MistralModel, MistralDecoderLayer)
serve(Qwen2Model, Qwen2DecoderLayer)
serve(Qwen3Model, Qwen3DecoderLayer)
serve(Qwen2VLTextModel, Qwen2VLDecoderLayer)
serve(Qwen2_5_VLTextModel, Qwen2_5_VLDecoderLayer)
serve(Qwen3VLTextModel, Qwen3VLTextDecoderLayer)
serve(GemmaModel, GemmaDecoderLayer)
serve(Gemma2Model, Gemma2DecoderLayer)
serve(Gemma3TextModel, Gemma3DecoderLayer)


def check_language_model(lm: nn.Module, where: str) -> None:
    """Refuses a language model of another class.

    Raises:
        TypeError: with the classes that are served.
    """
    served = ", ".join(sorted(cls.__name__ for cls in LMS))
    if type(lm) not in LMS:
        raise TypeError(f"{where} is {path_of(type(lm))}, of which rows cannot be dropped; served are exactly {served}")
    for index, layer in enumerate(lm.layers):
        if type(layer) not in LAYERS:
            raise TypeError(f"{where}.layers.{index} is {path_of(type(layer))}; served are the layers of {served}")
