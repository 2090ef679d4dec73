"""Vision-language models with fewer visual rows: every family under every check."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vlm_reference as reference
from figures import difference
from vlm_cases import (
    DROPPERS,
    FAMILIES,
    IMAGE,
    NEEDS_CLASS,
    RECIPES,
    SELECTORS,
    SERVED,
    Loudest,
    alone,
    build,
    counted,
    handed,
    inner_of,
    lm_of,
    loudest,
    oracle_of,
    prompts,
)  # fmt: skip

import tokenzoo
from tokenzoo.vlm.cache import CACHE
from tokenzoo.vlm.recipe import VlmRecipe
from tokenzoo.vlm.registry import create, find, list_droppers, list_selectors

families = pytest.mark.parametrize("name", FAMILIES)
COUNTS = (1, 2)
recipes = pytest.mark.parametrize(("name", "recipe"), SERVED)
GREEDY = {
    "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def real_rows(row: torch.Tensor, real: int, side: str) -> torch.Tensor:
    """Logits of a prompt's own rows, of a padded batch."""
    return row[row.shape[0] - real :] if side == "left" else row[:real]


def kept_by_hand(model, batch, keep):
    return torch.cat([loudest(model, rows, keep) for rows in reference.features(model, batch)])


def test_every_method_has_a_row():
    assert set(SELECTORS) == set(list_selectors()) and set(DROPPERS) == set(list_droppers())


def keeping_all(model):
    """(kind, recipe) of every method, and of several together, that leaves all rows."""
    family = tokenzoo.vlm.family.vlm_family_of(model)
    for kind, methods in (("selector", SELECTORS), ("dropper", DROPPERS)):
        for method, (options, _) in methods.items():
            if method not in NEEDS_CLASS or family.has_class(inner_of(model)):
                yield kind, create(method, **options)
    both = [create("uniform", keep=1.0), create("fastv", removed=0.0, layers=3)]
    yield "both", both
    if family.position_axes == 1:
        yield "tower", [tokenzoo.ToMe(r=0), *both]


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_keeping_all_changes_nothing(name, side, figure):
    model = build(name)
    batch = prompts(name, model, side=side)
    real = batch["attention_mask"].bool()
    keys, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        plain = model(**batch).logits
        for kind, recipe in keeping_all(model):
            tokenzoo.patch_model(model, recipe)
            assert tokenzoo.is_patched(model) and list(model.state_dict()) == keys
            figure("keeping all = unpatched", name, kind, difference(model(**batch).logits[real], plain[real]))
            tokenzoo.unpatch_model(model)
            figure("taken off = unpatched", name, kind, difference(model(**batch).logits, plain))
    assert [type(m) for m in model.modules()] == modules and not tokenzoo.is_patched(model)
    assert not any("tokenzoo" in key for m in model.modules() for key in vars(m))
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_selection_is_the_language_model_on_fewer_rows(name, side, positions, figure):
    model = build(name)
    if positions == "contiguous" and tokenzoo.vlm.family.vlm_family_of(model).position_axes > 1:
        with pytest.raises(ValueError, match="frame, row and column"):
            tokenzoo.patch_model(model, Loudest(keep=6), positions=positions)
        return
    batch = prompts(name, model, side=side)
    expected = []
    for one in alone(name, batch, COUNTS):
        gone = reference.at_entry(model, one, kept_by_hand(model, one, 6))
        expected.append(reference.logits(model, one, gone, contiguous=positions == "contiguous"))
    tokenzoo.patch_model(model, Loudest(keep=6), positions=positions)
    with torch.no_grad():
        found = model(**batch).logits
        cached = model(**batch, use_cache=False).logits
    assert found.shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(found, cached)
    for row, want in zip(found, expected):
        value = difference(real_rows(row, len(want), side), want)
        figure("fewer rows = language model on shortened rows", name, "selector", value)


@recipes
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_batch_is_each_prompt_alone(name, recipe, side, double, figure):
    """Positions count from the first word, as generate counts them: those of a bare call count padding in front."""
    counts = (1, 2, 0)
    model = build(name, double=double)
    batch = counted(name, prompts(name, model, counts, side=side))
    tokenzoo.patch_model(model, RECIPES[recipe]())
    check = "batch = each alone, float64" if double else "batch = each alone"
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone(name, batch, counts)):
            want = model(**one).logits[0]
            figure(check, name, recipe, difference(real_rows(row, len(want), side), want))


@recipes
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_batch_goes_with_the_rows(name, recipe, side):
    """No prompt holds more rows than the longest one that is left, however long another was before."""
    counts = (1, 2, 0)
    model = build(name)
    batch = counted(name, prompts(name, model, counts, side=side))
    tokenzoo.patch_model(model, RECIPES[recipe]())
    with torch.no_grad():
        lengths = [model(**one).logits.shape[1] for one in alone(name, batch, counts)]
        assert model(**batch).logits.shape[1] == max(lengths)


@recipes
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_cached_steps_are_those_without_a_cache(name, recipe, positions, figure):
    """Greedy tokens of a padded batch, and their logits, from unpatched layers in which dropped columns are closed."""
    model, steps = build(name, double=True), 5
    contiguous = positions == "contiguous"
    if contiguous and tokenzoo.vlm.family.vlm_family_of(model).position_axes > 1:
        return
    batch = prompts(name, model, seed=5)
    tokenzoo.patch_model(model, RECIPES[recipe](), positions=positions)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=steps, **GREEDY)
    cache, depth = out[CACHE], len(lm_of(model).layers)
    n = batch["input_ids"].shape[1]
    new = out.sequences[:, n:].tolist()
    assert cache.get_seq_length() == n + steps - 1
    tokenzoo.unpatch_model(model)
    index, valid = cache.rows()
    for b, one in enumerate(alone(name, batch, COUNTS)):
        pads = n - one["input_ids"].shape[1]
        gone = torch.full((n - pads,), depth)
        for layer in range(depth):
            held = cache.kept.layers.get(layer)
            cols = torch.arange(index.shape[1]) if held is None else held.cols[b]
            ok = torch.ones_like(cols, dtype=torch.bool) if held is None or held.valid is None else held.valid[b]
            ok = ok if valid is None else ok & valid[b][cols]
            there = torch.zeros(n + steps, dtype=torch.bool)
            there[index[b][cols[ok]]] = True
            gone[(~there[pads:n]) & (gone == depth)] = layer
        with oracle_of(model, recipe):
            want = reference.logits(model, one, gone, new[b][:-1], contiguous)
        value = difference(torch.stack([step[b] for step in out.logits]), want[-steps:])
        figure("cached steps = layers without a cache", name, recipe, value)


@families
def test_dropped_rows_are_those_of_a_slow_reference(name, figure):
    """FastV from its equations: the map of the layer in front of the cut, written out for one prompt."""
    model = build(name, double=True)
    batch = prompts(name, model)
    expected = []
    for one in alone(name, batch, COUNTS):
        given, depth = handed(model, one), len(lm_of(model).layers)
        visual = (one["input_ids"][0] == IMAGE).nonzero().flatten()
        args = reference.grown(model, given, torch.full(one["input_ids"][0].shape, depth), [])
        rows = []
        hook = lm_of(model).layers[2].self_attn.register_forward_pre_hook(
            lambda module, a, k, rows=rows: rows.append((k["hidden_states"], k["position_embeddings"])),
            with_kwargs=True,
        )
        with torch.no_grad():
            reference.run_layers(model, **args)
        hook.remove()
        (z, (cos, sin)), attn = rows[0], lm_of(model).layers[2].self_attn
        q, k = (getattr(attn, f"{p}_proj")(z).unflatten(-1, (-1, attn.head_dim)) for p in "qk")
        if getattr(attn, "q_norm", None) is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)

        def turned(t, cos=cos, sin=sin):
            a, b = t.chunk(2, -1)
            return t * cos[0, :, None] + torch.cat([-b, a], -1) * sin[0, :, None]

        q, k = turned(q[0]), turned(k[0])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = ((q[-1] * k).sum(-1) * attn.scaling).softmax(0).mean(1)[visual]
        gone = torch.full((one["input_ids"].shape[1],), depth)
        gone[visual[score.argsort(descending=True)[round(len(visual) / 2) :]]] = 3
        expected.append(reference.logits(model, one, gone))
    tokenzoo.patch_model(model, "fastv", layers=3)
    with torch.no_grad():
        found = model(**batch).logits
    for row, want in zip(found, expected):
        figure("dropped rows = slow reference", name, "dropper", difference(row[-len(want) :], want))


@recipes
def test_beams_prompt_lookup_and_continuation(name, recipe, figure):
    model = build(name, double=True)
    batch = prompts(name, model, seed=5)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    one, *_ = ones = alone(name, batch, COUNTS)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        beams = model.generate(**batch, num_beams=3, **options)
        for row, single in zip(beams, ones):
            other = (model.generate(**single, num_beams=3, **options)[0, -4:] != row[-4:]).sum()
            figure("beams of a batch = each alone, tokens", name, recipe, other)
        plain = model.generate(**one, **options)
        other = (model.generate(**one, prompt_lookup_num_tokens=2, **options) != plain).sum()
        figure("prompt lookup = greedy, tokens", name, recipe, other)
        # a second turn on the cache of the first, and the same steps by hand
        first = model.generate(**one, **options | GREEDY)
        more = torch.randint(10, 240, (1, 5), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, more], 1)
        words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model.generate(**words, **{CACHE: copy.deepcopy(first[CACHE])}, **options)
        past = copy.deepcopy(first[CACHE])
        step = model(ids[:, first.sequences.shape[1] - 1 :], **{CACHE: past}, use_cache=True)
        tokens = []
        for _ in range(4):
            tokens.append(step.logits[:, -1:].argmax(-1))
            step = model(tokens[-1], **{CACHE: past}, use_cache=True)
    other = (second[:, -4:] != torch.cat(tokens, 1)).sum()
    figure("second turn = its steps by hand, tokens", name, recipe, other)


@recipes
def test_copies_and_pickles(name, recipe, figure):
    model = build(name)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    pickled = pickle.loads(pickle.dumps(model))
    batch = prompts(name, build(name))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**batch).logits
        figure("deepcopy", name, recipe, difference(copied(**batch).logits, want))
        figure("pickle", name, recipe, difference(pickled(**batch).logits, want))
    tokenzoo.unpatch_model(copied)
    assert type(copied).__qualname__ == type(copied).__name__ == type(model).__name__


@recipes
@pytest.mark.parametrize("side", ["left", "right"])
def test_eager_is_sdpa(name, recipe, side, figure):
    model = build(name)
    batch = prompts(name, model, side=side)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    with torch.no_grad():
        sdpa = model(**batch, output_hidden_states=True)
        lengths = [len(model(**one).logits[0]) for one in alone(name, batch, COUNTS)]
        model.set_attn_implementation("eager")
        eager = model(**batch)
    for a, b, length in zip(eager.logits, sdpa.logits, lengths):
        figure("eager = sdpa", name, recipe, difference(real_rows(a, length, side), real_rows(b, length, side)))
    held = [x.shape[1] for x in sdpa.hidden_states]
    assert held[-1] == sdpa.logits.shape[1] and held == sorted(held, reverse=True)


@pytest.mark.parametrize("method", [*SELECTORS, *DROPPERS])
def test_recipes_are_plain_data(method):
    options = {**SELECTORS, **DROPPERS}[method][1]
    made = create(method, **options)
    recipe = VlmRecipe.parse(made, positions="contiguous")
    again = VlmRecipe.parse(recipe.to_dict())
    assert again == recipe and find(method).source and find(method).__doc__


def chosen(model, batch):
    """Rows of every image behind the selector, from a call that knows the words of the prompt."""
    found, encode = [], inner_of(model).get_image_features

    def note(*args, **kwargs):
        out = encode(*args, **kwargs)
        found.extend(rows.clone() for rows in out.pooler_output)
        return out

    inner_of(model).get_image_features = note
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        del inner_of(model).get_image_features
    return found


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("method", SELECTORS)
def test_a_selector_does_not_see_batch_mates(name, method):
    """Images of other prompts, and of other sizes, change nothing; nor does a budget that a batch shares."""
    model = build(name, double=True)
    batch = prompts(name, model)
    tokenzoo.patch_model(model, method, keep=7)
    together = chosen(model, batch)
    apart = [rows for one in alone(name, batch, COUNTS) for rows in chosen(model, one)]
    assert len(together) == len(apart) == sum(COUNTS)
    for a, b in zip(together, apart):
        assert torch.equal(torch.isinf(a), torch.isinf(b))
        assert difference(torch.nan_to_num(a, neginf=0), torch.nan_to_num(b, neginf=0)) <= 1e-6


@pytest.mark.parametrize("method", SELECTORS)
def test_counts_are_exact_and_in_order(method):
    """As many rows as asked for, at most; a subset in raster order; keeping all is nothing."""
    model = build("llava")
    batch = prompts("llava", model)
    plain = reference.features(model, batch)
    options = SELECTORS[method][1]
    tokenzoo.patch_model(model, method, **options)
    for rows, before in zip(chosen(model, batch), plain):
        kept = ~torch.isinf(rows).all(-1)
        assert len(rows) == len(before) and torch.isfinite(rows[kept]).all()
        if not find(method).data_dependent:
            assert int(kept.sum()) == create(method, **options).count(len(rows))
        if "merge" not in find(method).kind and "mix" not in find(method).kind:
            assert torch.equal(rows[kept], before[kept])
