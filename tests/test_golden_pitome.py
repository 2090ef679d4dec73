"""PiToMe against the published implementation."""

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens, trace_assign
from tokenzoo.maps import MergeMap
from tokenzoo.methods.pitome import PiToMe
from tokenzoo.ops.matching.bipartite import bipartite_pairs
from tokenzoo.ops.matching.energy import cluster_energy

# the authors' patch of a model -> options
PATCHES = {
    "deit": {"ordered": "first"}, "mae": {"ordered": "last", "mass_pool": True},
    "clip": {"ordered": "none", "metric": "tokens"}, "blip": {"ordered": "none", "metric": "tokens"},
}  # fmt: skip


class Given:
    """Signals that hold a metric."""

    def __init__(self, metric):
        self.metric = metric


def merge_of(case: Case, s: dict) -> MergeMap:
    """The map of a recorded matching."""
    prefix, size = int(s["class_token"]), case["size"] if case.has("size") else None
    if s["kind"] == "bsm":
        pairs = bipartite_pairs(case["metric"], int(s["N"] - s["N"] * s["keep_ratio"]), prefix)
        return MergeMap(pairs.order, pairs.src, pairs.slot, s["N"], size)
    method = PiToMe(keep_rate=s["keep_ratio"], alpha=s["alpha"], energy="gaussian" if s["kind"] == "text" else "elu")
    tokens = Tokens(case["x"], Layout(prefix, bool(prefix), (1, s["N"] - prefix), track_size=True), size)
    step = Step(method, 0, (s["keep_ratio"], None, s["margin"], s["kind"] == "pitome_bsm"))
    return method.map(tokens, Given(case["metric"]), step)


@cases("pitome", lambda c: c.has("out_source_assign") and c.has("metric"))
def test_matching(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "keep_ratio", "margin", "class_token", "kind", "alpha", "size_given", "N_out")
    merge, prefix, n = merge_of(case, s), int(s["class_token"]), s["N"]
    size = case["size"] if case.has("size") else torch.ones(s["B"], n, 1)
    assert merge.n_out == s["N_out"] and torch.equal(merge.assign, case["out_source_assign"])
    close(merge.apply(case["x"]), case["out_x_wavg"], 1e-5)
    close(merge.pool(size), case["out_size"], 1e-5)
    plain = MergeMap.from_assign(merge.heads, merge.assign)
    close(plain.apply(case["x"]), case["out_x_mean"], 1e-5)
    if case.has("out_energy"):
        energy = cluster_energy(F.normalize(case["metric"][:, prefix:], dim=-1), s["margin"], s["alpha"])
        close(energy, case["out_energy"], 1e-5)
    if s["kind"] == "bsm":
        assert torch.equal(merge.src, 2 * case["out_src_idx"])
        return
    a, b = case["out_a_idx"], case["out_b_idx"]
    ordered = s["kind"] == "pitome_bsm"
    stays = a.gather(1, case["out_unm_idx"]) if ordered else case["out_protected_idx"]
    merged = a.gather(1, case["out_src_idx"]) if ordered else a
    assert torch.equal(merge.heads[:, prefix:] - prefix, torch.cat([stays, b], dim=1))
    into = merge.assign[:, prefix:].gather(1, merged)
    assert torch.equal(into - prefix - stays.shape[1], case["out_dst_idx"])


@cases("pitome", lambda c: c.has("out_logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "keep_ratio", "patch", "margins")
    options = PATCHES[s["patch"]]
    model = case.model(global_pool="avg") if s["patch"] == "mae" else case.model()
    tokenzoo.patch_model(model, "pitome", keep_rate=s["keep_ratio"], margin=s["margins"], **options)
    x = case.input(case["out_logits"].shape[0])
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["out_logits"])
    if case.has("out_features"):
        close(tokens.x, case["out_features"])
    close(tokens.size, case["out_size"], 1e-5)
    expected = case["out_source_assign"]
    assert torch.equal(trace_assign(tokens.trace, len(x), expected.shape[1], x.device), expected)
    rows = [row for row in tokenzoo.report(model, tuple(x.shape[-2:])).rows if row.block is not None]
    assert [row.tokens_out for row in rows] == case["out_tokens_per_block"].tolist()
    dim = model.embed_dim
    flops = sum(12 * row.tokens_in * dim**2 + 2 * row.tokens_in**2 * dim for row in rows)
    assert case["out_reported_flops"].tolist() == [flops]  # theirs: every block at the length that enters it
