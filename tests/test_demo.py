"""The demo: its photographs, its checkpoint, its tables, its images, its page."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenzoo

EXAMPLES = Path(__file__).parents[1] / "examples"
VOID = {"meta", "img", "br", "link", "hr"}


@pytest.fixture(scope="module")
def photos():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("photos")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def demo(photos):
    return importlib.import_module("demo")


def test_training_looks_at_no_pixel_of_a_test_tile(photos):
    rng = np.random.default_rng(0)
    for index, photo in enumerate(photos.load_photos()):
        tiles = photos.test_tiles(index, photo.size)
        seen = np.zeros(photo.size[::-1], dtype=bool)
        for tile in tiles:
            seen[tile.top : tile.bottom, tile.left : tile.right] = True
        assert seen.mean() == pytest.approx(1 / photos.TILES, abs=0.01)
        for _ in range(20):
            box = photos.draw_box(index, "train", rng)
            assert not seen[box.top : box.bottom, box.left : box.right].any()
            box = photos.draw_box(index, "test", rng)
            assert seen[box.top : box.bottom, box.left : box.right].all() and box.right - box.left >= 64


def test_crops_are_the_same_every_time(photos):
    one, other = photos.draw_crops(24, "test", seed=1), photos.draw_crops(24, "test", seed=1)
    assert torch.equal(one.pixels, other.pixels) and one.pixels.shape == (24, 96, 96, 3)
    assert one.labels.bincount().tolist() == [2] * len(photos.PHOTOS)
    assert photos.normalize(one.pixels).min() >= -1 and photos.normalize(one.pixels).max() <= 1


def test_mosaics_come_from_their_photographs(photos, monkeypatch):
    monkeypatch.setattr(photos, "draw_crop", lambda index, part, rng: np.full((96, 96, 3), 10 * index, np.uint8))
    for seed in range(3):
        pixels, mask = photos.draw_mosaic("test", np.random.default_rng(seed))
        assert 3 <= len(np.unique(mask)) <= 5 and mask.shape == (96, 96)
        assert (pixels == 10 * mask[..., None]).all()


def test_checkpoint_is_small_and_as_good_as_its_card_says(photos, tmp_path):
    from tokenzoo.evaluation.segmentation.data import open_dataset
    from tokenzoo.evaluation.segmentation.evaluate import evaluate_segmentation

    assert photos.CHECKPOINT.stat().st_size <= 4_000_000
    assert photos.CLASSES == tuple(name for name, *_ in photos.PHOTOS)
    about, card = photos.load_about(), (EXAMPLES / "photos_vit.md").read_text()
    assert about["architecture"] == photos.ARCHITECTURE and tuple(about["classes"]) == photos.CLASSES
    model = photos.load_classifier()
    found = photos.accuracy(model, photos.draw_crops(600, "test", seed=1))
    assert found == pytest.approx(about["test_accuracy"], abs=2e-3)
    assert f"{100 * about['test_accuracy']:.2f} %" in card and f"{100 * about['train_accuracy']:.2f} %" in card
    photos.write_mosaics(tmp_path, 40, "test", seed=1)
    data = open_dataset(tmp_path, classes=list(photos.CLASSES))
    (base,) = evaluate_segmentation(photos.load_mosaic_model(), [], data, resamples=2).results
    (said,) = re.findall(r"([\d.]+) % mIoU", card)
    assert base.miou.mean == pytest.approx(float(said), abs=0.2)  # argmaxima of pixels follow the rounding


def test_both_models_share_an_encoder(photos):
    reader, mosaics = photos.load_classifier(), photos.load_mosaic_model()
    large = photos.load_classifier(192)
    for name, value in mosaics.encoder.state_dict().items():
        assert torch.equal(reader.state_dict()[name], value), name
        assert name == "pos_embed" or torch.equal(large.state_dict()[name], value), name
    assert large.pos_embed.shape[1] == 1 + 24 * 24


def test_checkpoint_comes_from_the_training_script(photos, tmp_path, monkeypatch):
    training = importlib.import_module("train_photos")
    assert photos.load_about()["recipe"] == training.RECIPE
    monkeypatch.setattr(training, "RECIPE", {**training.RECIPE, "crops": 2, "mosaics": 2})
    weights = training.train(2)
    assert all(torch.equal(value, training.train(2)[name]) for name, value in weights.items())
    photos.save_checkpoint(weights, {"some": "facts"}, tmp_path / "few.safetensors")
    assert photos.load_about(tmp_path / "few.safetensors") == {"some": "facts"}
    reader = photos.load_classifier(path=tmp_path / "few.safetensors")
    torch.testing.assert_close(reader.head.weight, weights["head.weight"], atol=1e-3, rtol=0)
    photos.load_mosaic_model(tmp_path / "few.safetensors")  # strict


def test_table_rows(demo, photos):
    model, data = photos.load_classifier(), photos.draw_crops(24, "test", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(photos.normalize(data.pixels), data.labels)]
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


def test_method_without_strength_is_named_and_left_out(demo, photos, capsys):
    data = photos.draw_crops(12, "test", seed=1)
    batches = [(photos.normalize(data.pixels), data.labels)]
    rows = demo.measure(photos.load_classifier(), ["tome", "no_such_method"], (0.6,), batches, rounds=1)
    assert [row["method"] for row in rows] == ["unpatched", "tome"]
    assert "left out: no_such_method at 60%: method 'no_such_method' is unknown" in capsys.readouterr().out


class Page(HTMLParser):
    """Tags of a page: open ones closed in order, images with what they need, and what else is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.loaded, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        self.loaded += [value for name, value in attrs.items() if name in ("src", "srcset", "data", "poster")]
        self.loaded += [attrs["href"]] if tag == "link" else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_demo_writes_what_it_names(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CROPS", 24)
    monkeypatch.setattr(demo.demo_mosaics.run, "__defaults__", (4, 1))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path), "--methods", "uniform", "--rounds", "1"])
    threads = torch.get_num_threads()
    try:
        demo.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    written = sorted(path.name for path in tmp_path.iterdir())
    maps, of_mosaics = ["token_maps.png", "token_maps_uniform.png"], ["mosaics_table.csv", "mosaics_curve.png"]
    images = ["photos.png", "curve.png", "speed.png", "mosaics.png", *maps]
    assert written == sorted(["index.html", "table.csv", *images, *of_mosaics])
    assert all(str(tmp_path / name) in out for name in written)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["unpatched", *["uniform"] * len(demo.SHARES)]
    with (tmp_path / "mosaics_table.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"unpatched", "uniform"}
    for name in images:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300 and picture.height > 200

    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and text.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in text
    assert len(page.images) == len(images) + 1  # and the curve of the mosaics
    assert all(len(image["alt"]) > 20 and int(image["width"]) > 300 for image in page.images)
    assert page.loaded and all(value.startswith("data:image/") for value in page.loaded)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert [link[1:] for link in page.links] == page.ids and len(set(page.ids)) == len(page.ids)
    assert all(f"{float(row['top1']):.2f}</td>" in text for row in rows)


def test_the_page_escapes_what_it_is_given(demo):
    html = demo.demo_report.page("a < b", ["1 & 2"], {"x": ("<h>", [demo.demo_report.table("c", ["<"], [["&"]])])})
    assert "a &lt; b" in html and "1 &amp; 2" in html and "&lt;h&gt;" in html and "<td>&amp;</td>" in html
    assert Page(html).open == []
