"""Droppers against the published implementations, on the recorded language model: prefill and steps on its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import Case, cases, check_settings, close, read

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.algm import Stage
from tokenzoo.vlm.layer_signals import LayerRows

transformers = pytest.importorskip("transformers")

from test_golden_vlm import dropping, llama, run  # noqa: E402

from tokenzoo.vlm.layer import _begun  # noqa: E402
from tokenzoo.vlm.passing import KWARG, Note, Span  # noqa: E402


class Entering:
    """What entered some layers while a prompt was read: the last input of their first norm that is no single row."""

    def __init__(self, lm: transformers.LlamaModel, layers: tuple[int, ...]) -> None:
        self.found: dict[int, torch.Tensor] = {}
        for layer in layers:
            lm.layers[layer].input_layernorm.register_forward_pre_hook(self._note(layer))

    def _note(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].shape[1] > 1:
                self.found[layer] = args[0]

        return hook


def read_prompt(lm: transformers.LlamaModel, case: Case, file: str) -> Any:
    """Prefill alone."""
    s = case.settings
    x = read(file)[0][f"inputs_embeds/{s['prompt']}"]
    visual = torch.zeros(x.shape[:2], dtype=torch.bool)
    visual[:, s["image_start"] : s["image_start"] + s["image_tokens"]] = True
    with torch.no_grad():
        return lm(inputs_embeds=x, use_cache=True, **{KWARG: Note(visual)})


@cases("vlm", lambda c: {"ratios", "layers"} <= c.asks and c.has("out/decode_hidden"))
def test_pyramiddrop(case: Case):
    s = case.settings
    check_settings(s, "prompt", "prompt_len", "image_start", "image_tokens", "layers", "ratios")
    file = case.fixture()
    lm = dropping(llama(file), tokenzoo.PyramidDrop(shares=s["ratios"], layers=s["layers"]), "contiguous")
    entering = Entering(lm, s["layers"])
    out, lengths = run(lm, case, file)
    rows = torch.arange(int(lengths[0]))
    for layer in s["layers"]:
        close(entering.found[layer][0], case[f"out/tokens/{layer}"], 1e-4)
        rows = rows[case[f"out/rows/{layer}"]]  # recorded as rows of what the layer was given
        held = out.past_key_values.kept.layers[layer].cols[0]
        assert torch.equal(held[: lengths[layer]], rows)


@cases("vlm", lambda c: {"share", "prompt_len"} <= c.asks and c.has("in/features"))
def test_pyramiddrop_in_batches(case: Case):
    """Padded prompts, and training, where rows in front of answers ask."""
    s = case.settings
    check_settings(s, "image_start", "image_tokens", "layer", "share", "prompt_len", "queries")
    lm = llama(case.fixture())
    x, real = case["in/features"], case["in/attention_mask"].bool()
    index = torch.arange(x.shape[1])
    starts = torch.tensor(s["image_start"])[:, None]
    counts = list(s["image_tokens"])
    visual = (index >= starts) & (index < starts + torch.tensor(counts)[:, None])
    asking = None
    if case.has("in/labels"):
        trained = case["in/labels"] != -100
        asking = torch.zeros_like(trained)
        asking[:, :-1] = trained[:, 1:] & ~trained[:, :-1]
    dropper = tokenzoo.PyramidDrop(shares=(s["share"],), layers=s["layer"])
    lm = dropping(lm, dropper, "contiguous")
    layer = lm.layers[s["layer"]]
    positions = case["in/position_ids"]
    rotary = lambda at, layer: lm.rotary_emb(x, at)  # noqa: E731
    span = Span(visual, real, None, counts, asking, 0, 0, None, {}, positions, rotary, right=True)
    with torch.no_grad():
        found = layer._dropped(_begun(x, span), layer.tokenzoo_plan.stages[0], span, lm.rotary_emb(x, positions))
    padded = case["out/attention_mask"].bool()
    for b in range(len(x)):
        kept = real[b].gather(0, found.rows[b])
        kept = kept if found.valid is None else kept & found.valid[b]
        rows = found.rows[b][kept]
        assert torch.equal(rows, case[f"out/rows/{b}"])
        close(found.x[b][kept], case["out/features"][b][padded[b]], 1e-6)
        places = rows - found.shift[b][kept]
        assert torch.equal(places, case["out/position_ids"][b][padded[b]])
        if asking is not None:
            assert torch.equal(case["in/labels"][b][rows], case["out/labels"][b][padded[b]])


@cases("vlm", lambda c: {"kept", "layers"} <= c.asks and c.has("out/decode_hidden"))
def test_visiondrop(case: Case):
    s = case.settings
    check_settings(s, "prompt", "prompt_len", "image_start", "image_tokens", "layers", "kept")
    file = case.fixture()
    options = {"kept": s["kept"], "layers": s["layers"]}
    lm = dropping(llama(file), tokenzoo.VisionDrop(**options, order="published"), "contiguous")
    entering = Entering(lm, s["layers"])
    run(lm, case, file)
    for layer in s["layers"]:
        close(entering.found[layer][0], case[f"out/tokens/{layer}"], 1e-4)


@cases("vlm", lambda c: {"kept", "layers"} <= c.asks and c.has("out/decode_hidden"))
def test_visiondrop_in_raster_order(case: Case):
    """At the first cut: the same rows, and those that take in others stand where their targets stood."""
    s = case.settings
    file, layer = case.fixture(), s["layers"][0]
    lm = dropping(llama(file), tokenzoo.VisionDrop(kept=s["kept"][:1], layers=layer), "original")
    entering = Entering(lm, (layer,))
    kept = read_prompt(lm, case, file).past_key_values.kept.layers[layer].cols[0]
    rows, tokens = case[f"out/rows/{layer}"], case[f"out/tokens/{layer}"]
    found = entering.found[layer][0]
    assert torch.equal(kept, kept.sort().values) and len(kept) == len(rows)
    merged = rows < 0
    assert set(rows[~merged].tolist()) <= set(kept.tolist())
    place = {int(row): i for i, row in enumerate(kept)}
    own = torch.tensor([place[int(row)] for row in rows[~merged]])
    close(found[own], tokens[~merged], 1e-4)
    rest = torch.ones(len(kept), dtype=torch.bool)
    rest[own] = False
    close(found[rest], tokens[merged], 1e-4)


@cases("vlm", lambda c: c.has("out/merged") and c.has("out/rows"))
def test_holitom(case: Case):
    s = case.settings
    check_settings(s, "prompt", "image_start", "image_tokens", "layer", "share_removed")
    file = case.fixture()
    lm = dropping(llama(file), tokenzoo.HoliTom(removed=s["share_removed"], layers=s["layer"]), "original")
    entering = Entering(lm, (s["layer"],))
    out = read_prompt(lm, case, file)
    assert torch.equal(out.past_key_values.kept.layers[s["layer"]].cols[0], case["out/rows"])
    close(entering.found[s["layer"]], case["out/merged"], 1e-4)
    close(out.last_hidden_state, case["out/last_hidden_state"], 1e-4)


class Recorded:
    """Attention of words, as it was recorded."""

    def __init__(self, attention: torch.Tensor) -> None:
        self._attention = attention  # [q, N]

    def attention(self, queries: torch.Tensor) -> torch.Tensor:
        assert int(queries.sum()) == len(self._attention)
        return self._attention.mean(0, keepdim=True)

    def strongest(self, queries: torch.Tensor) -> torch.Tensor:
        return self._attention.amax(0, keepdim=True)


@cases("vlm", lambda c: c.has("in/text_to_image_attention") and c.has("out/keep"))
def test_mustdrop(case: Case):
    s = case.settings
    check_settings(s, "heads", "system", "image", "text", "global_thr", "individual_thr")
    given = case["in/text_to_image_attention"].mean(0)
    n = s["system"] + s["image"] + s["text"]
    visual = torch.zeros(1, n, dtype=torch.bool)
    visual[:, s["system"] : s["system"] + s["image"]] = True
    attention = torch.rand(s["text"], n)  # that of words to words does not matter
    attention[:, visual[0]] = given
    rows = LayerRows(torch.zeros(1, n, 2), visual, torch.ones_like(visual), [s["image"]])
    dropper = tokenzoo.MustDrop(together=s["global_thr"], alone=s["individual_thr"])
    left = dropper.decide(rows, Recorded(attention), 0)
    assert torch.equal(left.keep[0, visual[0]].nonzero().flatten(), case["out/keep"])


@cases("vlm", lambda c: {"window", "threshold"} <= c.asks and c.has("out/size"))
def test_mustdrop_windows(case: Case):
    """Its first stage is ALGM's merging of windows, but for the order of tokens, which are matched by a channel."""
    s = case.settings
    check_settings(s, "B", "grid", "C", "window", "threshold", "out_tokens")
    method = tokenzoo.ALGM(threshold=s["threshold"], window=s["window"], batch_min=True)
    tokens = Tokens(case["in/tokens"], Layout(1, True, (s["grid"], s["grid"]), track_size=True))
    found = tokens.reduce(method.map(tokens, None, Step(method, 0, Stage(True, None))))
    for x, size, y, mass in zip(found.x, found.sizes(), case["out/tokens"], case["out/size"]):
        own, theirs = x[:, 0].argsort(), y[:, 0].argsort()
        close(x[own], y[theirs], 1e-5)
        close(size[own], mass[theirs], 1e-6)


@cases("vlm", lambda c: "stride" in c.asks and c.has("in/positions"))
def test_llavolta(case: Case):
    s = case.settings
    check_settings(s, "N", "C", "stride")
    x, positions = case["in/tokens"], case["in/positions"]
    words = torch.randn(1, 3, s["C"])
    visual = torch.tensor([[False] * 3 + [True] * s["N"]])
    dropper = tokenzoo.LLaVolta(stride=s["stride"])
    rows = LayerRows(torch.cat([words, x], 1), visual, torch.ones_like(visual), [dropper.count(s["N"], 0)])
    left = dropper.decide(rows, None, 0)
    kept = left.keep & visual
    close(left.x[kept], case["out/tokens"][0], 1e-6)
    assert torch.equal(positions[kept[:, 3:]], case["out/positions"][0])
