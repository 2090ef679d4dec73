"""Names of transformers that are not promised to stay, and that vision-language models here stand on.

One test per name: when a release moves one, its message says what moved and which file has to follow.
"""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama
from transformers.utils import output_capturing

from tokenzoo.vlm import families  # noqa: F401 (importing them is a check of all class names)
from tokenzoo.vlm.families.language_models import LAYERS, LMS
from tokenzoo.vlm.family import vlm_families

TELL = f"transformers {transformers.__version__} has moved what {{file}} stands on: {{what}}"


def holds(condition: object, file: str, what: str) -> None:
    assert condition, TELL.format(file=file, what=what)


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", [
    "get_seq_length", "get_query_offset", "get_mask_sizes", "reorder_cache", "batch_repeat_interleave",
    "batch_select_indices", "crop", "reset",
])  # fmt: skip
def test_caches(name):
    holds(callable(getattr(DynamicCache, name, None)), "vlm/cache.py", f"DynamicCache.{name}")


def test_layers_of_caches_hold_keys_and_values():
    layer = DynamicLayer()
    holds(hasattr(layer, "keys") and hasattr(layer, "values"), "evaluation/vlm_speed.py", "keys and values of a layer")
    holds(isinstance(DynamicCache().layers, list), "evaluation/vlm_speed.py", "DynamicCache.layers")


def test_the_cache_goes_by_a_known_name():
    names = parameters(modeling_llama.LlamaModel.forward)
    holds({"cache", "past_key_values"} & set(names), "vlm/cache.py", "the name of the cache in forward (CACHE)")


@pytest.mark.parametrize(("name", "first"), [
    ("_maybe_prepare_encoder_kwargs_for_generation", None),
    ("_prefill", ["self", "input_ids", "generation_config", "model_kwargs"]),
])  # fmt: skip
def test_generation(name, first):
    found = getattr(GenerationMixin, name, None)
    holds(callable(found), "vlm/head.py", f"GenerationMixin.{name}")
    if first is not None:
        holds(parameters(found)[: len(first)] == first, "vlm/head.py", f"arguments of GenerationMixin.{name}")
    else:
        holds(len(parameters(found)) >= 3, "vlm/head.py", f"arguments of GenerationMixin.{name}")


def test_recorded_outputs_are_looked_up_by_class():
    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    holds(isinstance(registry, dict), "vlm/standing_in.py", "output_capturing._CAN_RECORD_REGISTRY")


def test_checkpointing_layers():
    source = inspect.getsource(GradientCheckpointingLayer)
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        holds(name in source, "vlm/lm.py", f"GradientCheckpointingLayer.{name}")


@pytest.mark.parametrize("layer", list(LAYERS), ids=lambda cls: cls.__name__)
def test_decoder_layers(layer):
    names = parameters(layer.forward)
    taken = {"hidden_states", "attention_mask", "position_embeddings"}
    holds(taken <= set(names), "vlm/layer.py", f"{layer.__name__}.forward takes {sorted(taken)}")
    module = inspect.getmodule(layer)
    rotation = [name for name in vars(module) if name.startswith("apply_") and "rotary_pos_emb" in name]
    holds(rotation, "vlm/layer_signals.py", f"apply_rotary_pos_emb in {module.__name__}")
    source = inspect.getsource(layer)
    holds("self.self_attn" in source and "self.input_layernorm" in source, "vlm/layer_signals.py",
          f"self_attn and input_layernorm of {layer.__name__}")  # fmt: skip


@pytest.mark.parametrize("model", list(LMS), ids=lambda cls: cls.__name__)
def test_language_models(model):
    names, source = parameters(model.forward), inspect.getsource(model)
    holds({"inputs_embeds", "attention_mask", "position_ids"} <= set(names), "vlm/lm.py", f"{model.__name__}.forward")
    for name in ("self.layers", "self.embed_tokens", "self.rotary_emb"):
        holds(name in source, "vlm/lm.py", f"{name} of {model.__name__}")


FAMILIES = {cls: family for family in vlm_families() for cls in family.models}


@pytest.mark.parametrize("model", list(FAMILIES), ids=lambda cls: cls.__name__)
def test_multimodal_models(model):
    family = FAMILIES[model]
    file = f"vlm/families ({family.name})"
    for modality in family.modalities:
        holds(hasattr(model, f"get_{modality}_features"), file, f"{model.__name__}.get_{modality}_features")
    source = inspect.getsource(import_module(model.__module__))
    holds("pooler_output" in source, file, f"pooler_output in {model.__module__}")
    for part in (family.tower, family.projector):
        for name in [] if part is None else part.split("."):
            holds(f"self.{name} = " in source, file, f"{name} in {model.__module__}")
