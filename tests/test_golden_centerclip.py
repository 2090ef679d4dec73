"""K-medoids as CenterCLIP runs it, against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close
from torch import Tensor

from tokenzoo.layers import SegmentMedoids
from tokenzoo.ops.cells.medoids import clusters, farthest_first, refine
from tokenzoo.ops.cells.spectral import spectral_rows
from tokenzoo.ops.distances import squared_distances


def medoids_of(x: Tensor, count: int, cosine: bool = False, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Medoids by index, and the distances."""
    distances = squared_distances(x).sqrt()
    if cosine:
        distances = squared_distances(torch.nn.functional.normalize(x, dim=2)) / 2
    first = farthest_first(x.norm(dim=2), distances, count)
    return refine(distances, first, rounds).sort(dim=1).values, distances


@cases("vlm", lambda c: c.has("out/medoids") and "iter_limit" in c.asks)
def test_medoids(case: Case):
    s, x = case.settings, case["in/tokens"]
    check_settings(s, "B", "N", "C", "K", "distance", "pre_norm", "threshold", "iter_limit")
    assert s["distance"] in ("euclidean", "cosine")
    if s["pre_norm"]:
        x = torch.nn.functional.normalize(x, dim=2)
    medoids, distances = medoids_of(x, s["K"], s["distance"] == "cosine", s["iter_limit"])
    assert torch.equal(medoids, case["out/medoids"])
    assert torch.equal(clusters(distances, medoids), case["out/assign"])


@cases("vlm", lambda c: c.has("out/medoids") and "knn_k" in c.asks)
def test_spectral(case: Case):
    s = case.settings
    check_settings(s, "B", "N", "C", "K", "sigma", "knn_k", "graph")
    assert s["graph"] in ("KNN", "HeatKernel")
    near = s["knn_k"] if s["graph"] == "KNN" else None
    rows = spectral_rows(squared_distances(case["in/tokens"]), s["K"], s["sigma"], near)
    distances = squared_distances(rows).sqrt()
    # the published code begins at the longest row, which rounding decides: all are of unit length
    first = farthest_first(case["in/tokens"].norm(dim=2), distances, s["K"])
    medoids = refine(distances, first, 100).sort(dim=1).values
    assert torch.equal(medoids, case["out/medoids"])
    assert torch.equal(clusters(distances, medoids), case["out/assign"])


@cases("vlm", lambda c: "segments" in c.asks)
def test_layer(case: Case):
    s = case.settings
    check_settings(s, "algorithm", "B", "frames", "segments", "N", "D", "K", "aggregation")
    how = {"kmediods++": s["aggregation"] or "medoids", "pooling": "pooling"}[s["algorithm"]]
    layer = SegmentMedoids(s["frames"], s["segments"], s["K"], how, iterations=100)
    close(layer(case["in/x"].transpose(0, 1)).transpose(0, 1), case["out/x"])
