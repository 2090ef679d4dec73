"""Clustering and reconstruction against the published implementation, operator by operator."""

import torch
from goldens import Case, cases, check_settings, close

from tokenzoo.maps import ClusterMap
from tokenzoo.ops.cells.kmeans import cluster, hard_labels
from tokenzoo.ops.cells.reconstruct import reconstruct


@cases("expedit", lambda c: c.has("hard_labels") and "n_iters" in c.asks)
def test_cluster(case: Case):
    s = case.settings
    check_settings(s, "map_hw", "grid_hw", "n_iters", "inv_temperature", "window")
    options = (s["map_hw"], s["grid_hw"], s["n_iters"], s["window"], s["inv_temperature"])
    centers = cluster(case["tokens"], *options).centers
    close(centers, case["centers"], 1e-5)
    assert torch.equal(hard_labels(case["tokens"], centers), case["hard_labels"])
    token_map = ClusterMap.of(case["tokens"], 0, *options)
    assert torch.equal(token_map.apply(case["tokens"]), centers)
    assert torch.equal(token_map.assign, case["hard_labels"])


@cases("expedit", lambda c: c.has("tokens_before"))
def test_reconstruct(case: Case):
    s = case.settings
    check_settings(s, "map_hw", "grid_hw", "k", "inv_temperature", "weight_norm")
    assert s["weight_norm"].startswith("l2 ")
    assert case["tokens_before"].shape[1] == s["map_hw"][0] * s["map_hw"][1]
    assert case["centers"].shape[1] == s["grid_hw"][0] * s["grid_hw"][1]
    out = reconstruct(case["values"], case["tokens_before"], case["centers"], s["inv_temperature"], s["k"], "l2")
    close(out, case["out"], 1e-5)
