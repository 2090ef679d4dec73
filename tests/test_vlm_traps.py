"""The traps that transformers lays to models with fewer rows, and which tests hold them; those without another place.

`TRAPS` says what each is and where it is held.
"""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from figures import difference
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlm_cases import FAMILIES, IMAGE, RECIPES, Loudest, alone, build, inner_of, lm_of, pixels, prompts

import tokenzoo
from tokenzoo.vlm.cache import CACHE

# number -> (what it is, tests that hold it)
TRAPS = {
    1: ("features shorter than their placeholders are refused",
        ["test_vlm.py::test_counts_are_exact_and_in_order", "test_vlm_calls.py::test_visual_rows_are_the_marked_ones"]),
    2: ("gaps of positions without a mask and a cache are read as packed prompts",
        ["test_vlm_calls.py::test_gaps_of_positions_are_no_borders_of_packed_prompts"]),
    3: ("so they are by flash attention, layer by layer",
        ["test_vlm_calls.py::test_flash_attention_sees_no_positions",
         "test_vlm_traps.py::test_flash_attention_by_its_convention"]),
    4: ("masks count every token ever put in, caches hold fewer",
        ["test_vlm.py::test_cached_steps_are_those_without_a_cache",
         "test_vlm_calls.py::test_padding_behind_prompts_hides_no_words"]),
    5: ("get_seq_length is a count of tokens and an offset of queries",
        ["test_vlm.py::test_beams_prompt_lookup_and_continuation",
         "test_vlm_traps.py::test_a_second_turn_is_one_prompt"]),
    6: ("padding inside scores, and equal scores",
        ["test_vlm.py::test_a_batch_is_each_prompt_alone",
         "test_vlm_calls.py::test_of_equal_scores_the_first_rows_stay"]),
    7: ("outputs to record are looked up by the class as a string",
        ["test_vlm.py::test_eager_is_sdpa", "test_vlm_canary.py::test_recorded_outputs_are_looked_up_by_class"]),
    8: ("generate reads the signature of forward", ["test_vlm_calls.py::test_signatures_are_the_published_ones"]),
    9: ("a forward on the instance hides that of the class",
        ["test_vlm_calls.py::test_dispatched_models_run_the_reducing_forward",
         "test_vlm_calls.py::test_what_cannot_be_served_is_refused_before_anything_changes"]),
    10: ("a model may make up the id of a placeholder", ["test_vlm_calls.py::test_a_made_up_placeholder_is_a_word"]),
    11: ("labels behind padding that was put in count",
         ["test_vlm_gradients.py::test_padding_that_was_put_in_is_not_learned"]),
    12: ("towers of Qwen-VL give outputs of attention under the name attentions",
         ["test_vlm_traps.py::test_what_packed_towers_call_attentions_is_not_read"]),
    13: ("some families pass no arguments on to get_image_features",
         ["test_vlm.py::test_a_selector_does_not_see_batch_mates"]),
    14: ("Qwen-VL makes positions of masks, and keeps rope_deltas between calls",
         ["test_vlm_calls.py::test_calls_do_not_depend_on_the_calls_before",
          "test_vlm_calls.py::test_gaps_of_positions_are_no_borders_of_packed_prompts"]),
    15: ("past_key_values became cache", ["test_vlm_canary.py::test_the_cache_goes_by_a_known_name"]),
    16: ("a model that has recorded hidden states cannot be pickled",
         ["test_vlm_traps.py::test_copies_behind_a_call_that_recorded_hidden_states"]),
    17: ("eager attention in float64 is no number under padding",
         ["test_vlm_traps.py::test_eager_attention_in_float64"]),
    18: ("Qwen3-VL adds features between its first layers",
         ["test_vlm_calls.py::test_what_cannot_be_served_is_refused_before_anything_changes",
          "test_vlm.py::test_a_selection_is_the_language_model_on_fewer_rows"]),
    19: ("what words of a first turn chose stays for the second",
         ["test_vlm_traps.py::test_words_of_a_second_turn_choose_nothing"]),
}  # fmt: skip
CAUSAL = [name for name in FAMILIES if "gemma" not in name]  # images see themselves whole in the others


@pytest.mark.parametrize("number", TRAPS)
def test_every_trap_is_held(number):
    for test in TRAPS[number][1]:
        file, _, name = test.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_packed_towers_call_attentions_is_not_read(name):
    """[rows, channels], no maps: what a selector reads there is worked out from queries and keys, and is shares."""
    model = build(name)
    batch = prompts(name, model)
    with torch.no_grad():
        plain = inner_of(model).get_image_features(**pixels(batch), output_attentions=True)
        rows = len(batch["pixel_values"])
        assert all(each.shape == (rows, 32) for each in plain.attentions)
        tokenzoo.patch_model(model, "fastervlm", keep=6)
        want = inner_of(model).get_image_features(**pixels(batch))
        found = inner_of(model).get_image_features(**pixels(batch), output_attentions=True)
    for a, b in zip(found.pooler_output, want.pooler_output):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, plain.attentions))


def test_copies_behind_a_call_that_recorded_hidden_states():
    """Hooks of transformers' own cannot be pickled, without tokenzoo either; copies and weights go on as ever."""
    model = build("llava")
    batch = prompts("llava", model)
    fresh = build("llava")
    with torch.no_grad():
        model(**batch, output_hidden_states=True)
        with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
            pickle.dumps(model)
        tokenzoo.patch_model(model, RECIPES["both"]())
        want = model(**batch, output_hidden_states=True)
        copied = copy.deepcopy(model)(**batch, output_hidden_states=True)
        assert torch.equal(copied.logits, want.logits)
        assert all(torch.equal(a, b) for a, b in zip(copied.hidden_states, want.hidden_states))
        fresh.load_state_dict(model.state_dict())
        tokenzoo.patch_model(fresh, model.tokenzoo_recipe)
        again = pickle.loads(pickle.dumps(fresh))
        assert torch.equal(again(**batch).logits, want.logits)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(**batch).logits, build("llava")(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_eager_attention_in_float64(side):
    """A row of padding that sees nothing: minima of float64 are -inf in the float32 softmax of transformers.

    Such rows are no numbers unpatched, where they stand in front, and reach real ones; patched ones are then none
    either, and are the numbers of sdpa where nothing stands in front.
    """
    model = build("llava", double=True)
    batch = prompts("llava", model, side=side)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        tokenzoo.patch_model(model, Loudest(keep=6))
        want = model(**batch).logits
        model.set_attn_implementation("eager")
        found = model(**batch).logits
        tokenzoo.unpatch_model(model)
        plain = model(**batch).logits
    assert torch.isfinite(want).all()
    assert bool(torch.isfinite(plain[real]).all()) == (side == "right"), "transformers has mended it: tell the table"
    for a, b, one in zip(found, want, alone("llava", batch, (1, 2))) if side == "right" else ():
        left = one["input_ids"].shape[1] - int((one["input_ids"] == IMAGE).sum()) // 16 * (16 - 6)
        assert difference(a[:left], b[:left]) <= 1e-6  # a softmax in float32


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("paligemma")])
def test_a_second_turn_is_one_prompt(name, figure):
    """Words behind an answer, on the cache of a selection by images alone: as if all had been read at once.

    Not so in PaliGemma, patched or not: all that is read at once sees itself whole.
    """
    model = build(name, double=True)
    one = alone(name, prompts(name, model, seed=5), (1, 2))[1]
    tokenzoo.patch_model(model, Loudest(keep=6))
    more = torch.randint(10, 240, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(**one, use_cache=True)
        found = model(more, **{CACHE: first[CACHE]}, use_cache=True).logits
        want = model(**longer(one, more)).logits[:, -5:]
    figure("second turn on a cache = one prompt, float64", name, "selector", difference(found, want))


def longer(one, more):
    """A prompt with words behind it."""
    whole = one | {"input_ids": torch.cat([one["input_ids"], more], 1)}
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if key in one:
            whole[key] = torch.cat([one[key], torch.full_like(more, fill)], 1)
    return whole


@pytest.mark.parametrize(("method", "by_words"), [
    ("catp", True), ("mmtok", True), ("cdpruner", True), ("divprune", False), ("fastervlm", False),
])  # fmt: skip
def test_words_of_a_second_turn_choose_nothing(method, by_words):
    """The rows in the cache are those of the first turn; one prompt of both turns would have chosen others."""
    model = build("llava")
    tokenzoo.patch_model(model, method, keep=5)
    one = alone("llava", prompts("llava", model, seed=5), (1, 2))[1]
    changed = False
    with torch.no_grad():
        for seed in range(20):
            more = torch.randint(10, 240, (1, 12), generator=torch.Generator().manual_seed(seed))
            first = model(**one, use_cache=True)
            held = first[CACHE].rows()[0][0].tolist()
            second = model(more, **{CACHE: first[CACHE]}, use_cache=True)
            n = one["input_ids"].shape[1]
            assert second[CACHE].rows()[0][0].tolist() == [*held, *range(n, n + 12)]
            whole = tokenzoo.visual_rows(model, **longer(one, more))
            turn = tokenzoo.visual_rows(model, **one)
            changed |= any(not torch.equal(a.keep, b.keep) for a, b in zip(whole, turn))
    assert changed == by_words


def written_out(counts):
    """Flash attention by its convention: masks of two dimensions, causal, borders of packed prompts by positions."""

    def attend(module, query, key, value, attention_mask, scaling=None, position_ids=None, **options):
        counts.append(bool(_is_packed_sequence(position_ids, len(query))))
        assert attention_mask is None or attention_mask.dim() == 2
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        n, m = query.shape[2], key.shape[2]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        own = torch.eye(m, dtype=torch.bool)[m - n :]
        seen = seen if attention_mask is None else (seen & attention_mask[:, None, None, :].bool()) | own
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    return attend


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in CAUSAL for recipe in ("selector", "both")])
def test_flash_attention_by_its_convention(name, recipe, figure, monkeypatch):
    """Prompts in a batch, and one alone with three steps: answers of sdpa, and none taken for packed prompts."""
    counts: list[bool] = []
    assert AttentionMaskInterface()["flash_attention_2"] is flash_attention_mask
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", written_out(counts))
    model = build(name)
    batch = prompts(name, model)
    one = alone(name, batch, (1, 2))[0]
    tokenzoo.patch_model(model, RECIPES[recipe]())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True}

    def run():
        with torch.no_grad():
            both = model(**batch).logits
            return both, torch.stack(model.generate(**one, **options).logits)

    want = run()
    lm_of(model).config._attn_implementation = "flash_attention_2"
    found = run()
    assert len(counts) == 4 * (1 + 4)
    figure("prompts taken for packed", name, recipe, sum(counts))
    for row, other, each in zip(found[0], want[0], alone(name, batch, (1, 2))):
        with torch.no_grad():
            length = len(model(**each).logits[0])
        figure("flash convention = sdpa", name, recipe, difference(row[-length:], other[-length:]))
    figure("flash convention = sdpa", name, recipe, difference(found[1], want[1]))
