"""Top-K, DPC-KNN, K-Medoids and fixed patterns against the code that compares reduction methods (Haurum et al.)."""

import torch
from goldens import Case, cases, check_settings, close

import tokenzoo
from tokenzoo.apply.released import rename_released
from tokenzoo.core.grouping import around_centres
from tokenzoo.core.selection import keep_patches
from tokenzoo.core.signals import Signals
from tokenzoo.core.step import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.layers.slots import MergingQueries, SinkhornCentres
from tokenzoo.methods.radial import Radial
from tokenzoo.ops.cells.density import peak_scores
from tokenzoo.ops.cells.medoids import clusters, refine
from tokenzoo.ops.distances import squared_distances

SHARED = ("method", "keep_rate", "reduction_loc")


def of(name: str):
    """Kind of case: a model with one of the methods, as the settings call it."""
    return lambda c: "reduction_loc" in c.asks and c.settings["method"] == f"{name}VisionTransformer"


def targets(settings: dict, patches: int) -> list[int]:
    """Patches to keep at each place: powers of one rate, or shares of all patches."""
    rates, places = settings["keep_rate"], settings["reduction_loc"]
    if len(rates) == 1:
        rates = [rates[0] ** (i + 1) for i in range(len(places))]
    return [int(patches * rate) for rate in rates]


def check_model(case: Case, method: str, shift: int = 0, **options):
    """Logits of all images, features of as many as were recorded, tokens behind every block.

    With a shift, the method acts so many blocks earlier, and tokens are those that enter a block's attention.
    """
    s, x, model = case.settings, case.input(len(case["logits"])), case.model()
    tokens = targets(s, model.patch_embed.num_patches)
    layers = [block - shift for block in s["reduction_loc"]]
    tokenzoo.patch_model(model, method, layers=layers, tokens=tokens, **options)
    if case.has("weights"):
        state = {key: value for key, value in model.state_dict().items() if "tokenzoo" not in key}
        model.load_state_dict(rename_released(model, state | case.part("weights")))
    with torch.no_grad():
        close(model(x), case["logits"], 1e-5)
        expected = case["features"]
        close(model.forward_tokens(x).x[: len(expected)], expected, 1e-5)
    counts = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    found = [row.tokens_in if shift else row.tokens_out for row in counts if row.block is not None]
    assert found == case["token_counts"].tolist()


@cases("tokenreduction_zoo", of("TopK"))
def test_topk(case: Case):
    check_settings(case.settings, *SHARED)
    check_model(case, "topk")


@cases("tokenreduction_zoo", of("DPCKNN"))
def test_dpcknn(case: Case):
    s = case.settings
    check_settings(s, *SHARED, "k_neighbors", "equal_weight")
    check_model(case, "dpcknn", neighbours=s["k_neighbors"], learned=not s["equal_weight"])


@cases("tokenreduction_zoo", of("SelfSlimmed"))
def test_sit(case: Case):
    check_settings(case.settings, *SHARED)
    check_model(case, "sit", shift=1, feature_weight=0.0)


@cases("tokenreduction_zoo", of("PatchMerger"))
def test_patchmerger(case: Case):
    check_settings(case.settings, *SHARED)
    check_model(case, "patchmerger")


@cases("tokenreduction_zoo", of("Sinkhorn"))
def test_sinkhorn(case: Case):
    s = case.settings
    check_settings(s, *SHARED, "sinkhorn_eps", "cluster_iters")
    check_model(case, "sinkhorn", eps=s["sinkhorn_eps"], iterations=s["cluster_iters"])


@cases("tokenreduction_zoo", lambda c: c.has("in/weights/queries"))
def test_merging_queries(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "cluster_num", "scaled_attention")
    check_layer(case, MergingQueries(x.shape[2], s["cluster_num"], s["scaled_attention"]))


@cases("tokenreduction_zoo", lambda c: c.has("in/weights/v"))
def test_centres(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "cluster_num", "eps", "iters")
    check_layer(case, SinkhornCentres(x.shape[2], s["cluster_num"], s["eps"], s["iters"]))


def check_layer(case: Case, layer: torch.nn.Module):
    """Weights and new tokens."""
    layer.load_state_dict(case.part("in/weights"))
    with torch.no_grad():
        weights, values = layer(case["in/x"])
    close(weights, case["out/weight"], 1e-5)
    close(values, case["out/x"], 1e-5)


@cases("tokenreduction_zoo", lambda c: c.has("out/x_equal"))
def test_dpcknn_clusters(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "cluster_num", "k", "density_noise")
    assert s.get("density_noise", "removed") == "removed"
    tokens = Tokens(x, Layout(0, False, (1, x.shape[1])))
    squared = squared_distances(x) / x.shape[2]
    centres = keep_patches(peak_scores(squared, s["k"]), tokens, lambda n: s["cluster_num"])
    equal = around_centres(centres, squared, tokens)
    assert torch.equal(equal.heads, case["out/index_center"])
    assert torch.equal(equal.assign, case["out/idx_cluster"])
    close(equal.apply(x), case["out/x_equal"], 1e-5)
    if case.has("out/x_weighted"):
        weighted = around_centres(centres, squared, tokens, case["in/score"].exp())
        close(weighted.apply(x), case["out/x_weighted"], 1e-5)


@cases("tokenreduction_zoo", lambda c: c.has("out/mask"))
def test_fixed_patterns(case: Case):
    s = case.settings
    check_settings(s, "grid", "pattern", "num_tokens")
    layout = Layout(1, True, (s["grid"], s["grid"]))
    tokens = Tokens(torch.zeros(1, 1 + layout.num_patches, 4), layout)
    method = Radial(tokens=s["num_tokens"], layers=list(range(len(s["num_tokens"]))), pattern=s["pattern"])
    for block, mask in enumerate(case["out/mask"]):
        # every stage looks at all patches: balls lie inside of each other
        step = Step(method, block, method.strengths(len(case["out/mask"]))[block])
        kept = method.map(tokens, Signals(lambda: None, None, tokens), step)
        assert kept.n_out - 1 == mask.sum()
        assert torch.equal(kept.assign[0, 1:].view(mask.shape) >= 0, mask > 0)


@cases("tokenreduction_zoo", lambda c: of("KMedoids")(c) and not c.settings["equal_weight"])
def test_kmedoids(case: Case):
    check_settings(case.settings, *SHARED, "cluster_iters", "equal_weight")
    check_model(case, "kmedoids", iterations=case.settings["cluster_iters"])


@cases("tokenreduction_zoo", lambda c: c.has("in/token_weight"))
def test_medoids(case: Case):
    s, x, weight = case.settings, case["in/x"], case["in/token_weight"].squeeze(2)
    check_settings(s, "cluster_num", "iterations")
    distances = squared_distances(x).sqrt()
    first = weight.topk(s["cluster_num"], dim=1).indices
    medoids = refine(distances, first, s["iterations"], weight)
    assert torch.equal(medoids, case["out/index_center"])
    assert torch.equal(clusters(distances, medoids), case["out/assignment"])
    close(torch.stack([row[i] for row, i in zip(x, medoids)]), case["out/x"], 1e-6)
