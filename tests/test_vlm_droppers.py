"""Droppers against slow references from their equations, on a tiny language model; and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from vlm_cases import DROPPERS, FAMILIES, LM, alone, build, prompts

import tokenzoo
from tokenzoo.vlm.layer_signals import LayerRows
from tokenzoo.vlm.registry import create

transformers = pytest.importorskip("transformers")

from test_golden_vlm import dropping  # noqa: E402

from tokenzoo.vlm.cache import CACHE  # noqa: E402
from tokenzoo.vlm.passing import KWARG, Note  # noqa: E402

N = 20


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, f"differ by {(a - b).abs().max():.1e}"


def language_model(seed: int = 0) -> transformers.LlamaModel:
    """Four layers, grouped queries, weights large enough for attention to be uneven."""
    torch.manual_seed(seed)
    lm = transformers.LlamaModel(transformers.LlamaConfig(**LM)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return lm


def attention_map(lm: transformers.LlamaModel, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The causal map [n, n] of a layer for rows [n, D] that enter it, mean over heads, row by row."""
    attn, n = lm.layers[layer].self_attn, len(x)
    z = lm.layers[layer].input_layernorm(x)
    cos, sin = (t[0] for t in lm.rotary_emb(x[None], torch.arange(n)[None]))
    groups, found = attn.config.num_attention_heads // attn.config.num_key_value_heads, torch.zeros(n, n)
    for h in range(attn.config.num_attention_heads):

        def head(proj: torch.nn.Linear, i: int) -> torch.Tensor:
            t = proj(z)[:, i * attn.head_dim : (i + 1) * attn.head_dim]
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        q, k = head(attn.q_proj, h), head(attn.k_proj, h // groups)
        for i in range(n):
            found[i, : i + 1] += (k[: i + 1] @ q[i] / attn.head_dim**0.5).softmax(0)
    return found / attn.config.num_attention_heads


def without(lm: transformers.LlamaModel, x: torch.Tensor, layer: int, stay: torch.Tensor) -> torch.Tensor:
    """Last hidden state of plain layers, of which those from `layer` on see some rows, in their old positions."""
    index = torch.arange(x.shape[1])
    for i, each in enumerate(lm.layers):
        if i == layer:
            x, index = x[:, stay], index[stay]
        x = each(x, position_embeddings=lm.rotary_emb(x, index[None]), attention_mask=None)
    return lm.norm(x)


@pytest.mark.parametrize("images", [((3, 13),), ((3, 8), (11, 16))])
def test_todre_is_its_equations(images):
    """All visual rows leave where both shares of attention are below the threshold, none do where one is not."""
    lm, layer = language_model(), 2
    x = torch.randn(1, N, lm.config.hidden_size, generator=torch.Generator().manual_seed(1))
    visual = torch.zeros(N, dtype=torch.bool)
    for start, end in images:
        visual[start:end] = True
    words = ~visual & (torch.arange(N) > images[0][0])
    with torch.no_grad():
        entering = lm(inputs_embeds=x, output_hidden_states=True).hidden_states[layer][0]
        seen = attention_map(lm, layer, entering)
        to_visual = seen[words][:, visual].sum() / seen[words].sum()
        to_words = seen[visual][:, words].sum() / seen[visual].sum()
        assert (to_words > 0) == (len(images) > 1)
        larger = float(torch.maximum(to_visual, to_words))
        for threshold, stay in ((larger * 1.01, ~visual), (larger * 0.99, torch.ones(N, dtype=torch.bool))):
            want = without(lm, x, layer, stay)
            cut = dropping(language_model(), tokenzoo.ToDRE(threshold=threshold, layers=layer), "original")
            close(cut(inputs_embeds=x, **{KWARG: Note(visual[None])}).last_hidden_state, want)


def test_todre_drops_by_prompt():
    """Of a batch, some lose all visual rows and others none; each prompt is what it is alone."""
    x = torch.randn(4, N, LM["hidden_size"], generator=torch.Generator().manual_seed(2))
    visual = torch.zeros(4, N, dtype=torch.bool)
    visual[:, 4:12] = True
    lm = language_model()
    with torch.no_grad():
        entering = lm(inputs_embeds=x, output_hidden_states=True).hidden_states[2]
        shares = torch.stack([attention_map(lm, 2, each)[12:, 4:12].sum() / (N - 12) for each in entering])
        threshold = float(shares.sort().values[1:3].mean())
        cut = dropping(lm, tokenzoo.ToDRE(threshold=threshold, layers=2), "original")
        found = cut(inputs_embeds=x, **{KWARG: Note(visual)}).last_hidden_state
        for b in range(4):
            want = cut(inputs_embeds=x[b : b + 1], **{KWARG: Note(visual[b : b + 1])}).last_hidden_state[0]
            assert len(want) == (N - 8 if shares[b] < threshold else N)
            close(found[b, -len(want) :], want)


def test_mustdrop_is_its_equations():
    """Rows that words attend to little in sum, and none of them much."""
    lm, layer = language_model(), 2
    x = torch.randn(1, N, lm.config.hidden_size, generator=torch.Generator().manual_seed(3))
    visual = torch.zeros(N, dtype=torch.bool)
    visual[3:15] = True
    with torch.no_grad():
        entering = lm(inputs_embeds=x, output_hidden_states=True).hidden_states[layer - 1][0]
        seen = attention_map(lm, layer - 1, entering)[15:, 3:15]
        total, most = seen.sum(0), seen.max(0).values
        together = float(total.sort().values[7:9].mean() / total.sum())
        alone = float(most[total < together * total.sum()].sort().values[4:6].mean())
        gone = (total < together * total.sum()) & (most < alone)
        assert 0 < gone.sum() < 8
        stay = torch.ones(N, dtype=torch.bool)
        stay[3:15] = ~gone
        want = without(lm, x, layer, stay)
        cut = dropping(lm, tokenzoo.MustDrop(together=together, alone=alone, layers=layer), "original")
        close(cut(inputs_embeds=x, **{KWARG: Note(visual[None])}).last_hidden_state, want)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_mustdrop_shortens_earlier_caches(positions):
    """Steps see in every layer from the scoring one on the rows that are left at the end, where they were turned to."""
    lm, options = language_model(), {"together": 0.08, "alone": 0.06, "layers": (2, 3)}
    visual = torch.zeros(1, N, dtype=torch.bool)
    visual[:, 3:15] = True
    step = lm.embed_tokens(torch.tensor([[7]]))
    whole = dropping(language_model(), tokenzoo.MustDrop(**options, early_caches=False), positions)
    with torch.no_grad():
        for seed in range(30):  # until a prompt loses rows at both cuts
            x = torch.randn(1, N, lm.config.hidden_size, generator=torch.Generator().manual_seed(seed))
            given = {"inputs_embeds": x, "use_cache": True, KWARG: Note(visual)}
            long = whole(**given)
            rows = [long.past_key_values.kept.layers[i].cols[0].tolist() if i else list(range(N)) for i in range(4)]
            if len(rows[3]) < len(rows[2]) < len(rows[1]):
                break
        assert len(rows[3]) < len(rows[2]) < len(rows[1]) == N
        # by hand: plain layers on caches from which rows are taken
        hidden = step
        for i, layer in enumerate(lm.layers):
            left = rows[3] if i > 0 else rows[0]
            at = torch.tensor([rows[i].index(row) for row in left])
            past, attn = long.past_key_values.layers[i], layer.self_attn
            place = N - (N - len(rows[i]) if positions == "contiguous" else 0)
            cos, sin = lm.rotary_emb(step, torch.tensor([[place]]))
            z = layer.input_layernorm(hidden)
            q, k, v = (getattr(attn, f"{p}_proj")(z)[0].view(-1, attn.head_dim) for p in "qkv")

            def turned(t, cos=cos, sin=sin):
                a, b = t.chunk(2, -1)
                return t * cos[0] + torch.cat([-b, a], -1) * sin[0]

            q, k = turned(q), turned(k)
            seen = []
            for h in range(len(q)):
                g = h // (len(q) // len(k))
                keys = torch.cat([past.keys[0, g][at], k[g : g + 1]])
                weight = (keys @ q[h] / attn.head_dim**0.5).softmax(0)
                seen.append(weight @ torch.cat([past.values[0, g][at], v[g : g + 1]]))
            hidden = hidden + attn.o_proj(torch.cat(seen))[None, None]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        want = lm.norm(hidden)
        cut = dropping(language_model(), tokenzoo.MustDrop(**options), positions)
        short = cut(**given)
        assert torch.equal(short.last_hidden_state, long.last_hidden_state)
        lengths = [layer.keys.shape[2] for layer in short.past_key_values.layers]
        assert lengths == [N, *[len(rows[3])] * 3]
        close(cut(inputs_embeds=step, **{CACHE: short.past_key_values}).last_hidden_state, want)


def test_mustdrop_shortens_caches_by_prompt():
    """Where prompts of a batch lose different numbers, steps of each are what they are alone."""
    x = torch.randn(3, N, LM["hidden_size"], generator=torch.Generator().manual_seed(4))
    visual = torch.zeros(3, N, dtype=torch.bool)
    visual[:, 3:15] = True
    lm = dropping(language_model(), tokenzoo.MustDrop(together=0.08, alone=0.06, layers=(2, 3)), "contiguous")
    step, left = lm.embed_tokens(torch.tensor([[7]])), []
    with torch.no_grad():
        past = lm(inputs_embeds=x, use_cache=True, **{KWARG: Note(visual)}).past_key_values
        found = lm(inputs_embeds=step.expand(3, -1, -1), **{CACHE: past}).last_hidden_state
        for b in range(3):
            note = Note(visual[b : b + 1])
            past = lm(inputs_embeds=x[b : b + 1], use_cache=True, **{KWARG: note}).past_key_values
            left.append(past.layers[-1].keys.shape[2])
            close(lm(inputs_embeds=step, **{CACHE: past}).last_hidden_state, found[b : b + 1])
    assert len(set(left)) > 1


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("layer", [1, 2])
def test_mustdrop_shortens_the_cache_that_masks_are_made_for(family, layer):
    """Masks are made for the first layer, or the first full one: padded prompts go on as each does alone."""
    model = build(family, double=True)
    batch = prompts(family, model)
    tokenzoo.patch_model(model, "mustdrop", layers=layer, together=0.08, alone=0.2)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    steps = model.generate(**batch, **options)[:, -3:]
    for row, one in zip(steps, alone(family, batch, (1, 2))):
        assert torch.equal(model.generate(**one, **options)[0, -3:], row)


def test_holitom_goes_by_halves():
    """The weights of a later row are those of a loop that averages one after the other."""
    from tokenzoo.vlm.droppers.holitom import _by_halves

    kept, rest = torch.randn(3, 6).double(), torch.randn(9, 6).double()
    to = [int(torch.cosine_similarity(row[None], kept).argmax()) for row in rest]
    want = kept.clone()
    for row, at in zip(rest, to):
        want[at] = (want[at] + row) / 2
    assert max(to.count(at) for at in to) > 2
    close(_by_halves(kept, rest), want, 1e-12)


def test_llavolta_stays_within_images():
    """No stretch reaches over words; what fills none at the end of an image goes."""
    visual = torch.tensor([[0, *[1] * 5, 0, *[1] * 3, 0, 1, 0], [0] * 13, [0, *[1] * 11, 0]]).bool()
    x = torch.arange(39.0).view(3, 13, 1)
    rows = LayerRows(x, visual, torch.ones_like(visual), [3, 0, 3])
    left = tokenzoo.LLaVolta(stride=3).decide(rows, None, 0)
    assert left.keep.nonzero().tolist() == [[0, 2], [0, 8], [2, 2], [2, 5], [2, 8]]
    assert left.x[left.keep].flatten().tolist() == [2.0, 8.0, 28.0, 31.0, 34.0]


@pytest.mark.parametrize("method", DROPPERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_batch_is_each_prompt_alone(method, side, positions):
    """Prompts of one, two and no images, read and continued; gradients are finite and reach the projector."""
    counts = (1, 2, 0)
    model = build("llava", double=True)
    batch = prompts("llava", model, counts, side=side)
    tokenzoo.patch_model(model, method, **DROPPERS[method][1], positions=positions)
    rows = []
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone("llava", batch, counts)):
            want = model(**one).logits[0]
            rows.append((one["input_ids"].shape[1], len(want)))
            close(row[-len(want) :] if side == "left" else row[: len(want)], want, 1e-6)
    assert all(after < before for before, after in rows[:2]) and rows[2][0] == rows[2][1]
    if side == "left":
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            steps = model.generate(**batch, **options)[:, -3:]
            for row, one in zip(steps, alone("llava", batch, counts)):
                assert torch.equal(model.generate(**one, **options)[0, -3:], row)
        model.train()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :-4] = -100
        model(**batch, labels=labels).loss.backward()
        grads = [p.grad for p in model.model.multi_modal_projector.parameters()]
        assert all(torch.isfinite(g).all() for g in grads) and any(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("method", ["mustdrop", "visiondrop"])
def test_beams_and_a_second_turn(method):
    """Beams of a batch are those of each prompt; a second turn on the cache of the first is its steps by hand."""
    model = build("llava", double=True)
    batch = prompts("llava", model, seed=5)
    tokenzoo.patch_model(model, method, **DROPPERS[method][1], positions="contiguous")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ones = alone("llava", batch, (1, 2))
    with torch.no_grad():
        beams = model.generate(**batch, num_beams=3, **options)
        for row, one in zip(beams, ones):
            assert torch.equal(model.generate(**one, num_beams=3, **options)[0, -3:], row[-3:])
        first = model.generate(**ones[1], return_dict_in_generate=True, **options)
        more = torch.randint(10, 240, (1, 5), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, more], 1)
        words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model.generate(**words, **{CACHE: copy.deepcopy(first[CACHE])}, **options)
        past, tokens = first[CACHE], []
        step = model(ids[:, first.sequences.shape[1] - 1 :], **{CACHE: past}, use_cache=True)
        for _ in range(3):
            tokens.append(step.logits[:, -1:].argmax(-1))
            step = model(tokens[-1], **{CACHE: past}, use_cache=True)
    assert torch.equal(second[:, -3:], torch.cat(tokens, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_in_every_family(family):
    """Values that are made anew go on as any others: a batch is each prompt alone."""
    model = build(family, double=True)
    batch = prompts(family, model)
    merging = [create("visiondrop", kept=((6, 3),), layers=3), create("llavolta", stride=2, layers=3)]
    tokenzoo.patch_model(model, merging)
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone(family, batch, (1, 2))):
            want = model(**one).logits[0]
            close(row[-len(want) :], want, 1e-6)


@pytest.mark.parametrize("method", ["pyramiddrop", "visiondrop", "holitom", "llavolta"])
def test_dials(method):
    """Nothing is dropped at 0, ever more towards 1."""
    dropper = create(method)
    counts = [dropper.dial(t).count(60, 0) for t in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert counts[0] == 60 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    assert all(dropper.dial(t).macs(60, 10, 8, 8, 0) >= 0 for t in (0.0, 0.5, 1.0))


def test_counts_are_those_published():
    pyramid, vision = tokenzoo.PyramidDrop(), tokenzoo.VisionDrop()
    assert pyramid.default_layers(32) == vision.default_layers(32) == (8, 16, 24)
    assert [pyramid.count(576, i) for i in range(3)] == [288, 144, 72]
    counts = [vision.count(48, i) for i in range(3)]
    assert counts == [35, 26, 19] and [vision._contextual(n, i) for i, n in enumerate(counts)] == [5, 4, 3]
    assert tokenzoo.HoliTom().default_layers(28) == (18,) and tokenzoo.ToDRE().default_layers(32) == (28,)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pyramiddrop", {"shares": (0.5, 0.6)}, "none above the one before"),
        ("pyramiddrop", {"layers": (8, 16)}, "one entry of shares per layer"),
        ("visiondrop", {"kept": ((3, 1), (4, 1))}, "rise from stage to stage"),
        ("visiondrop", {"kept": ((0.9, 0.2),)}, "above 1"),
        ("visiondrop", {"kept": (5, 2)}, "dominant, contextual"),
        ("visiondrop", {"kept": ((5, 0.2),)}, "dominant, contextual"),
        ("visiondrop", {"order": "last"}, "use one of"),
        ("holitom", {"layers": (2, 3)}, "acts once"),
        ("holitom", {"removed": 1.5}, "outside"),
        ("todre", {"threshold": -0.1}, "outside"),
        ("llavolta", {"stride": 0}, "number of rows per stretch"),
        ("mustdrop", {"alone": "much"}, "attention to stay under"),
    ],
)
def test_refusals(method, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        create(method, **options)


def test_mustdrop_needs_its_layers():
    """The published layers are none of a short language model: said, not moved."""
    with pytest.raises(ValueError, match=r"mustdrop: layers=\(3, 7, 11, 15\)"):
        tokenzoo.patch_model(build("llava"), "mustdrop")
