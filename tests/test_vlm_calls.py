"""Vision-language models: budgets that are solved, what is told about rows, refusals, and traps of transformers."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from torch import nn
from vlm_cases import FAMILIES, IMAGE, LM, TOWER, Loudest, alone, build, inner_of, lm_of, pixels, prompts

import tokenzoo
from tokenzoo.adapters.wholes import whole_of
from tokenzoo.vlm.cache import CACHE
from tokenzoo.vlm.family import vlm_family_of
from tokenzoo.vlm.layer_signals import LayerRows

families = pytest.mark.parametrize("name", FAMILIES)


def family_of(model):
    """The family of a model that may be the first one met."""
    assert whole_of(model) is not None
    return vlm_family_of(model)


def fastv(**options):
    return tokenzoo.FastV(layers=3, **options)


# ---- budgets and what is told


@families
@pytest.mark.parametrize("prefill", [0.85, 0.75])
def test_a_share_of_reading_a_prompt_is_solved(name, prefill):
    """As near below the share as whole rows allow: one row more of any part would be above it, or all are there."""
    model = build(name)
    images = None if family_of(model).image_rows(inner_of(model)) else [64]
    given = {"text": 24, "images": images}
    tokenzoo.patch_model(model, [Loudest(), fastv()], prefill=prefill, **given)
    ratio = tokenzoo.report(model, **given).ratio
    recipe = model.tokenzoo_recipe
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, recipe.dial(1 - recipe.selector.keep - 0.07))
    assert ratio <= prefill < tokenzoo.report(model, **given).ratio


def test_stages_may_be_given_with_a_share():
    """How many there are is no budget; how much each drops is solved for."""
    model = build("llava")
    tokenzoo.patch_model(model, tokenzoo.PyramidDrop(layers=(1, 2), shares=(0.9, 0.8)), prefill=0.8, text=16)
    assert len(model.tokenzoo_recipe.droppers[0].shares) == 2
    tokenzoo.unpatch_model(model)
    with pytest.raises(ValueError, match="fastv: removed=0.7 and prefill=0.8 both say"):
        tokenzoo.patch_model(model, fastv(removed=0.7), prefill=0.8)


def test_a_solved_share_is_what_runs():
    """Multiply-adds of the layers as they run, by their rows, against the report."""
    model = build("llava")
    batch = prompts("llava", model, counts=(1,))
    text = int((batch["input_ids"] != IMAGE).sum())
    tokenzoo.patch_model(model, [Loudest(), fastv()], prefill=0.7, text=text)
    rows = tokenzoo.report(model, text=text)
    with torch.no_grad():
        out = model(**batch, use_cache=True)
    held = [out[CACHE].layers[i].keys.shape[2] for i in range(4)]
    assert held == [row.rows_out for row in rows.layers]
    size = sum(t.numel() * t.element_size() for layer in out[CACHE].layers for t in (layer.keys, layer.values))
    assert size == rows.cache_bytes


@pytest.mark.parametrize(("options", "message"), [
    ({"prefill": 0.0}, "in \\(0, 1\\]"), ({"prefill": 1.5}, "in \\(0, 1\\]"),
    ({"prefill": 0.1, "text": 500}, "out of reach"),
    ({"prefill": 0.5, "images": [0]}, "rows of each image"), ({"flops": 0.5}, "prefill="),
    ({"prefill": 0.5, "keep": 4}, "uniform: keep=4 and prefill=0.5 both say"),
    ({"prefill": 0.5, "keep_total": 9}, "uniform: keep_total=9 and prefill=0.5 both say"),
])  # fmt: skip
def test_shares_that_cannot_be_solved(options, message):
    model = build("llava")
    before = type(model)
    with pytest.raises(ValueError, match=message):
        tokenzoo.patch_model(model, "uniform", **options)
    assert type(model) is before and not tokenzoo.is_patched(model)


def test_models_without_a_size_of_their_own_are_told_the_images():
    with pytest.raises(ValueError, match="images=\\["):
        tokenzoo.patch_model(build("qwen2_vl"), "uniform", prefill=0.5)


@families
def test_visual_rows_are_the_marked_ones(name):
    model = build(name)
    batch = prompts(name, model)
    tokenzoo.patch_model(model, Loudest(keep=6))
    told = tokenzoo.visual_rows(model, **batch)
    with torch.no_grad():
        found = inner_of(model).get_image_features(**pixels(batch)).pooler_output
    assert len(told) == len(found)
    for one, rows in zip(told, found):
        kept = ~torch.isinf(rows).all(-1)
        assert one.modality == "image" and torch.equal(one.keep, kept) and 0 < kept.sum() < len(kept)
        own = torch.arange(len(rows))
        assert torch.equal(one.assign, torch.where(kept, own, -1))


def test_visual_rows_of_merging_say_where_rows_went():
    """Cells of 2 x 2 on a grid of 4 x 4: every row goes to one of its own cell."""
    model = build("llava")
    tokenzoo.patch_model(model, "pool", keep=4)
    for one in tokenzoo.visual_rows(model, **prompts("llava", model)):
        assert int(one.keep.sum()) == 4 and torch.equal(one.keep.nonzero().flatten(), one.assign.unique())
        cell = torch.arange(16) // 8 * 2 + torch.arange(16) % 4 // 2
        assert torch.equal(cell[one.assign], cell)


def test_visual_rows_need_a_selector_and_an_image():
    model = build("llava")
    batch = prompts("llava", model)
    with pytest.raises(ValueError, match="selector first"):
        tokenzoo.visual_rows(model, **batch)
    tokenzoo.patch_model(model, fastv())
    with pytest.raises(ValueError, match="selector first"):
        tokenzoo.visual_rows(model, **batch)
    tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, "uniform", keep=4)
    with pytest.raises(ValueError, match="no images"):
        tokenzoo.visual_rows(model, input_ids=batch["input_ids"])


# ---- refusals


class Derived(transformers.LlavaForConditionalGeneration):
    """A subclass, such as remote code has."""


def _wrapped(kind):
    return lambda model: kind(model)


def _own_forward(model):
    model.forward = model.forward
    return model


def _derived(model):
    model.__class__ = Derived
    return model


@pytest.mark.parametrize(("name", "change", "method", "options", "message"), [
    ("llava", _derived, "uniform", {"keep": 4}, "Derived"),
    ("llava", _wrapped(torch.compile), "uniform", {"keep": 4}, "OptimizedModule"),
    ("llava", _wrapped(nn.DataParallel), "uniform", {"keep": 4}, "DataParallel"),
    ("llava", _own_forward, "uniform", {"keep": 4}, "forward of its own"),
    ("llava", None, "uniform", {"keep": 17}, "has 16 rows"),
    ("llava", None, "uniform", {"keep": 4, "positions": "new"}, "positions="),
    ("llava", None, "uniform", {"kep": 4}, "did you mean 'keep'"),
    ("llava", None, "unifrom", {"keep": 4}, "is unknown"),
    ("llava", None, ["uniform", "random"], {}, "name one of them"),
    ("llava", None, "uniform", {"keep": 4, "keep_total": 8}, "not both"),
    ("llava", None, "fastv", {"layers": 4}, "layers 1 to 3"),
    ("qwen2_vl", None, "uniform", {"keep": 4, "positions": "contiguous"}, "frame, row and column"),
    ("qwen3_vl", None, "fastv", {"layers": 2}, "in front of layers 3 to"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_changes(name, change, method, options, message):
    model = build(name)
    given = model if change is None else change(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        tokenzoo.patch_model(given, method, **options)
    assert [type(m) for m in model.modules()] == kinds and not tokenzoo.is_patched(model)


@pytest.mark.parametrize("make", [
    lambda: transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
        vision_config={**TOWER}, text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 100, "word_embed_proj_dim": 32},
        qformer_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )),
    lambda: transformers.MllamaForConditionalGeneration(transformers.MllamaConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
            "intermediate_size": 32, "image_size": 32, "patch_size": 8, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "max_num_tiles": 4},
        text_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 32, "vocab_size": 100, "cross_attention_layers": [1], "pad_token_id": 0},
    )),
    lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LM)),
])  # fmt: skip
def test_other_models_of_transformers_are_refused_by_name(make):
    """A Q-Former has a fixed number of rows, cross-attention hands on no rows, a language model has no images."""
    model = make()
    with pytest.raises((ValueError, TypeError), match=type(model).__name__):
        tokenzoo.patch_model(model, "uniform", keep=4)


@pytest.mark.parametrize("make", [
    lambda: timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2),
    lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)),
])  # fmt: skip
@pytest.mark.parametrize(("method", "what"), [
    ("fastervlm", "chooses which rows"), ("fastv", "drops visual rows"), (fastv(), "drops visual rows"),
    (Loudest(keep=4), "Loudest"), (["tome", "fastv"], "drops visual rows"),
])  # fmt: skip
def test_towers_alone_refuse_selectors_and_droppers_by_name(make, method, what):
    with pytest.raises((ValueError, TypeError), match=what):
        tokenzoo.patch_model(make(), method)


def test_patching_twice_and_taking_off_nothing():
    model = build("llava")
    with pytest.raises(ValueError, match="not patched"):
        tokenzoo.unpatch_model(model)
    tokenzoo.patch_model(model, "uniform", keep=4)
    with pytest.raises(ValueError, match="patched already"):
        tokenzoo.patch_model(model, "fastv")


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_other_caches_are_refused(kind):
    model = build("llava")
    tokenzoo.patch_model(model, "uniform", keep=4)
    cache = {
        "quantized": lambda: object.__new__(type("QuantizedCache", (transformers.DynamicCache,), {})),
        "offloaded": transformers.DynamicCache,
    }[kind]
    if kind == "offloaded":  # made by hand: transformers asks for an accelerator at once
        made = transformers.DynamicCache()
        made.offloading = True
        with pytest.raises(TypeError, match="offloaded, whose rows cannot be dropped"):
            tokenzoo.vlm.cache.reduced(made)
        return
    with pytest.raises(TypeError, match="rows cannot be dropped"):
        tokenzoo.vlm.cache.reduced(cache())


def test_flex_masks_are_refused():
    index = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="sdpa"):
        tokenzoo.vlm.gather.take_mask(SimpleNamespace(), index, index, None)


def test_prompts_in_chunks_cannot_be_followed_by_droppers():
    """A dropper is asked by the whole prompt's last row."""
    model = build("llava")
    batch = prompts("llava", model, counts=(1,))
    tokenzoo.patch_model(model, fastv())
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=3, prefill_chunk_size=7)


# unpatched, answers in chunks are others before 5.24 (prompts with images lose them), and where images see themselves
@pytest.mark.skipif(transformers.__version__ < "5.24", reason="chunks of prompts with images fail unpatched")
@pytest.mark.parametrize("name", [name for name in FAMILIES if "gemma" not in name])
@pytest.mark.parametrize("size", [1, 7])
def test_prompts_in_chunks_with_a_selector(name, size):
    """Chunks of which all rows go, and batches whose prompts lose different numbers in each."""
    model = build(name, double=True)
    batch = prompts(name, model)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    with torch.no_grad():
        tokenzoo.patch_model(model, Loudest(keep=4))
        whole = model.generate(**batch, **options)
        parts = model.generate(**batch, **options, prefill_chunk_size=size)
    assert torch.equal(parts.sequences, whole.sequences)
    assert (torch.stack(parts.logits) - torch.stack(whole.logits)).abs().max() <= 1e-6


def test_reentrant_checkpoints_cannot_be_followed_by_droppers():
    """They hand on the gradients of tensors alone, and rows between layers are more than that."""
    model = build("llava")
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, fastv())
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**batch)
    model.eval()
    model(**batch)


def test_labels_and_few_logits_are_refused_together():
    model = build("llava")
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, "uniform", keep=4)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**batch, labels=batch["input_ids"], logits_to_keep=2)


# ---- traps


def test_padding_behind_prompts_hides_no_words():
    """Gemma 3 makes masks of four dimensions; rows that we put in behind a prompt see a part of it."""
    model = build("gemma3", double=True)
    batch = prompts("gemma3", model, side="right")
    tokenzoo.patch_model(model, [Loudest(keep=9), fastv()])
    with torch.no_grad():
        for row, one in zip(model(**batch).logits, alone("gemma3", batch, (1, 2))):
            want = model(**one).logits[0]
            assert (row[: len(want)] - want).abs().max() <= 1e-6


@families
def test_gaps_of_positions_are_no_borders_of_packed_prompts(name):
    """Without a mask and a cache, transformers reads gaps as packed prompts and closes the mask between them."""
    model = build(name)
    batch = prompts(name, model, counts=(1,))
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    with torch.no_grad():
        want = model(**batch).logits
        bare = {k: v for k, v in batch.items() if k != "attention_mask"}
        assert torch.equal(model(**bare, use_cache=False).logits, want)
        assert torch.equal(model(**bare).logits, want)


@families
def test_flash_attention_sees_no_positions(name, monkeypatch):
    """Layers get none, and where masks are made from a row of four of them, it is without gaps."""
    model = build(name)
    batch = prompts(name, model, counts=(1,))
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    seen = []
    for layer in lm_of(model).layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("position_ids")), with_kwargs=True)
    if family_of(model).position_axes > 1:
        module = inspect.getmodule(type(lm_of(model)).__mro__[2])
        made = module.create_causal_mask

        def spy(*args, **kwargs):
            rows = kwargs.get("position_ids")
            assert rows is None or bool((rows.diff(dim=-1) == 1).all())
            return made(*args, **kwargs)

        monkeypatch.setattr(module, "create_causal_mask", spy)
    with torch.no_grad():
        model(**batch)
    assert len(seen) == 4 and all(each is None for each in seen)


@families
def test_signatures_are_the_published_ones(name):
    """generate, Trainer and PEFT look at them."""
    model = build(name)
    parts = (model, inner_of(model), lm_of(model))
    before = [inspect.signature(part.forward) for part in parts]
    encode = inspect.signature(inner_of(model).get_image_features)
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    assert [inspect.signature(part.forward) for part in parts] == before
    assert inspect.signature(inner_of(model).get_image_features) == encode


def test_dispatched_models_run_the_reducing_forward():
    """accelerate puts a `forward` on instances, in front of that of the class."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llava")
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    with torch.no_grad():
        want = model(**batch).logits
    tokenzoo.unpatch_model(model)
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    with torch.no_grad():
        plain = model(**batch).logits
        tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
        assert torch.equal(model(**batch).logits, want)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(**batch).logits, plain)


@families
def test_a_made_up_placeholder_is_a_word(name):
    """A language model may answer with the id of a placeholder; only where images come in are rows looked at."""
    model = build(name)
    batch = prompts(name, model, counts=(1,))
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        held = [layer.keys.shape[2] for layer in out[CACHE].layers]
        step = model(torch.tensor([[IMAGE]]), **{CACHE: out[CACHE]}, use_cache=True)
    assert step.logits.shape[1] == 1 and torch.isfinite(step.logits).all()
    assert [layer.keys.shape[2] for layer in step[CACHE].layers] == [n + 1 for n in held]


def test_of_equal_scores_the_first_rows_stay():
    """Scores underflow, and half precision has few values."""
    visual = torch.tensor([[False, *[True] * 6, False]])
    rows = LayerRows(torch.zeros(1, 8, 4), visual, torch.ones_like(visual), [3])
    assert rows.best(torch.zeros(1, 8)).keep.tolist() == [[False, True, True, True, False, False, False, False]]


def test_calls_do_not_depend_on_the_calls_before():
    """Qwen-VL keeps `rope_deltas` of the last prompt on the model."""
    model = build("qwen2_vl")
    first, second = (prompts("qwen2_vl", model, counts=(n,), seed=n) for n in (1, 2))
    tokenzoo.patch_model(model, [Loudest(keep=6), fastv()])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.generate(**second, **options)
    model.generate(**first, **options)
    assert torch.equal(model.generate(**second, **options), want)


def test_patched_models_are_modules_as_before():
    model = build("llava")
    tokenzoo.patch_model(model, "uniform", keep=4)
    assert isinstance(model, transformers.LlavaForConditionalGeneration) and isinstance(model, nn.Module)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
