"""K-medoids as CenterCLIP runs it, against the published implementation.

Its segments of several frames are put together here: methods of the library see single images.
"""

import torch
from goldens import Case, cases, check_settings, close
from torch import Tensor

from tokenzoo.core.grouping import around_centres
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import KeepMap
from tokenzoo.ops.cells.medoids import clusters, farthest_first, refine
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


@cases("vlm", lambda c: "segments" in c.asks and c.settings["algorithm"] == "kmediods++")
def test_layer(case: Case):
    s, x = case.settings, case["in/x"].transpose(0, 1)  # [B * T, 1 + N, C]
    check_settings(s, "algorithm", "B", "frames", "segments", "N", "D", "K", "aggregation")
    frames = s["frames"] // s["segments"]
    x = x.reshape(s["B"] * s["segments"], frames, *x.shape[1:])
    patches = x[:, :, 1:].flatten(1, 2)
    medoids, distances = medoids_of(patches, s["K"])
    keep = KeepMap(medoids, patches.shape[1])
    tokens = Tokens(patches, Layout(0, False, (1, patches.shape[1])))
    found = around_centres(keep, distances, tokens) if s["aggregation"] == "mean" else keep
    out = torch.cat([x[:, :, 0].mean(1, keepdim=True), found.apply(patches)], dim=1)
    close(out.transpose(0, 1), case["out/x"])
