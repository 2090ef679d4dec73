"""Vision-language models with fewer visual rows: every family under every check."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vlm_reference as reference
from vlm_cases import (
    DROPPERS,
    FAMILIES,
    IMAGE,
    NEEDS_CLASS,
    SELECTORS,
    Loudest,
    alone,
    build,
    handed,
    inner_of,
    lm_of,
    loudest,
    prompts,
)  # fmt: skip

import tokenzoo
from tokenzoo.vlm.cache import CACHE
from tokenzoo.vlm.recipe import VlmRecipe
from tokenzoo.vlm.registry import create, find, list_droppers, list_selectors

families = pytest.mark.parametrize("name", FAMILIES)
COUNTS = (1, 2)
RECIPES = {
    "selector": lambda: Loudest(keep=6),
    "dropper": lambda: tokenzoo.FastV(removed=0.5, layers=3),
    "both": lambda: [Loudest(keep=9), tokenzoo.FastV(removed=0.5, layers=3)],
}
recipes = pytest.mark.parametrize("recipe", RECIPES)
GREEDY = {
    "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, f"differ by {(a - b).abs().max():.1e}"


def real_rows(row: torch.Tensor, real: int, side: str) -> torch.Tensor:
    """Logits of a prompt's own rows, of a padded batch."""
    return row[row.shape[0] - real :] if side == "left" else row[:real]


def kept_by_hand(model, batch, keep):
    return torch.cat([loudest(model, rows, keep) for rows in reference.features(model, batch)])


def test_every_method_has_a_row():
    assert set(SELECTORS) == set(list_selectors()) and set(DROPPERS) == set(list_droppers())


@families
def test_keeping_all_changes_nothing(name):
    model = build(name)
    batch = prompts(name, model)
    keys, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        plain = model(**batch).logits
        for method, (options, _) in {**SELECTORS, **DROPPERS}.items():
            if method in NEEDS_CLASS and not tokenzoo.vlm.family.vlm_family_of(model).has_class(inner_of(model)):
                continue
            tokenzoo.patch_model(model, method, **options)
            assert tokenzoo.is_patched(model) and list(model.state_dict()) == keys
            close((model(**batch).logits - plain)[batch["attention_mask"].bool()], torch.zeros(1).expand_as(
                plain[batch["attention_mask"].bool()]), 0.0 if method in SELECTORS else 1e-6)  # fmt: skip
            tokenzoo.unpatch_model(model)
        assert torch.equal(model(**batch).logits, plain)
    assert [type(m) for m in model.modules()] == modules and not tokenzoo.is_patched(model)
    assert not any("tokenzoo" in key for m in model.modules() for key in vars(m))
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_selection_is_the_language_model_on_fewer_rows(name, side, positions):
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
        close(real_rows(row, len(want), side), want)


@families
@recipes
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_each_prompt_alone(name, recipe, side):
    counts = (1, 2, 0)
    model = build(name, double=True)
    batch = prompts(name, model, counts, side=side)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone(name, batch, counts)):
            want = model(**one).logits[0]
            close(real_rows(row, len(want), side), want, 1e-6)  # rotary tables are float32


@families
@recipes
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_cached_steps_are_those_without_a_cache(name, recipe, positions):
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
        want = reference.logits(model, one, gone, new[b][:-1], contiguous)
        close(torch.stack([step[b] for step in out.logits]), want[-steps:], 1e-6)


@families
def test_dropped_rows_are_those_of_a_slow_reference(name):
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
        close(row[-len(want) :], want, 1e-6)


@families
@recipes
def test_beams_prompt_lookup_and_continuation(name, recipe):
    model = build(name, double=True)
    batch = prompts(name, model, seed=5)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    one, *_ = ones = alone(name, batch, COUNTS)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        beams = model.generate(**batch, num_beams=3, **options)
        for row, single in zip(beams, ones):
            assert torch.equal(model.generate(**single, num_beams=3, **options)[0, -4:], row[-4:])
        plain = model.generate(**one, **options)
        assert torch.equal(model.generate(**one, prompt_lookup_num_tokens=2, **options), plain)
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
    assert torch.equal(second[:, -4:], torch.cat(tokens, 1))


@families
@recipes
def test_training_follows_labels(name, recipe):
    """Loss and gradients are those of an oracle for the selection; checkpointed ones are the same for all recipes."""
    model = build(name, double=True)
    batch = prompts(name, model)
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
    labels[batch["attention_mask"].cumsum(1) <= 4] = -100  # a first word would be told from padding
    total = count = 0
    if recipe == "selector":
        lines = alone(name, batch, COUNTS)
        for one, own, mask in zip(lines, labels, batch["attention_mask"].bool()):
            gone = reference.at_entry(model, one, kept_by_hand(model, one, 6))
            found = reference.logits(model, one, gone)
            own = own[mask][gone > 0]
            total += torch.nn.functional.cross_entropy(found[:-1], own[1:], reduction="sum", ignore_index=-100)
            count += int((own[1:] != -100).sum())
    tokenzoo.patch_model(model, RECIPES[recipe]())
    model.train()

    def gradients():
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    loss, grads = gradients()
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert any(g.abs().sum() > 0 for k, g in grads.items() if any(p in k for p in ("projector", "merger", "connector")))
    if recipe == "selector":
        close(loss, total / count, 1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same = gradients()
    close(again, loss, 1e-10)
    for key, grad in grads.items():
        close(same[key], grad, 1e-10)


@families
def test_copies_and_pickles(name):
    model = build(name)
    tokenzoo.patch_model(model, RECIPES["both"]())
    pickled = pickle.loads(pickle.dumps(model))  # in front of a first call, which hangs hooks of upstream's on a tower
    batch = prompts(name, build(name))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(copied(**batch).logits, want) and torch.equal(pickled(**batch).logits, want)
    tokenzoo.unpatch_model(copied)
    assert type(copied).__qualname__ == type(copied).__name__ == type(model).__name__


@families
@recipes
def test_eager_is_sdpa(name, recipe):
    model = build(name)
    batch = prompts(name, model)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    with torch.no_grad():
        sdpa = model(**batch, output_hidden_states=True)
        model.set_attn_implementation("eager")
        eager = model(**batch)
    close(eager.logits[:, -4:], sdpa.logits[:, -4:], 2e-5)
    lengths = [x.shape[1] for x in sdpa.hidden_states]
    assert lengths[-1] == sdpa.logits.shape[1] and lengths == sorted(lengths, reverse=True)


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
        close(torch.nan_to_num(a, neginf=0), torch.nan_to_num(b, neginf=0), 1e-6)


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
