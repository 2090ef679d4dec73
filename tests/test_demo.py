"""The demo: its checkpoint, its table, its pictures."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenzoo

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("digits")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def demo(digits):
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def data(digits):
    return digits.load_digits()


def test_split_is_stratified_and_disjoint(digits, data):
    assert data.train_images.shape == (1437, 1, 40, 40) and data.test_images.shape == (360, 1, 40, 40)
    share = data.test_labels.bincount() / (data.train_labels.bincount() + data.test_labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    apart = torch.cdist(data.test_images.flatten(1), data.train_images.flatten(1))
    assert apart.min() > 0.1  # no test image among those trained on
    again = digits.load_digits()
    assert all(torch.equal(one, other) for one, other in zip(data, again))


def test_checkpoint_is_small_and_as_accurate_as_it_says(digits, data):
    assert digits.CHECKPOINT.stat().st_size <= 1_000_000
    model, about = digits.load_checkpoint()  # strict
    assert about["architecture"] == digits.ARCHITECTURE
    assert about["split"] == {"test_images": digits.TEST_IMAGES, "stratified": True, "seed": digits.SPLIT_SEED}
    accuracy = digits.accuracy(model, data.test_images, data.test_labels)
    assert accuracy >= 0.95
    assert accuracy == pytest.approx(about["test_accuracy"], abs=1e-6)
    assert f"{100 * accuracy:.2f} %" in (EXAMPLES / "digits_vit.md").read_text()


def test_checkpoint_comes_from_the_training_script(digits):
    training = importlib.import_module("train_digits")
    assert digits.load_checkpoint()[1]["recipe"] == training.RECIPE


def test_training_makes_a_checkpoint(digits, data, tmp_path, monkeypatch):
    training = importlib.import_module("train_digits")
    quick = {**training.RECIPE, "epochs": 2, "tuned_epochs": 1, "batch_size": 8}
    monkeypatch.setattr(training, "RECIPE", quick)
    few = digits.Digits(*(part[:32] for part in data))
    model = training.train(few)
    digits.save_checkpoint(model, {"architecture": digits.ARCHITECTURE}, tmp_path / "few.safetensors")
    loaded, _ = digits.load_checkpoint(tmp_path / "few.safetensors")
    with torch.no_grad():
        images = digits.normalize(data.test_images[:2])
        assert torch.allclose(loaded(images), model(images), atol=0.05)


def test_table_rows(demo, digits, data):
    model, _ = digits.load_checkpoint()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(digits.normalize(data.test_images[:40]), data.test_labels[:40])]
    rows = demo.measure(model, ["tome", "topk"], (0.6,), batches, rounds=1)
    assert [row["method"] for row in rows] == ["unpatched", "tome", "topk"]
    for row in rows[1:]:
        assert row["gmacs"] / rows[0]["gmacs"] == pytest.approx(0.6, abs=0.02)
        assert row["speedup"] > 0 and row["tokens_out"] < rows[0]["tokens_out"]
        assert row["diff_top1"] == pytest.approx(row["top1"] - rows[0]["top1"], abs=1e-3)
        assert len(demo.line(row)) == len(demo.HEADER)
    assert any("At 60% of the multiply-adds" in text for text in demo.summary(rows))
    assert not tokenzoo.is_patched(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_method_without_strength_is_named_and_left_out(demo, digits, data, capsys):
    model, _ = digits.load_checkpoint()
    batches = [(digits.normalize(data.test_images[:4]), data.test_labels[:4])]
    rows = demo.measure(model, ["tome", "no_such_method"], (0.6,), batches, rounds=1)
    assert [row["method"] for row in rows] == ["unpatched", "tome"]
    assert "left out: no_such_method at 60%: method 'no_such_method' is unknown" in capsys.readouterr().out


def test_demo_writes_what_it_names(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path), "--methods", "uniform", "--rounds", "1"])
    threads = torch.get_num_threads()
    try:
        demo.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    written = sorted(path.name for path in tmp_path.iterdir())
    maps = [f"token_maps_{method}.png" for method in demo.MAPPED]
    of_scenes = ["scenes_table.csv", "scenes_curve.png", "scenes.png"]
    assert written == sorted(["table.csv", "curve.png", "speed.png", *maps, *of_scenes])
    assert all(str(tmp_path / name) in out for name in written)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["unpatched", *["uniform"] * len(demo.SHARES)]
    with (tmp_path / "scenes_table.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"unpatched", "uniform"}
    for name in [*maps, "scenes.png"]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400


def test_scenes_come_from_their_digits(demo, data):
    scenes = importlib.import_module("scenes")
    rng = torch.Generator().manual_seed(0)
    picture, mask = scenes.draw_scene(data.test_images[:3], data.test_labels[:3], rng)
    assert picture.shape == (64, 64, 3) and picture.dtype == mask.dtype == torch.uint8 and mask.shape == (64, 64)
    assert set(mask.unique().tolist()) <= {0, *(1 + int(label) for label in data.test_labels[:3])}
    ink = mask > 0
    assert picture[ink].float().mean() > picture[~ink].float().mean() + 50
    again = scenes.draw_scene(data.test_images[:3], data.test_labels[:3], torch.Generator().manual_seed(0))
    assert torch.equal(again[0], picture) and torch.equal(again[1], mask)


def test_scenes_model_is_as_accurate_as_its_card_says(demo, tmp_path):
    from tokenzoo.dense import load_segmenter
    from tokenzoo.evaluation.segmentation.data import open_dataset
    from tokenzoo.training.segmentation.augment import Gallery
    from tokenzoo.training.segmentation.train import evaluate_whole

    scenes = importlib.import_module("scenes")
    assert scenes.CHECKPOINT.stat().st_size <= 1_000_000
    scenes.write_scenes(tmp_path, "test", scenes.TEST, seed=1)
    found = evaluate_whole(load_segmenter(scenes.CHECKPOINT), Gallery(open_dataset(tmp_path, classes=scenes.CLASSES)))
    assert f"{100 * float(found.miou):.1f} %" in (EXAMPLES / "scenes_vit.md").read_text()


def test_scenes_model_starts_from_the_digit_reader(demo, digits):
    training = importlib.import_module("train_scenes")
    reader, _ = digits.load_checkpoint()
    encoder = training.build().encoder
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, reader.blocks[3].mlp.fc1.weight)
    grey = torch.rand(1, 1, 4, 4)
    one, three = reader.patch_embed.proj(grey), encoder.patch_embed.proj(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
