"""Clustering and reconstruction on models, against the ports for Segmenter and SWAG."""

import torch
from goldens import Case, cases, check_settings, close, micro_decoder

import tokenzoo
from tokenzoo.dense import Segmenter


def clustering(s: dict, **more) -> dict:
    return {
        "method": "cluster", "layers": s["loc"], "grid": s["grid"], "iterations": s["it"], "window": s["win"],
        "temperature": s["T"], **more,
    }  # fmt: skip


def inner_lengths(model: torch.nn.Module, x: torch.Tensor) -> list[int]:
    """Tokens in front of the MLP of every block."""
    seen = []
    hooks = [b.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1])) for b in model.blocks]
    with torch.no_grad():
        model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return seen


@cases("expedit", lambda c: "rloc" in c.asks)
def test_features(case: Case):
    s = case.settings
    check_settings(s, "loc", "grid", "T", "win", "it", "k", "rloc")
    model, x = case.model(), case.input(len(case["cls"]))
    last = s["rloc"] == len(model.blocks) - 1
    rebuild = {"method": "reconstruct", "layers": "norm" if last else s["rloc"], "k": s["k"], "norm": "l2"}
    tokenzoo.patch_model(model, [clustering(s), rebuild])
    with torch.no_grad():
        walked = list(model.walk(x))
        features = model.forward_features(x)
    close(features[:, 0], case["cls"])
    close(features[:, 1:], case["features"])
    (step,) = walked[s["loc"] + 1].trace
    close(step.map.centers, case["centers"])
    assert torch.equal(step.map.assign[:, 1:] - 1, case["hard_labels"])
    assert inner_lengths(model, x) == case["block_tokens"].tolist()


@cases("expedit", lambda c: "after" in c.asks)
def test_classification(case: Case):
    s = case.settings
    check_settings(s, "loc", "after", "grid", "T", "win", "it")
    model, x = case.model(), case.input(len(case["logits"]))
    tokenzoo.patch_model(model, clustering(s, where="after" if s["after"] else "before"))
    with torch.no_grad():
        close(model(x), case["logits"])
    assert inner_lengths(model, x) == case["block_tokens"].tolist()


def segmenter(case: Case) -> Segmenter:
    encoder = case.model()
    decoder = micro_decoder("mask")
    return Segmenter(encoder, decoder, decoder.num_classes).eval()


@cases("expedit", lambda c: c.has("logits_lowres"))
@torch.no_grad()
def test_class_maps(case: Case):
    model, labels = segmenter(case), case["labels"]
    x = case.input(len(labels))
    if not case.has("logits_clustered"):
        close(model.class_maps(x), case["logits_lowres"])
        assert torch.equal(model(x).argmax(1), labels.long())
        return
    s = case.settings
    check_settings(s, "loc", "grid", "T", "win", "it", "k")
    tokenzoo.patch_model(model, [clustering(s), {"method": "reconstruct", "layers": "maps", "k": s["k"], "norm": "l2"}])
    reduced = model.encoder.forward_tokens(x).x[:, 1:]
    close(model.decoder(reduced).transpose(1, 2).unflatten(2, s["grid"]), case["logits_clustered"])
    close(model.class_maps(x), case["logits_lowres"])
    assert torch.equal(model(x).argmax(1), labels.long())
    if case.has("logits_full"):
        close(model(x)[:1], case["logits_full"])
    assert inner_lengths(model.encoder, x) == case["block_tokens"].tolist()
