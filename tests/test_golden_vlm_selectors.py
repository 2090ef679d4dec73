"""Selectors against the published implementations: their decisions, and whole towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import Case, cases, check_settings, close, read
from test_golden_vlm import kept_of, llava

import tokenzoo
from tokenzoo.vlm import functional
from tokenzoo.vlm.rows import VisualRows


class Recorded:
    """Signals that hold what was recorded, whatever the layer."""

    def __init__(self, **signals: Any) -> None:
        self._signals = signals

    def __getattr__(self, name: str) -> Any:
        value = self._signals[name]
        return value if not callable(value) and name in ("depth", "handed_on", "text") else (
            lambda layer=None: value(layer) if callable(value) else value
        )  # fmt: skip


def patched(case: Case, method: str, **options: Any) -> torch.Tensor:
    """Rows of the recorded tower behind a selector [B, N, C]."""
    file = case.fixture()
    model = llava(file)
    tokenzoo.patch_model(model, method, **options)
    with torch.no_grad():
        return torch.stack(model.model.get_image_features(read(file)[0]["input"]).pooler_output)


def mask_of(found: Any) -> torch.Tensor:
    return found.membership().sum(1).bool()


def mask_at(index: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(*index.shape[:-1], n, dtype=torch.bool).scatter(-1, index, True)


def same_rows(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    """As many rows, and each expected one among them once, in any order."""
    assert found.shape == expected.shape
    near = (found.unsqueeze(1) - expected.unsqueeze(0)).abs().amax(-1) <= atol
    assert near.any(0).all() and near.any(1).all()


@cases("vlm", lambda c: "important_ratio" in c.asks and c.has("in/cls_attention"))
def test_vispruner_rows(case: Case):
    s, x = case.settings, case["in/features"]
    check_settings(s, "B", "N", "keep", "important_ratio", "important")
    made = tokenzoo.VisPruner(keep=s["keep"], important=s["important_ratio"])
    found = made.map(VisualRows(x), Recorded(importance=case["in/cls_attention"].mean(1)), s["keep"])
    assert torch.equal(mask_of(found), case["out/mask"].bool())


@cases("vlm", lambda c: c.asks == {"keep", "important_ratio"})
def test_vispruner_on_a_tower(case: Case):
    s = case.settings
    found = patched(case, "vispruner", keep=s["keep"], important=s["important_ratio"])
    assert torch.equal(kept_of(found), case["out/mask"].bool())


@cases("vlm", lambda c: "start_layer" in c.asks and c.has("in/cls_attention"))
def test_vtc_cls_rows(case: Case):
    s, x = case.settings, case["in/features"][None]
    check_settings(s, "layers", "heads", "N", "C", "keep", "start_layer")
    rows = case["in/cls_attention"].mean(1)
    signals = Recorded(importance=lambda layer: rows[layer][None], depth=len(rows), handed_on=len(rows) - 2)
    made = tokenzoo.VTCCLS(keep=s["keep"], start=s["start_layer"])
    found = made.map(VisualRows(x), signals, s["keep"])
    assert torch.equal(found.heads[0], case["out/indices"].sort().values)
    close(found.apply(x)[0], case["out/kept"], 1e-6)
    close(rows[s["start_layer"] : -1].sum(0), case["out/score"], 1e-6)


@cases("vlm", lambda c: c.asks == {"start_layer", "keep"} and c.has("out/kept"))
def test_vtc_cls_on_a_tower(case: Case):
    s = case.settings
    found = patched(case, "vtc_cls", keep=s["keep"], start=s["start_layer"])
    close(found[kept_of(found)].view_as(case["out/kept"]), case["out/kept"], 1e-4)


@cases("vlm", lambda c: "dominant" in c.asks and c.has("in/key_metric"))
def test_visionzip_rows(case: Case):
    s, x = case.settings, case["in/hidden"]
    check_settings(s, "B", "heads", "N", "C", "metric_dim", "dominant", "contextual")
    keep = 1 + s["dominant"] + s["contextual"]
    signals = Recorded(importance=case["in/cls_attention"].mean(1), mean_keys=case["in/key_metric"][:, 1:])
    rows = VisualRows(x[:, 1:], tower=x[:, 1:], class_token=x[:, :1], inside=True)
    found = tokenzoo.VisionZip(keep=keep, contextual=s["contextual"] / keep).map(rows, signals, keep)
    close(found.x, case["out/tokens"], 1e-5)
    kept = case["out/all_indices"][:, 1:].sort(1).values - 1
    assert torch.equal(found.slots[:, 1 : 1 + s["dominant"]], kept)
    assert all(len(set(slots)) == keep for slots in found.slots.tolist())


@cases("vlm", lambda c: c.asks == {"dominant", "contextual"})
def test_visionzip_on_a_tower(case: Case):
    s = case.settings
    keep = 1 + s["dominant"] + s["contextual"]
    found = patched(case, "visionzip", keep=keep, contextual=s["contextual"] / keep)
    for rows, expected in zip(found, case["out/tokens"]):
        same_rows(rows[kept_of(rows)], expected)


@cases("vlm", lambda c: c.has("in/score_object"))
def test_hiprune_rows(case: Case):
    s = case.settings
    check_settings(s, "grid", "B", "retention_total", "keep_per_crop", "alpha")
    shallow, deep, keep = case["in/score_object"], case["in/score_deep"], s["keep_per_crop"]
    signals = Recorded(received=lambda layer: deep if layer == -2 else shallow, depth=24)
    rows = VisualRows(deep.unsqueeze(-1), (s["grid"], s["grid"]))
    found = tokenzoo.HiPrune(keep=keep, alpha=s["alpha"]).map(rows, signals, keep)
    assert torch.equal(mask_of(found), case["out/mask"].bool())


@cases("vlm", lambda c: "object_layer" in c.asks and c.has("out/mask"))
def test_hiprune_on_a_tower(case: Case):
    s = case.settings
    check_settings(s, "object_layer", "keep", "alpha")
    found = patched(case, "hiprune", keep=s["keep"], alpha=s["alpha"], layer=s["object_layer"])
    assert torch.equal(kept_of(found), case["out/mask"].bool())


@cases("vlm", lambda c: c.has("in/cls_attention_final"))
def test_hired_rows(case: Case):
    s, final = case.settings, case["in/cls_attention_final"].sum(1)
    check_settings(s, "grid", "heads", "N", "token_budget_rate", "alpha")
    parts, n = final.shape
    first = case["in/cls_attention_first"].sum(1) if parts > 1 else final
    keep = min(n, int(n * s["token_budget_rate"])) if parts == 1 else int(parts * n * s["token_budget_rate"])
    signals = Recorded(importance=lambda layer: (first if layer == 0 else final).reshape(1, -1))
    part = torch.arange(parts).repeat_interleave(n)[None]
    made = tokenzoo.HiRED(keep=keep, alpha=s.get("alpha", 0.5))
    found = mask_of(made.map(VisualRows(final.reshape(1, -1, 1), part=part), signals, keep)).view(parts, n)
    assert torch.equal(found, case["out/mask"].bool().view(parts, n))
    if case.has("out/counts"):
        assert torch.equal(found.sum(1), case["out/counts"])


@cases("vlm", lambda c: c.has("out/order") and c.has("in/tokens"))
def test_divprune_rows(case: Case):
    s = case.settings
    check_settings(s, "N", "C", "ratio", "keep")
    assert torch.equal(functional.divprune(case["in/tokens"][None], s["keep"])[0], case["out/order"])


@cases("vlm", lambda c: c.asks == {"ratio"} and c.has("out/order"))
def test_divprune_on_a_tower(case: Case):
    found = kept_of(patched(case, "divprune", keep=float(case.settings["ratio"])))
    assert torch.equal(found, mask_at(case["out/order"], found.shape[1]))


@cases("vlm", lambda c: "adaptive" in c.asks and c.has("in/q"))
def test_prumerge_rows(case: Case):
    s, x, q, k = case.settings, case["in/features"], case["in/q"], case["in/k"]
    check_settings(s, "N", "C", "adaptive", "ratio", "out_tokens")
    row = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
    close(row[0], case["out/cls_attention"], 1e-6)
    fixed = None if s["adaptive"] else int(s["N"] * s["ratio"]) + 1
    made = tokenzoo.PruMerge(keep=fixed, plus="plus" in case.short)
    rows = VisualRows(x[:, 1:], tower=x[:, 1:], inside=True)
    found = made.map(rows, Recorded(joined_row=row, keys=k[:, 1:]), fixed or s["N"] - 1)
    expected = case["out/tokens"]
    if len(expected[0]) > s["N"]:  # no row goes: the one of those that go is nothing, and has no place
        assert not expected[0, -1].any()
        expected = expected[:, :-1]
    if "plus" in case.short:  # the released code puts those at even distances where a set puts them
        same_rows(found.x[0], expected[0])
    else:
        close(found.x, expected, 1e-5)


@cases("vlm", lambda c: "adaptive" in c.asks and "image" in c.asks)
def test_prumerge_on_a_tower(case: Case):
    s = case.settings
    check_settings(s, "plus", "adaptive", "ratio", "image")
    options = {} if s["adaptive"] else {"keep": s["ratio"]}
    found = patched(case, "prumerge", plus=s["plus"], **options)[s["image"]]
    same_rows(found[kept_of(found)], case["out/tokens"][0])


@cases("vlm", lambda c: c.has("in/clip"))
def test_mmtok_rows(case: Case):
    s, text, vision, tower = case.settings, case["in/text"], case["in/vision"], case["in/clip"]
    check_settings(s, "N", "text_tokens", "keep", "alpha", "tv_temp", "vv_temp", "exclude")
    gone = mask_at(torch.tensor(s["exclude"]), len(vision)) if s["exclude"] else None
    found = functional.mmtok(text, vision, tower, s["keep"], s["alpha"], s["tv_temp"], s["vv_temp"], gone)
    assert torch.equal(found.sort().values, case["out/indices"])
    if gone is None:
        made = tokenzoo.MMTok(alpha=s["alpha"], text_temperature=s["tv_temp"], image_temperature=s["vv_temp"])
        rows = VisualRows(vision[None], tower=tower[None])
        close(made.map(rows, Recorded(text=[text]), s["keep"]).apply(rows.x)[0], case["out/tokens"], 1e-6)


@cases("vlm", lambda c: c.has("in/text_embeds") and c.has("in/image_embeds"))
def test_cdpruner_rows(case: Case):
    s, x = case.settings, case["in/features"]
    check_settings(s, "B", "N", "keep", "texts")
    weight = functional.relevance(case["in/image_embeds"], case["in/text_embeds"], batch=True)
    found = functional.cdpruner(x, weight, s["keep"])
    assert torch.equal(mask_at(found, x.shape[1]), case["out/mask"].bool())


def test_cdpruner_weighs_each_image_alone():
    """What the selector does differently from the released code: images of a batch do not influence each other."""
    x, words = torch.randn(2, 12, 8), [torch.randn(3, 8), torch.randn(5, 8)]
    rows = VisualRows(x)
    found = tokenzoo.CDPruner(keep=4).map(rows, Recorded(text=words), 4)
    for b in range(2):
        alone = tokenzoo.CDPruner(keep=4).map(VisualRows(x[b : b + 1]), Recorded(text=words[b : b + 1]), 4)
        assert torch.equal(found.heads[b], alone.heads[0])
    assert pytest.approx(float(functional.relevance(x, words[0]).amax(1)[0]), abs=1e-4) == 1


def valid_cells(side: int, crops: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Places of the image that crops make which are no padding [high, wide] bool."""
    (high, wide), (w, h) = (side * crops[0], side * crops[1]), size
    valid = torch.ones(high, wide, dtype=torch.bool)
    if w / h > wide / high:
        pad = (high - int(h * wide / w)) // 2
        valid[:pad], valid[high - pad :] = False, False
    else:
        pad = (wide - int(w * high / h)) // 2
        valid[:, :pad], valid[:, wide - pad :] = False, False
    return valid


@cases("vlm", lambda c: c.has("in/base_scores"))
def test_globalcom2_rows(case: Case):
    s, g, own = case.settings, case["in/base_scores"], case["in/crop_scores"]
    check_settings(s, "grid_h_w", "side", "C", "image_size_w_h", "retention")
    side, (down, across) = s["side"], s["grid_h_w"]
    valid = valid_cells(side, (down, across), s["image_size_w_h"])

    def canvas(values: torch.Tensor) -> torch.Tensor:
        """[crops, side * side, ...] -> [high, wide, ...]."""
        found = values.unflatten(1, (side, side)).unflatten(0, (down, across))
        return found.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    inner = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    part = torch.cat([torch.zeros(side * side), canvas(
        torch.arange(1.0, len(own) + 1)[:, None].expand(-1, side * side))[valid]]).long()  # fmt: skip
    place = torch.cat([inner, canvas(inner.expand(len(own), -1, -1))[valid]])
    score = torch.cat([g, canvas(own)[valid]])
    shares = functional.crop_shares(g.view(side, side), (down, across), s["retention"])
    close(shares, case["out/scales"], 1e-6)
    kept = functional.globalcom2(score, part, place, s["retention"])
    assert torch.equal(kept[: side * side].nonzero().flatten(), case["out/thumbnail_indices"].sort().values)
    # the released code puts a row at its rank among those that are no padding, as if there were none
    packed = torch.zeros(len(own), side * side, dtype=torch.bool)
    values = torch.zeros_like(case["in/crop_features"])
    numbers = canvas(torch.arange(side * side).expand(len(own), -1))[valid]
    for c in range(len(own)):
        here = part[side * side :] == c + 1
        real, stay = numbers[here], kept[side * side :][here]
        packed[c, : len(stay)] = stay
        values[c, : len(stay)][stay] = case["in/crop_features"][c, real[stay]]
    lines = [torch.cat([v[k], case["in/newline"][None]]) for v, k in zip(canvas(values), canvas(packed))]
    close(torch.cat(lines), case["out/crops_packed"], 1e-3)  # recorded in half precision


@cases("vlm", lambda c: c.has("out/tokens_fp32") and c.has("in/features"))
def test_fourier_rows(case: Case):
    s, x = case.settings, case["in/features"]
    check_settings(s, "B", "H", "W", "C", "h", "w", "norm")
    grid, cells = (s["H"], s["W"]), (s["h"], s["w"])
    gain = 1.0 if s["norm"] else (s["H"] * s["W"] / (s["h"] * s["w"])) ** 0.5
    close(functional.fourier(x, grid, cells, rescale=False) * gain, case["out/tokens_fp32"], 1e-4)
    ones = torch.ones_like(x)
    close(functional.fourier(ones, grid, cells), ones[:, : s["h"] * s["w"]], 1e-5)


@cases("vlm", lambda c: "window" in c.asks and c.has("in/tokens") and c.has("out/size"))
def test_mustdrop_windows(case: Case):
    s, x = case.settings, case["in/tokens"][:, 1:]
    check_settings(s, "B", "grid", "C", "window", "threshold", "out_tokens")
    grid, window = (s["grid"], s["grid"]), tuple(s["window"])
    likeness = functional.window_likeness(x, grid, window)
    count = int((likeness >= s["threshold"]).sum(1).min())  # the released code lets a batch merge alike
    for b in range(len(x)):
        assign = functional.merge_windows(likeness[b], grid, window, count)
        belongs = (assign == torch.arange(s["out_tokens"] - 1)[:, None]).float()
        size = belongs.sum(1, keepdim=True)
        close(size, case["out/size"][b, 1:], 0)
        close(belongs @ x[b] / size, case["out/tokens"][b, 1:], 1e-5)


@cases("vlm", lambda c: "tau" in c.asks and c.has("in/attention"))
def test_holitom_rows(case: Case):
    s, x, attention = case.settings, case["in/features"], case["in/attention"]
    check_settings(s, "T", "N", "C", "tau", "retain_ratio", "effective_ratio", "beta", "D", "K")
    likeness = functional.frame_likeness(x)
    close(likeness, case["out/similarity"], 1e-5)
    windows, spared = functional.frame_windows(likeness > s["tau"])
    assert windows == [tuple(pair) for pair in case["out/segments"].tolist()]
    assert spared == int(case["out/total_reduced"])
    lengths = case["out/segment_lengths"].cumsum(0).tolist()
    for beta, key in ((None, "out/tokens_nobeta1"), (s["beta"], "out/tokens_nobeta0")):
        found = functional.holitom(x, attention, s["retain_ratio"], s["tau"], float(s["D"]), beta, s["K"])
        close(found.x, case[key], 1e-5)
        last = [int((found.slots // s["N"] <= stop).sum()) for _, stop in windows]
        assert last == lengths and len(set(found.slots.tolist())) == len(found.slots)
    n = s["T"] * s["N"]
    made = tokenzoo.HoliTomTower(keep=round(s["retain_ratio"] * n), tau=s["tau"], clustered=float(s["D"]))
    rows = VisualRows(x.flatten(0, 1)[None], part=torch.arange(s["T"]).repeat_interleave(s["N"])[None])
    new = made.map(rows, Recorded(importance=attention.reshape(1, -1)), round(s["retain_ratio"] * n))
    assert abs(len(new.slots[0]) - len(found.slots)) <= len(x)
