"""GTP against the published implementation."""

import timm
import torch
from goldens import Case, cases, check_settings, close
from torch import Tensor

import tokenzoo
from tokenzoo.adapters.vit.attention import attention_heads, attention_output
from tokenzoo.core.fusing import mean_of_rest
from tokenzoo.core.map_scores import SELECTIONS, map_scores
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import KeepMap, PropagateMap
from tokenzoo.ops.attention import attend, key_bias
from tokenzoo.ops.graph import degrees, links, most_alike
from tokenzoo.ops.map_reading import MapStatistics, attend_sparsely


def outputs(case: Case) -> list[str]:
    """Names below `out/`."""
    return sorted({key.split("/")[0] for key in case.part("out")})


def with_class(patches: Tensor, prefix: int) -> Tensor:
    """Patch numbers as token numbers, the class token in front."""
    return torch.cat([torch.zeros(len(patches), prefix, dtype=torch.int64), patches + prefix], dim=1)


@cases("gtp", lambda c: c.has("in/attn"))
def test_selection(case: Case):
    s, attn = case.settings, case["in/attn"]
    check_settings(s, "num_prop", "cls_token")
    prefix, patches = int(s["cls_token"]), attn.shape[2] - int(s["cls_token"])
    for name in outputs(case):
        assert name in SELECTIONS
        found = attn if name.startswith("CosSim") else attn[:, :, 0] if name.startswith("CLS") else None
        scores = map_scores(name, MapStatistics.of_rows(attn) if found is None else found, prefix)
        order = scores.argsort(dim=1, descending=True) + prefix
        assert torch.equal(order[:, : patches - s["num_prop"]], case[f"out/{name}/index_kept"])
        assert torch.equal(order[:, patches - s["num_prop"] :], case[f"out/{name}/index_prop"])


@cases("gtp", lambda c: c.has("out/Spatial") or c.has("out/Semantic") or c.has("out/Mixed"))
def test_graph(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "num_neighbours", "class_token", "grid")
    prefix, grid = int(s["class_token"]), (s["grid"], s["grid"])
    alike = most_alike(x[:, prefix:], s["num_neighbours"] + 1 - prefix)
    place = torch.arange(s["grid"] ** 2).expand(len(x), -1)
    for name in outputs(case):
        lists, spatial = None if name == "Spatial" else alike, name != "Semantic"
        degree = degrees(place, grid, spatial, lists)
        close(links(place, place, (degree, degree), grid[1], spatial, lists), case[f"out/{name}"], 1e-5)


@cases("gtp", lambda c: c.has("in/index_prop"))
def test_propagation(case: Case):
    s, x, graph = case.settings, case["in/x"], case["in/graph"]
    check_settings(s, "num_prop", "cls_token", "alpha", "token_scales")
    prefix, stay, going = int(s["cls_token"]), case["in/index_kept"] - 1, case["in/index_prop"] - 1
    if not s["cls_token"]:
        stay, going = stay + 1, going + 1
    weight = torch.stack([one[i][:, j] for one, i, j in zip(graph, stay, going)])
    idx = with_class(stay, prefix)
    spread = PropagateMap(
        idx, x.shape[1], going + prefix, torch.nn.functional.pad(s["alpha"] * weight, (0, 0, prefix, 0))
    )
    tokens = Tokens(x, Layout(prefix, prefix == 1, (1, x.shape[1] - prefix)))
    kept = KeepMap(idx, x.shape[1])
    maps = {"None": kept, "Mean": mean_of_rest(kept, tokens), "GraphProp": spread}
    for name in outputs(case):
        close(maps[name].apply(x), case[f"out/{name}/x"], 1e-5)
        if case.has(f"out/{name}/token_scales"):
            scales = spread.mass(case["in/token_scales"].unsqueeze(2), len(x), x.device)
            close(scales.squeeze(2), case[f"out/{name}/token_scales"], 1e-5)
        if case.has(f"out/{name}/graph"):
            kept = torch.stack([one[i][:, i] for one, i in zip(graph, stay)])
            close(kept, case[f"out/{name}/graph"], 1e-5)


@cases("gtp", lambda c: c.has("out/attn"))
def test_sparse_attention(case: Case):
    s, x = case.settings, case["in/x"]
    check_settings(s, "heads", "sparsity", "token_scales")
    attn = timm.layers.Attention(x.shape[2], s["heads"], qkv_bias=True)
    attn.load_state_dict(case.part("in/weights"))
    heads = attention_heads(attn.eval(), x)
    bias = key_bias(case["in/token_scales"].unsqueeze(2), None) if s["token_scales"] else None
    if s["sparsity"] < 1:
        out, seen = attend_sparsely(heads, bias, s["sparsity"])
        close(seen.rows, case["out/attn"], 1e-5)
    else:
        out = attend(heads, bias)
    close(attention_output(attn, out, x), case["out/x"], 1e-5)


@cases("gtp", lambda c: c.has("logits"))
def test_model(case: Case):
    s, x, model = case.settings, case.input(len(case["logits"])), case.model()
    check_settings(
        s, "selection", "propagation", "num_neighbours", "graph_type", "num_prop", "sparsity", "alpha", "token_scale"
    )
    tokenzoo.patch_model(
        model, "gtp", r=s["num_prop"], selection=s["selection"], sparsity=s["sparsity"], alpha=s["alpha"],
        propagation={"GraphProp": "graph", "Mean": "mean", "None": "none"}[s["propagation"]],
        graph=s.get("graph_type", "Mixed").lower(), neighbours=s.get("num_neighbours", 8),
        token_scale=s["token_scale"],
    )  # fmt: skip
    with torch.no_grad():
        # recorded float32 and float64 differ by as much as the metadata say
        close(model(x), case["logits"], max(1e-5, 3 * s.get("fp64_diff", 0)))
        expected = case["features"]
        close(model.forward_tokens(x).x[: len(expected)], expected, 5e-5)
    counts = tokenzoo.report(model, tuple(x.shape[-2:])).rows
    assert [row.tokens_out for row in counts if row.block is not None] == case["token_counts"].tolist()
