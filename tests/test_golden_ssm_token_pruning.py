"""Pruning by the scan against the released selection code (the aligned scan itself: test_golden_selective_scan.py)."""

import ast
import math
import re

import torch
from goldens import Case, cases, close
from test_golden_vision_mamba import build

import tokenzoo
from tokenzoo.core.mixer_signals import MixerSignals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.ssm_prune import SSMPrune
from tokenzoo.models._scan_signals import ScanSignals
from tokenzoo.models.vim.block import add_residual

SETTING = re.compile(r"mode=(\w+) prune_after_block\(1-based\)=(\[.*?\]) keep_ratio=([\d.]+) score=(\w+) rows=(.*)")
SCORES = {
    "released": {"score": "released"},
    "corrected": {"score": "backward"},
    "both": {"score": "both"},
    "both_ungated": {"score": "both_ungated"},
}
ROWS = {
    "one image at a time": "single",
    "batch, class token protected in every row": "batch",
    "batch, class token protected in row 0 only (as released)": "first",
}


def setting(case: Case):
    """Blocks to act after (0-based), share, options of the score, which images are right."""
    text = case.words
    match = SETTING.fullmatch(text)
    assert match, f"the metadata holds settings that this test does not understand: {text}"
    mode, blocks, ratio, score, rows = match.groups()
    return mode, tuple(i - 1 for i in ast.literal_eval(blocks)), float(ratio), SCORES[score], ROWS[rows]


def of_kind(recorded: str):
    """Cases that record what is kept, or masks, of every stage."""
    return lambda case: bool(case.matching(rf"stage\d+/{recorded}"))


@torch.no_grad()
@cases("ssm_token_pruning", of_kind("kept"))
def test_gather(case: Case):
    mode, layers, ratio, score, rows = setting(case)
    assert mode == "gather"
    model, x = build(case.fixture()), case.input(len(case["output/logits"]))
    tokenzoo.patch_model(model, "ssm_prune", layers=layers, keep_rate=ratio, **score)
    inside = [row.tokens_in for row in tokenzoo.report(model).rows if row.block is not None]
    assert inside == case["output/token_counts_after_block"].tolist()
    images = [x[i : i + 1] for i in range(len(x))] if rows == "single" else [x]
    runs = [model.forward_tokens(part, trace=True) for part in images]
    right = slice(0, 1) if rows == "first" else slice(None)  # other rows may hold the class token twice, as released
    for j, recorded in enumerate(case.matching(r"stage\d+/kept").values()):
        kept = torch.cat([run.trace[j].map.heads[:, 1:] - 1 for run in runs])
        before = torch.cat([torch.tensor([_class_row(run, j)]) for run in runs for _ in range(len(run.x))])
        found = kept + (kept >= before.unsqueeze(1)).long()  # numbered with the class token among them
        assert torch.equal(found[right], recorded.long()[right])
    close(torch.cat([model(part) for part in images])[right], case["output/logits"][right])


def _class_row(run: Tokens, stage: int) -> int:
    """Row of the class token in front of a stage: the middle of what was there."""
    return (run.trace[stage].map.n_in - 1) // 2


@torch.no_grad()
@cases("ssm_token_pruning", of_kind("mask"))
def test_mask(case: Case):
    """The released simulation at full length, which the library has no need of, with the library's importance."""
    mode, layers, ratio, score, rows = setting(case)
    assert mode == "mask" and rows == "batch"
    model, x = build(case.fixture()), case.input(len(case["output/logits"]))
    h, res = model.embed_tokens(x), None
    batch, length, c = len(x), h.shape[1], (h.shape[1] - 1) // 2
    alive, counts = torch.ones(batch, length, dtype=torch.bool), []
    for index, block in enumerate(model.layers):
        counts.append(length)
        res = block.add(h, res)
        scan = ScanSignals()
        h = block.mix(res, signals=scan)
        if index in layers:
            signals = MixerSignals(False, hidden=h, scan=scan, to_tokens=lambda t: t.transpose(1, 2))
            tokens = Tokens(h, Layout(0, False, (1, length)))
            importance = SSMPrune(**score).importance(tokens, signals).masked_fill(~alive, float("-inf"))
            importance[:, c] = float("-inf")
            kept = math.ceil(int(alive[0].sum()) * ratio)
            kept += kept % 2 == 0
            alive = torch.zeros_like(alive).scatter(1, importance.topk(kept - 1, dim=1).indices, True)
            alive[:, c] = True
            recorded = case[f"stage{layers.index(index)}/mask"]
            assert torch.equal(alive, recorded.bool())
            h, res = h * alive.unsqueeze(-1), res * alive.unsqueeze(-1)
    assert counts == case["output/token_counts_after_block"].tolist()
    out = model._narrow(model.norm_f(add_residual(h, res)))
    close(model.head(out[:, c]), case["output/logits"])
