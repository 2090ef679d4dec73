"""DiffRate against the published implementation."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from goldens import Case, below, cases, check_settings, close

import tokenzoo
from tokenzoo.core.tokens import trace_assign
from tokenzoo.layers.rates import LearnedCount
from tokenzoo.maps import PartialMap
from tokenzoo.ops.matching.ranked import ranked_partners

CONFIGS = Path(__file__).parents[1] / "configs" / "diffrate"
MODELS = {
    "deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224", "deit_base": "deit_base_patch16_224",
    "mae_base": "vit_base_patch16_224.mae", "mae_large": "vit_large_patch16_224.mae",
    "mae_huge": "vit_huge_patch14_224.mae",
}  # fmt: skip


@cases("diffrate", lambda c: c.has("out/similarity"))
def test_merging(case: Case):
    """Tokens are sorted already: the first ones stay."""
    s = case.settings
    check_settings(s, "kept_number", "class_token")
    x, prefix, kept = case["in/x"], int(s["class_token"]), s["kept_number"]
    batch, n = x.shape[:2]
    scores = -torch.arange(n - prefix).float().expand(batch, -1)
    units = F.normalize(x[:, prefix:], dim=-1)
    order, partner, cosine = ranked_partners(scores, units, n - prefix, kept - prefix)
    close(cosine, case["out/similarity"], 1e-5)
    part = torch.cat([torch.ones(batch, kept), cosine], dim=1).unsqueeze(-1)
    at = torch.arange(n).expand(batch, -1)
    merge = PartialMap(at[:, :kept], at[:, kept:], partner + prefix, n, part)
    close(merge.apply(x), case["out/x"], 1e-5)
    close(merge.mass(case["in/size"], batch, x.device), case["out/size"], 1e-5)


@cases("diffrate", lambda c: c.has("logits"))
def test_model(case: Case):
    s = case.settings
    check_settings(s, "prune_kept_num", "merge_kept_num")
    x, model = case.input(len(case["logits"])), case.model()
    n = 1 + model.patch_embed.num_patches
    options = {"prune": s["prune_kept_num"], "merge": s["merge_kept_num"]}
    tokenzoo.patch_model(model, "diffrate", **options)
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
        close(model(x), case["logits"], 1e-5)
    source = case["source"]
    assign = trace_assign(tokens.trace, len(x), n, x.device)[: len(source)]
    found = (assign.unsqueeze(1) == torch.arange(tokens.length).view(1, -1, 1)).long()
    size, expected = tokens.sizes(), case["size"]
    if not tokens.trace or tokens.trace[-1].block < len(model.blocks) - 1:  # theirs sorts where nothing goes, too
        assert set(map(tuple, found.flatten(0, 1).tolist())) == set(map(tuple, source.flatten(0, 1).tolist()))
        size, expected = size.sort(1)[0], expected.sort(1)[0]
    else:
        assert torch.equal(found, source)
    close(size, expected, 1e-5)
    rows = [row for row in tokenzoo.report(model, tuple(x.shape[-2:])).rows if row.block is not None]
    assert [row.tokens_out for row in rows] == case["token_counts"].tolist()
    if case.has("flops"):  # theirs: attention at the length that enters, the MLP at that which leaves
        dim, classes = model.embed_dim, model.num_classes
        flops = n * dim * model.patch_embed.proj.weight[0].numel() + dim * classes
        for row in rows:
            flops += 4 * row.tokens_in * dim**2 + 2 * row.tokens_in**2 * dim + 8 * row.tokens_out * dim**2
        assert float(case["flops"]) == pytest.approx(flops, rel=1e-6)


def schedules(case: Case) -> dict[float, tuple[list[int], list[int]]]:
    """Published counts (after pruning, after merging) of a model by GMACs."""
    given = below(case.file, f"{case.name}/")
    budgets = {key.split("/")[0] for key in given}
    counts = {b: [given.get(f"{b}/{w}_kept_num") for w in ("prune", "merge")] for b in budgets}
    return {float(b): tuple(None if c is None else c.tolist() for c in both) for b, both in counts.items()}


def configured(model: str) -> dict[float, tuple[list[int], list[int]]]:
    """The same of a model's configuration, comments included."""
    text = (CONFIGS / f"{model}.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^# ([\d.]+) GMACs:\n(?:# )?prune: (.*)\n(?:# )?merge: (.*)$", text, re.MULTILINE)
    return {float(budget): (yaml.safe_load(prune), yaml.safe_load(merge)) for budget, prune, merge in found}


@cases("diffrate", lambda c: bool(c.matching(r".*merge_kept_num")) and not c.has("logits"))
def test_published_schedules(case: Case):
    """They cost what they are named after, and stand in the model's configuration."""
    found = schedules(case)
    assert found
    if case.name not in MODELS:  # merged alone, in a model that the library does not serve
        assert all(prune is None for prune, _ in found.values())
        return
    with torch.device("meta"):
        model = timm.create_model(MODELS[case.name].split(".")[0])
    for budget, (prune, merge) in found.items():
        with tokenzoo.patched(model, "diffrate", prune=prune, merge=merge):
            assert tokenzoo.report(model).total / 1e9 == pytest.approx(budget, rel=0.03, abs=0.06)
    config = configured(MODELS[case.name])
    both = set(config) & set(found)
    assert both and {b: config[b] for b in both} == {b: found[b] for b in both}


@cases("diffrate", lambda c: c.has("in/selected_probability"))
def test_search(case: Case):
    """Learned counts: what stays, with which probability, and the masks; the class token always does."""
    s = case.settings
    check_settings(s, "patch_number", "granularity", "class_token", "token_number")
    count, prefix = LearnedCount(s["patch_number"], s["granularity"]), int(s["class_token"])
    assert torch.equal(count.kept_token_candidate, case["in/candidates"])
    count.load_state_dict(
        {"selected_probability": case["in/selected_probability"], "kept_token_candidate": case["in/candidates"]}
    )
    assert int(count.kept()) + prefix == int(case["out/kept_token_number"])
    for found, name in (
        (count.survival(), "token_probability"),
        (count.mask(s["patch_number"]), "mask"),
        (count.mask(s["token_number"] - prefix), "mask_from_token_number"),
    ):
        close(F.pad(found, (prefix, 0), value=1.0), case[f"out/{name}"], 1e-5)
