"""`tokenzoo segment predict`: files, their content, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.cli.segment_predict import _clusters
from tokenzoo.dense import create_segmenter, save_segmenter
from tokenzoo.dense.segmenter import pad_to_patches
from tokenzoo.evaluation.runs import shared_copy
from tokenzoo.evaluation.segmentation.classes import ADE20K, CITYSCAPES, CITYSCAPES_COLOURS
from tokenzoo.evaluation.segmentation.inference import Predictor
from tokenzoo.evaluation.segmentation.kinds import KINDS
from tokenzoo.evaluation.segmentation.overlay import class_colours, differences, overlay, with_legend

CLASSES = ["sky", "road", "car"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = create_segmenter("vit_tiny_patch16_224", 3, "linear", options, classes=CLASSES).eval()
    save_segmenter(model, tmp_path / "model.safetensors", half=False)
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (32, 32)), ("b", (27, 45))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    return tmp_path, model


def predict(folder, *more, source="in"):
    out = folder / "out"
    words = ["--checkpoint", str(folder / "model.safetensors"), "--input", str(folder / source), "--output", str(out)]
    return main(["segment", "predict", *words, *more]), out


def indices(path):
    return np.asarray(Image.open(path))


def test_files_and_their_content(folder):
    folder, model = folder
    status, out = predict(folder)
    assert status == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.index.png", "a.overlay.png", "b.index.png", "b.overlay.png"]
    for name in ("a", "b"):
        picture = np.array(Image.open(folder / "in" / f"{name}.png"))
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            expected = model((pixels - 127.5) / 127.5).argmax(1)[0].numpy()
        found = Image.open(out / f"{name}.index.png")
        assert found.mode == "P" and (np.asarray(found) == expected).all()
        colours = np.array(found.getpalette(), np.uint8).reshape(-1, 3)[:3]
        assert (colours == class_colours(3)).all()
        drawn = np.asarray(Image.open(out / f"{name}.overlay.png"))
        high, wide = expected.shape
        assert drawn.shape[0] > high and drawn.shape[1] >= wide  # the legend is below
        mixed = 0.45 * picture + 0.55 * colours[expected]
        assert np.abs(drawn[:high, :wide] - mixed).max() <= 0.51


def test_zero_reduction_changes_nothing_and_the_panel_says_so(folder):
    folder, _ = folder
    predict(folder)
    plain = [indices(folder / "out" / f"{name}.index.png") for name in ("a", "b")]
    assert predict(folder, "--method", "tome", "r=0", "--compare")[0] == 0
    assert all((a == indices(folder / "out" / f"{n}.index.png")).all() for a, n in zip(plain, ("a", "b")))


def test_the_panel_has_four_parts(folder):
    folder, _ = folder
    source = folder / "large" / "c.png"
    source.parent.mkdir()
    picture = np.random.default_rng(1).integers(0, 255, (90, 250, 3), dtype=np.uint8)
    Image.fromarray(picture).save(source)
    before = indices(predict(folder, source="large")[1] / "c.index.png")
    assert predict(folder, "--method", "cluster", "layers=0", "scale=0.5", "--compare", source="large")[0] == 0
    after = indices(folder / "out" / "c.index.png")
    assert 0 < (before != after).mean() < 1
    panel = np.asarray(Image.open(folder / "out" / "c.compare.png"))
    palette, top, step = class_colours(3), 20, 258
    assert panel.shape[1] == 4 * step - 8 and panel.shape[0] > 90 + top
    parts = [panel[top : top + 90, i * step : i * step + 250] for i in range(4)]
    assert (parts[0] == np.asarray(overlay(Image.fromarray(picture), before, palette))).all()
    assert (parts[1] == np.asarray(overlay(Image.fromarray(picture), after, palette))).all()
    assert (parts[2] == np.asarray(differences(Image.fromarray(picture), before, after, palette))).all()
    # clusters: the inside of a patch is its group's mean colour, and some patches share one
    inside = parts[3].reshape(90, 250, 3)[4::8, 4::8]
    assert inside.shape[:2] == (11, 31) and len(np.unique(inside.reshape(-1, 3), axis=0)) <= 11 * 31 - 100
    assert all((panel[2:14, i * step : i * step + 60] < 128).any() for i in range(4))  # titles


@pytest.mark.parametrize("pad", ["right", "center"])
def test_clusters_are_those_of_the_class_map(folder, pad):
    """Patches that share a token have the same scores, so they are one colour in the panel's fourth part."""
    model = folder[1]
    model.pad = pad
    own = tokenzoo.patch_model(shared_copy(model), "tome", r=4)
    predictor = Predictor(own, model.mean, model.std)
    picture = Image.open(folder[0] / "in" / "b.png")
    drawn = np.asarray(_clusters(predictor, picture))
    assert drawn.shape == (27, 45, 3)
    padded, (top, left) = pad_to_patches(predictor.normalised(predictor.inference.resized(picture)), 8, pad)
    with torch.no_grad():
        scores = own.class_maps(padded)[0].flatten(1).T
    colours, labels = {}, {}
    for row in range(4):
        for column in range(6):
            y, x = 8 * row + 4 - top, 8 * column + 4 - left
            if y < 27 and x < 45:
                colours[row, column], labels[row, column] = tuple(drawn[y, x]), scores[6 * row + column]
    cells = list(colours)
    pairs = [(a, b) for i, a in enumerate(cells) for b in cells[i + 1 :]]
    shared = [pair for pair in pairs if colours[pair[0]] == colours[pair[1]]]
    assert len(shared) > 4
    assert all(torch.equal(labels[a], labels[b]) == ((a, b) in shared) for a, b in pairs)


def test_known_classes_have_their_own_colours():
    assert tuple(class_colours(19, CITYSCAPES)[0]) == CITYSCAPES_COLOURS[0]
    assert tuple(class_colours(len(KINDS["voc2012"].classes), KINDS["voc2012"].classes)[0]) == (
        0,
        0,
        0,
    )  # its background
    assert class_colours(150, ADE20K).any(1).all() and len(np.unique(class_colours(255), axis=0)) == 255


def test_a_legend_needs_room():
    picture, palette = Image.new("RGB", (20, 20)), class_colours(2)
    drawn = with_legend(picture, np.array([[0, 1]]), palette, ["a name that is much wider than it", "b"])
    assert drawn.width > 150 and drawn.height >= 20 + 2 * 16
    only = np.asarray(with_legend(picture, np.array([[1]]), palette, ["a", "b"]))[20:]
    assert (only == palette[1]).all(2).any() and not (only == palette[0]).all(2).any()


def test_a_method_with_a_way_back(folder, tmp_path):
    folder, _ = folder
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method:\n- {method: cluster, layers: 0, scale: 0.5}\n- {method: reconstruct, layers: maps}\n")
    status, out = predict(folder, "--method", str(recipe), "--compare")
    assert status == 0 and indices(out / "b.index.png").shape == (27, 45)


def test_differences_are_where_classes_differ():
    picture = Image.fromarray(np.full((4, 6, 3), 100, np.uint8))
    first, second = np.zeros((4, 6), np.uint8), np.zeros((4, 6), np.uint8)
    second[1, 2] = 1
    palette = class_colours(2)
    drawn = np.asarray(differences(picture, first, second, palette))
    changed = (drawn != 100 // 2 + 64).any(2)
    assert changed.sum() == 1 and (drawn[1, 2] == palette[1]).all()
    assert (np.asarray(overlay(picture, second, palette, alpha=1.0))[1, 2] == palette[1]).all()


@pytest.mark.parametrize("words,message", [
    (["--compare"], "--compare needs a --method"),
    (["--method", "tome", "r=1", "--method", "topk"], "2 methods are given"),
])  # fmt: skip
def test_refused(folder, capsys, words, message):
    assert predict(folder[0], *words)[0] == 2
    assert message in capsys.readouterr().err


def test_pictures_that_cannot_be_read(folder, capsys):
    folder, _ = folder
    (folder / "in" / "c.png").write_bytes(b"no image")
    assert predict(folder)[0] == 2
    assert "c.png is not a readable image" in capsys.readouterr().err
    status, out = predict(folder, "--skip-broken")
    assert status == 0 and "left out" in capsys.readouterr().out and (out / "a.index.png").exists()
    (folder / "empty").mkdir()
    assert predict(folder, source="empty")[0] == 2
    assert "holds no images" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(folder / "in" / "a.jpg")
    assert predict(folder)[0] == 2
    assert "two images called a" in capsys.readouterr().err


def test_nothing_readable_is_no_success(folder, capsys):
    folder, _ = folder
    (folder / "bad").mkdir()
    (folder / "bad" / "c.png").write_bytes((folder / "in" / "a.png").read_bytes()[:200])  # cut off
    assert predict(folder, "--skip-broken", source="bad")[0] == 2
    assert "none of the 1 images" in capsys.readouterr().err
    assert predict(folder, source="missing")[0] == 2
    assert "missing holds no images" in capsys.readouterr().err


def test_output_that_cannot_be_used(folder, capsys):
    folder, _ = folder
    words = ["segment", "predict", "--checkpoint", str(folder / "model.safetensors"), "--input", str(folder / "in")]
    for output, message in (("in/a.png", "is a file"), ("in", "is where the images are")):
        assert main([*words, "--output", str(folder / output)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in (folder / "in").iterdir()) == ["a.png", "b.png"]


def test_scores_that_are_no_numbers_are_told(folder, capsys):
    folder, model = folder
    with torch.no_grad():
        model.decoder.head.bias[0] = float("nan")
    save_segmenter(model, folder / "model.safetensors", half=False)
    assert predict(folder, source="in/a.png")[0] == 0
    assert "a.png: some class scores are infinite or no numbers" in capsys.readouterr().out


def test_pictures_of_more_than_8_bits_are_named(folder, capsys):
    """Cut off at 255 they would be white, and their class maps about nothing."""
    folder, _ = folder
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(folder / "in" / "deep.png")
    assert predict(folder)[0] == 2
    assert "deep.png holds pixels of more than 8 bits (Pillow's mode I;16)" in capsys.readouterr().err
    status, out = predict(folder, "--skip-broken")
    assert status == 0 and not (out / "deep.index.png").exists() and (out / "a.index.png").exists()
