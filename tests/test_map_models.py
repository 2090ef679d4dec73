"""Models whose output is a map (SAM's image encoders) in bench, report, show and evaluation."""

import json

import pytest
import torch
from PIL import Image
from test_sam import CLUSTER, micro

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.evaluation import Run, bench, evaluate
from tokenzoo.models import SViT
from tokenzoo.view.maps import token_maps

RECIPES = ([CLUSTER], [CLUSTER, {"method": "reconstruct", "k": 4, "layers": 2}], [CLUSTER, "reconstruct"])
# tiny, by its registered name
MODEL = ["--model", "samvit_base_patch16", "--img-size", "64", "--model-kwargs", "depth=4", "embed_dim=32"]
MODEL += ["num_heads=2", "window_size=2", "neck_chans=16", "global_pool=''", "global_attn_indexes=[1,3]"]
METHOD = ["--method", "cluster", "layers=1", "grid=[1,2]"]


@pytest.mark.parametrize("options", [{"num_classes": 0, "global_pool": ""}, {}])
def test_measured_as_other_models_are(options):
    """Speed, costs and tokens; all of the map reaches the head, whatever happened inside the windows."""
    model = micro((60, 80), **options)
    runs = [Run(recipe) for recipe in RECIPES]
    results = bench(model, runs, batch_size=2, rounds=1, warmup=1, latency=False, input_size=(3, 60, 80))
    assert [r.tokens_out for r in results] == [300.0] * 4
    assert all(r.gmacs < results[0].gmacs for r in results[1:]) and results[0].step_times
    with tokenzoo.patched(model, RECIPES[0]):
        report = tokenzoo.report(model, (60, 80))
        assert report.tokens_out == 300 and results[1].gmacs == pytest.approx(report.total / 1e9)


@torch.no_grad()
def test_agreement_place_by_place():
    model = micro((60, 80), num_classes=0, global_pool="")
    batches = [(torch.randn(n, 3, 60, 80, generator=torch.manual_seed(n)), torch.zeros(n).long()) for n in (2, 1)]
    same = Run([{"method": "cluster", "layers": 1, "grid": (5, 5)}])
    plain, cluster, whole = evaluate(model, [Run([CLUSTER]), same], batches, input_size=(3, 60, 80))
    share = []
    for images, _ in batches:
        before = model(images).argmax(1)
        with tokenzoo.patched(model, [CLUSTER]):
            share += (model(images).argmax(1) == before).flatten(1).double().mean(1).tolist()
    assert cluster.agreement == pytest.approx(100 * sum(share) / 3) and 0 < cluster.agreement < 100
    assert plain.agreement == whole.agreement == 100 and plain.n_images == 3 and plain.tokens_out == 300
    assert cluster.top1 is cluster.top5 is cluster.diff_top1 is None and cluster.row()["top1"] is None
    # with classes it is an accuracy like any other
    scores = evaluate(micro((60, 80)), [Run([CLUSTER])], batches, input_size=(3, 60, 80))
    assert all(r.top1 is not None and r.tokens_out == 300 for r in scores)


def test_maps_that_differ_in_size_and_lists_of_tokens_are_refused():
    svit = SViT(
        embed_dim=(8, 12, 16, 24), depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4), stoken_size=(4, 2, 1, 1),
        projection=32, num_classes=0, global_pool="", img_size=128,
    ).eval()  # fmt: skip
    batch = [(torch.randn(2, 3, 128, 128), torch.zeros(2).long())]
    with pytest.raises(ValueError, match="tome r=2: a map of .* dense=True"):
        evaluate(svit, [Run("tome", {"r": 2})], batch)
    assert evaluate(svit, [Run("tome", {"r": 2, "dense": True})], batch)[1].agreement > 0
    from cases import VIT

    with pytest.raises(ValueError, match="answers with tokens .* pooling and classes"):
        evaluate(VIT(num_classes=0, global_pool="").eval(), [], [(torch.randn(1, 3, 32, 32), torch.zeros(1).long())])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [(80, 80), (44, 72)])
@torch.no_grad()
def test_token_maps_are_those_of_every_window(size, recipe):
    """Against a loop over windows; what the map of the whole does is what the maps inside do."""
    model, x = micro(size), torch.randn(2, 3, *size, generator=torch.manual_seed(3))
    tokenzoo.patch_model(model, recipe)
    shrunken = max(model.walk(x), key=lambda state: len(state.trace))
    tokens = max(model.walk_tokens(x), key=lambda t: len(t.trace))
    (step,), (inside,) = tokens.trace, shrunken.trace
    high, wide = size[0] // 4, size[1] // 4
    rows, columns = -(-high // 5), -(-wide // 5)
    assign = step.map.assign.unflatten(1, (high, wide))
    for image in range(2):
        for row in range(high):
            for column in range(wide):
                window = (image * rows + row // 5) * columns + column // 5
                cell = int(inside.map.assign[window, row % 5 * 5 + column % 5])
                place = (row // 5 * 3 + cell // 3) * columns * 3 + column // 5 * 3 + cell % 3
                assert assign[image, row, column] == place
    before = torch.randn(2, high * wide, 6)
    torch.testing.assert_close(step.map.matrix().float() @ before, step.map.apply(before), atol=1e-5, rtol=1e-5)
    ones = torch.ones(2, high * wide, 1)
    torch.testing.assert_close(step.map.pool(ones).sum(1), ones.sum(1), atol=1e-3, rtol=1e-4)
    assert step.map.lift(step.map.apply(before)).shape == before.shape
    real = step.map.heads >= 0
    assert real.all() == (size == (80, 80)) and step.map.heads.max() < high * wide
    maps = token_maps(model, x)
    assert maps.grid == (high, wide) and torch.equal(maps.blocks[0].assign, step.map.assign)
    assert maps.blocks[0].tokens_out.tolist() == [rows * columns * 9] * 2


def test_commands(tmp_path, capsys):
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(2):
            color = tuple(torch.randint(256, (3,), generator=torch.manual_seed(number)).tolist())
            Image.new("RGB", (64, 64), color).save(tmp_path / "data" / label / f"{number}.png")
    speed, found, drawn = tmp_path / "speed.json", tmp_path / "found.json", tmp_path / "drawn.png"
    common = [*MODEL, *METHOD, "--device", "cpu", "--no-progress", "-b", "2"]
    assert not main(["bench", *common, "--num-bench-iter", "1", "--num-warm-iter", "1", "--results-file", str(speed)])
    rows = json.loads(speed.read_text())["results"]
    assert [row["tokens_out"] for row in rows] == [16.0, 16.0]
    data = ["--data-dir", str(tmp_path / "data"), "-j", "0", "--results-file", str(found)]
    assert not main(["eval", *common, *data])
    rows = json.loads(found.read_text())["results"]
    assert rows[0]["agreement"] == 100 and rows[1]["top1"] is None and rows[1]["n_images"] == 4
    picture = str(tmp_path / "data" / "a" / "0.png")
    assert not main(["show", *MODEL, *METHOD, "--device", "cpu", "--images", picture, "--output", str(drawn)])
    assert Image.open(drawn).width > 64 and "drawn.png" in capsys.readouterr().out
