"""R-MeeTo against the published implementation."""

import ast
import re
from types import SimpleNamespace

import torch
from goldens import Case, cases, check_settings, close
from test_golden_vision_mamba import build

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.rmeeto import RMeeTo
from tokenzoo.ops.scan_order import from_scan, to_scan


@cases("r_meeto", lambda c: c.has("metric"))
def test_merge(case: Case):
    number = r"(\d+)"
    text = case.words
    found = re.fullmatch(rf"tokens={number} class position={number} r={number} (\{{.*\}})", text)
    n, row, r = map(int, found.groups()[:3])
    s = ast.literal_eval(found.group(4))
    check_settings(s, "if_order", "if_prune", "distance")
    assert (n, row, r) == (case["x"].shape[1], int(case["token_position"]), int(case["r"]))
    method = RMeeTo(
        ordered=s["if_order"],
        prune=s.get("if_prune", False),
        distance=s.get("distance", "cosine"),
        clip=True,
        released=True,
    )
    x, residual, metric, size = (from_scan(case[key], (row,)) for key in ("x", "residual", "metric", "size"))
    layout = Layout(1, False, (1, n - 1), track_size=True, track_positions=True, scan_rows=(row,))
    tokens = Tokens(x, layout, size=size)
    step = Step(method, 0, r)
    token_map = method.map(tokens, SimpleNamespace(hidden=metric), step)
    if r == 0:
        assert token_map is None
        outputs = {"x": x, "residual": residual, "size": size}
        source, rows = torch.eye(n).expand(len(x), -1, -1), (row,)
    else:
        outputs = {"x": token_map.apply(x), "residual": token_map.apply(residual), "size": token_map.pool(size)}
        source, rows = token_map.membership(), method.scan_rows(tokens, token_map, step)
    assert rows == (int(case["output/token_position"]),)
    for key, value in outputs.items():
        close(to_scan(value, rows), case[f"output/{key}"], 1e-5)
    # both axes of the map go to the order of the scan
    source = to_scan(to_scan(source, rows).transpose(1, 2), (row,)).transpose(1, 2)
    assert torch.equal(source, case["output/source"])
    assert set(case.part("output")) == {*outputs, "source", "token_position"}


def counts(s, target, length, depth):
    """Patches to remove in front of every block, as the released code chooses them."""
    removed = {}
    for block in range(s["merge_interval"], depth, s["merge_interval"]):
        r = length - target if depth - block <= s["merge_interval"] else s["num_prune"]
        removed[block] = max(0, min(r, (length - 1) // 2))
        length -= removed[block]
    return removed


@cases("r_meeto", lambda c: c.has("output/logits"))
def test_model(case: Case):
    text = case.words
    found = re.fullmatch(r"(\{.*\}) target tokens at the last merging block = 197-11\*compare = (\d+)", text)
    s, target = ast.literal_eval(found.group(1)), int(found.group(2))
    check_settings(s, "num_prune", "metric", "merge_interval", "compare", "if_order", "if_prune")
    assert target == 197 - 11 * s["compare"]
    model, x = build(case.fixture()), case.input(len(case["output/logits"]))
    depth = len(model.layers)
    removed = counts(s, target, model.pos_embed.shape[1], depth)
    method = RMeeTo(
        r=tuple(removed.values()),
        interval=s["merge_interval"],
        metric={"X": "hidden"}.get(s["metric"], s["metric"]),
        ordered=s["if_order"],
        prune=s.get("if_prune", False),
        released=True,
    )
    assert method.default_layers(depth) == tuple(block - 1 for block in removed)
    tokenzoo.patch_model(model, method)
    with torch.no_grad():
        close(model(x), case["output/logits"])
        # the tokens that a block mixes are those that the block before leaves
        states = list(model.walk(x))[:-1]
    assert [tokens.length for tokens in states] == case["output/token_counts_after_block"].tolist()
    rows = [tokens.layout.scan_rows if tokens.rows is None else tokens.rows for tokens in states]
    assert [row for (row,) in rows] == case["output/token_position_after_block"].tolist()
    last = states[-1]
    close(to_scan(last.sizes(), rows[-1]).expand(len(x), -1, -1), case["output/size_last"], 1e-6)
    assert set(case.part("output")) == {"logits", "token_counts_after_block", "token_position_after_block", "size_last"}
    report = tokenzoo.report(model)
    assert [row.tokens_in for row in report.rows if row.block is not None] == [t.length for t in states]
