"""Static caches: steps are those of a dynamic cache, less memory is taken, and one compiled graph serves all steps."""

from __future__ import annotations

import pytest
import torch
import transformers
from vlm_cases import FAMILIES, Loudest, build, lm_of, prompts

import tokenzoo
from tokenzoo.vlm.cache import CACHE

# PaliGemma 2 of transformers fails with static caches unpatched
families = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma2"])
OPTIONS = {
    "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip


def steps(model, batch, **options):
    with torch.no_grad():
        out = model.generate(**batch, **OPTIONS, **options)
    return out.sequences, torch.stack(out.logits), out[CACHE]


@families
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_steps_are_those_of_a_dynamic_cache(name, positions):
    model = build(name, double=True)
    batch = prompts(name, model)
    if positions == "contiguous" and tokenzoo.vlm.family.vlm_family_of(model).position_axes > 1:
        return
    tokenzoo.patch_model(model, Loudest(keep=6), positions=positions)
    ids, logits, held = steps(model, batch)
    static_ids, static_logits, static = steps(model, batch, cache_implementation="static")
    assert torch.equal(ids, static_ids)
    assert (logits - static_logits).abs().max() <= 1e-6
    assert isinstance(static, transformers.StaticCache) and int(static.get_seq_length()) == held.get_seq_length()
    # no column is held for a row that went, and none is missing
    pairs = [(a.keys.shape[2], b.keys.shape[2]) for a, b in zip(static.layers, held.layers) if not a.is_sliding]
    assert all(a == b for a, b in pairs) and (pairs or name == "vipllava")


@families
def test_a_cache_of_the_user(name):
    """Not shortened: it may be used for other prompts; steps by hand with masks that count all rows ever put in."""
    model = build(name, double=True)
    batch = prompts(name, model)
    tokenzoo.patch_model(model, Loudest(keep=6))
    n = batch["input_ids"].shape[1]
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=n + 8)
    ids, logits, _ = steps(model, batch)
    # PaliGemma of transformers takes a cache that was reset for one in use, and sees causally
    for _ in range(1 if name == "paligemma" else 2):
        found = steps(model, batch, **{CACHE: cache})
        assert torch.equal(found[0], ids) and (found[1] - logits).abs().max() <= 1e-6
        assert cache.layers[-1].keys.shape[2] == n + 8
        cache.reset()


def test_beams():
    model = build("llava", double=True)
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, Loudest(keep=6))
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    want = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), want)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_one_compiled_graph_serves_all_steps(name):
    """In Gemma 3 two, as without tokenzoo: the first step sets what its sliding layers hold."""
    model = build(name, double=True)
    batch = prompts(name, model)
    plain, _ = compiled_steps(model, batch)
    tokenzoo.patch_model(model, Loudest(keep=6), positions="contiguous" if name == "llava" else "original")
    ids, logits, _ = steps(model, batch)
    runs, found = compiled_steps(model, batch)
    assert torch.equal(found[0], ids) and (found[1] - logits).abs().max() <= 1e-6
    assert len(runs) == OPTIONS["max_new_tokens"] - 1
    assert len({id(graph) for graph in runs}) == len({id(graph) for graph in plain}) == (2 if name == "gemma3" else 1)


def compiled_steps(model, batch):
    """The graph that ran in each step, and what was generated."""
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(graph)
            return graph(*args)

        return run

    torch._dynamo.reset()
    config = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    found = steps(model, batch, cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    return runs, found


def test_droppers_are_refused_by_name():
    model = build("llava")
    batch = prompts("llava", model)
    tokenzoo.patch_model(model, [Loudest(keep=6), tokenzoo.FastV(layers=3)])
    with pytest.raises(ValueError, match="static.*fastv drops rows between layers"):
        model.generate(**batch, cache_implementation="static", max_new_tokens=2)
    cache = transformers.StaticCache(config=lm_of(model).config, max_cache_len=128)
    with pytest.raises(TypeError, match="StaticCache, all of whose layers"):
        model(**batch, **{CACHE: cache})
