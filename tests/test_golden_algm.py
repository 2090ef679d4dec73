"""ALGM against the published implementation."""

from functools import partial

import torch
from goldens import Case, cases, check_settings, close, decode_reduced, micro_decoder

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens, trace_assign
from tokenzoo.methods.algm import ALGM, Stage


def step_on(case: Case, method: ALGM, block: int, local: bool, grid: tuple[int, int]):
    """The map of one step on recorded tokens, None where nothing merges, and the tokens that it leaves."""
    size = case["size_in"] if case.has("size_in") else None
    tokens = Tokens(case["tokens"], Layout(1, True, grid, track_size=True), size)
    token_map = method.map(tokens, None, Step(method, block, Stage(local, None)))
    return token_map, tokens if token_map is None else tokens.reduce(token_map)


def check_step(case: Case, token_map, tokens):
    assign = torch.arange(tokens.length).expand(len(tokens.x), -1) if token_map is None else token_map.assign
    assert torch.equal(assign, case["assign"])
    close(tokens.x, case["merged"], 1e-5)
    close(tokens.sizes(), case["size"], 1e-6)


@cases("algm", lambda c: c.has("merged") and "threshold" in c.asks)
def test_windows(case: Case):
    s = case.settings
    check_settings(s, "threshold", "window")
    side = round((case["tokens"].shape[1] - 1) ** 0.5)
    check_step(case, *step_on(case, ALGM(**s, batch_min=True), 0, True, (side, side)))


@cases("algm", lambda c: c.has("merged") and "layer_idx" in c.asks)
def test_pairs(case: Case):
    s = case.settings
    check_settings(s, "layer_idx")
    patches = case["tokens"].shape[1] - 1
    method = ALGM(batch_min=True)
    check_step(case, *step_on(case, method, s["layer_idx"] - 1, False, (1, patches)))


def micro(case: Case):
    """The encoder of a case with its recipe, and the options that are for the decoder."""
    s = case.settings
    check_settings(s, "dec", "layers", "win", "thr", "batched")
    model = case.model(norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    layers = [i - 1 for i in s["layers"]]
    batched = s.get("batched", False)
    tokenzoo.patch_model(model, "algm", layers=layers, window=s["win"], threshold=s["thr"], batch_min=batched)
    return model, s["dec"]


def images_of(case: Case):
    """Parts of a case: (key prefix, images)."""
    singles = sorted({key.split("/")[0] for key in case.matching(r"img\d+/.*")})
    if not singles:
        return [("", case.input(case["features"].shape[0]))]
    count = 1 + max(int(name[3:]) for name in singles)
    return [(f"{name}/", case.input(count)[int(name[3:])][None]) for name in singles]


@cases("algm", lambda c: "dec" in c.asks)
def test_encoder(case: Case):
    model, _ = micro(case)
    for key, x in images_of(case):
        with torch.no_grad():
            tokens = model.forward_tokens(x, trace=True)
        close(tokens.x, case[f"{key}features"])
        assert torch.equal(trace_assign(tokens.trace, len(x), model.pos_embed.shape[1], x.device), case[f"{key}assign"])
        close(tokens.size, case[f"{key}size"], 1e-6)
        length, counts = model.pos_embed.shape[1], []
        for block in range(len(model.blocks)):
            length = next((s.map.n_out for s in tokens.trace if s.block == block), length)
            counts.append(length)
        assert counts == case[f"{key}block_tokens"].tolist()


@cases("algm", lambda c: "dec" in c.asks and not c.settings.get("batched"))
def test_images_of_a_batch_do_not_meet(case: Case):
    """Images that were recorded one by one give the same numbers side by side, behind padding."""
    model, _ = micro(case)
    parts = images_of(case)
    with torch.no_grad():
        tokens = model.forward_tokens(torch.cat([x for _, x in parts]), trace=True)
    assign = trace_assign(tokens.trace, len(parts), model.pos_embed.shape[1], tokens.x.device)
    for image, (key, _) in enumerate(parts):
        expected = case[f"{key}features"][0]
        assert tokens.valid[image].sum() == len(expected) and tokens.valid[image, : len(expected)].all()
        close(tokens.x[image, : len(expected)], expected)
        assert torch.equal(assign[image], case[f"{key}assign"][0])


@cases("algm", lambda c: "dec" in c.asks)
def test_segmenter(case: Case):
    model, kind = micro(case)
    decoder = micro_decoder(kind)
    for key, x in images_of(case):
        maps, labels = decode_reduced(model, decoder, x)
        close(maps, case[f"{key}logits_lowres"])
        assert torch.equal(labels, case[f"{key}labels"].long())
