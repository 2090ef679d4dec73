"""The scripts behind the dense tables: turns that resume, heads that learn, counts, decoder, places of labels."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from training_data import ROOT

import tokenzoo


@pytest.fixture(scope="module")
def scripts():
    folder = str(ROOT / "benchmarks" / "segmentation")
    sys.path.insert(0, folder)
    import camvid_heads
    import camvid_table
    import dense_runs
    import plot_dense
    import saliency_agreement

    yield SimpleNamespace(
        runs=dense_runs, heads=camvid_heads, table=camvid_table, plot=plot_dense, saliency=saliency_agreement
    )
    sys.path.remove(folder)


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", img_size=(32, 40), **options).eval().requires_grad_(False)


def test_turns_resume_and_pair_with_the_unpatched_run_before(scripts, tmp_path):
    names, state, calls = [f"m{i}" for i in range(25)], tmp_path / "state.jsonl", []

    def work(name: str, image: str) -> dict[str, int]:
        calls.append((name, image))
        return {"call": len(calls)}

    assert list(scripts.runs.take_turns(["a", "b"], names, state, work)) == ["a", "b"]
    assert list(scripts.runs.take_turns(["a", "b", "c"], names, state, work)) == ["c"]
    per_image = [[name for name, image in calls if image == which] for which in "abc"]
    assert all(sorted(set(own)) == sorted([*names, "unpatched"]) and own.count("unpatched") == 3 for own in per_image)
    assert per_image[0][1] != per_image[1][1]  # another start for every image
    lines = scripts.runs.read_state(state, names)
    for name in names:
        for values, before in scripts.runs.by_setting(lines, name):
            between = calls[before["call"] - 1 : values["call"] - 1]
            assert [n for n, _ in between].count("unpatched") == 1 and between[0][0] == "unpatched"
    assert scripts.runs.read_state(state, names[:-1]) == lines
    with pytest.raises(ValueError, match="other settings"):
        scripts.runs.read_state(state, [*names, "another"])


def test_a_head_learns_what_is_linear_in_the_features(scripts):
    torch.manual_seed(0)
    truth = torch.randint(0, 11, (32, 4, 5))
    features = torch.nn.functional.one_hot(truth.flatten(1), 24).half()
    labels = truth.to(torch.uint8).clone()
    labels[:, 0] = 255
    head = scripts.heads.build_head("linear", 24)
    losses = scripts.heads.train_head(head, features, labels, (4, 5), epochs=60, lr=0.1)
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(head(features.float()).argmax(2).unflatten(1, (4, 5))[:, 1:], truth[:, 1:])


def test_strengths_are_reached_once_each(scripts, model, monkeypatch):
    monkeypatch.setattr(tokenzoo, "list_methods", lambda: ["cts", "famba", "reconstruct", "tome", "topk"])
    found = scripts.runs.at_shares(model, [0.8, 0.6, 0.4], {})
    assert {s.method for s in found} == {"tome", "topk"}  # the others refuse it
    models = scripts.runs.patched_copies(model, found)
    for method in {s.method for s in found}:
        totals = [tokenzoo.report(models[s.name]).total for s in found if s.method == method]
        assert totals == sorted(set(totals), reverse=True) and len(totals) <= 3
    assert [s.share for s in found if s.method == "topk"] == [0.8, 0.6, 0.4]


def test_counts_of_the_unpatched_model_and_the_summary(scripts, model, tmp_path):
    rng = np.random.default_rng(0)
    frames = []
    for index in range(3):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
        mask = rng.integers(0, 11, (30, 40), dtype=np.uint8)
        mask[0] = 255
        frames.append(scripts.heads.Frame(str(index), path, mask))
    heads = {kind: scripts.heads.build_head(kind, 24).eval().requires_grad_(False) for kind in ("linear", "mask")}
    settings = [s for s in scripts.table.one_place(model, 20.0) if s.name.startswith("one third: cluster")]
    models = scripts.runs.patched_copies(model, settings)
    card = scripts.runs.CARDS["vit_tiny_tin200"]
    work, names, state = scripts.table.Work(models, heads, frames, card), [s.name for s in settings], tmp_path / "s"
    assert len(list(scripts.runs.take_turns(["0", "1", "2"], names, state, work))) == 3
    lines = scripts.runs.read_state(state, names)
    for values, _ in scripts.runs.by_setting(lines, "unpatched"):
        area = np.array(values["linear"]["area"])
        assert area[1].sum() == area[2].sum() == 29 * 40 == values["linear"]["same"]
    row = scripts.table.summarize(lines, names[0], "mask")
    assert row["images"] == 3 and 0 < row["agreement"] <= 100 and set(row["iou"]) == set(scripts.heads.CLASSES)
    same = scripts.table.summarize(lines, "unpatched", "mask")
    assert same["diff"] == same["diff_se"] == 0 and same["agreement"] == 100 and same["time_ratio"] == 1
    assert json.loads(state.read_text().splitlines()[0])["names"] == names


def test_the_saliency_decoder_and_its_agreement(scripts):
    decoder = scripts.saliency.SaliencyDecoder(16).eval()
    keys = {k.split(".")[0] for k in decoder.state_dict()}
    assert keys == {"upconv1", "upconv2", "upconv3", "bn1", "bn2", "bn3", "final_conv"}
    x = torch.randn(1, 16, 3, 3)
    with torch.no_grad():
        saliency = decoder(x, (42, 42))
    assert saliency.shape == (1, 1, 42, 42) and 0 < saliency.min() and saliency.max() < 1
    features = x.flatten(2).transpose(1, 2)
    same = scripts.saliency.agreement(features, saliency, (features, saliency))
    assert same["cosine"] == pytest.approx(1) and same["mae"] == 0 and same["iou"] == 1
    other = scripts.saliency.agreement(-features, 1 - saliency, (features, saliency))
    assert other["cosine"] == pytest.approx(-1) and other["corr"] == pytest.approx(-1) and other["iou"] < 0.01


def test_labels_keep_their_order_and_a_gap(scripts):
    wanted = [0.0, 5.0, 0.1, 0.05, 9.0, 9.0]
    places = scripts.plot.spread(wanted, 1.0)
    ordered = places[np.argsort(wanted, kind="stable")]
    assert np.all(np.diff(ordered) >= 1 - 1e-9)
    assert places[1] == 5 and np.allclose(scripts.plot.spread([0.0, 3.0], 1.0), [0, 3])
    assert places[[0, 2, 3]].mean() == pytest.approx(0.05)
