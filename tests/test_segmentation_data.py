"""Readers of segmentation data: every layout on tiny trees, and every fault of a file named."""

from __future__ import annotations

import os
import pickle
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenzoo.evaluation.segmentation.classes import colours, read_classes
from tokenzoo.evaluation.segmentation.data import KINDS, BrokenSample, open_dataset

SIZE = (6, 9)  # height, width


def picture(path: Path, seed: int = 0, size=SIZE, mode="RGB", **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return pixels


def mask(path: Path, values, size=SIZE, palette: bool = False) -> np.ndarray:
    """A PNG whose pixels run through the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.array(values, np.uint8), size)
    image = Image.fromarray(pixels)
    if palette:
        image = image.convert("P")
        image.putpalette([c for colour in colours(256) for c in colour])
        image.frombytes(pixels.tobytes())
    image.save(path)
    return pixels


def text(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def zero_reduced(pixels: np.ndarray) -> np.ndarray:
    return np.array([[255 if v in (0, 255) else v - 1 for v in row] for row in pixels.tolist()], np.uint8)


def zipped(folder: Path, archive: Path, *parts: str) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (not parts or path.relative_to(folder).parts[0] in parts):
                file.write(path, path.relative_to(folder))


@pytest.fixture
def ade(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    pixels = {}
    for split, names in (("training", ["ADE_train_1"]), ("validation", ["ADE_val_1", "ADE_val_2"])):
        for seed, name in enumerate(names):
            picture(base / "images" / split / f"{name}.jpg", seed)
            pixels[name] = mask(base / "annotations" / split / f"{name}.png", [0, 1, 150, 255, seed + 2])
    return tmp_path, pixels


@pytest.mark.parametrize("where", ["", "ADEChallengeData2016", "above", "data/ade above"])
def test_ade20k(ade, where, tmp_path):
    root, pixels = ade
    if "above" in where:
        inside = root / ("data/ade" if " " in where else "ade20k")
        inside.mkdir(parents=True)
        (root / "ADEChallengeData2016").rename(inside / "ADEChallengeData2016")
    else:
        root = root / where
    found = open_dataset(root, "ade20k")
    assert [sample.name for sample in found] == ["ADE_val_1", "ADE_val_2"] and len(found) == 2
    for sample in found:
        assert np.array_equal(sample.mask, zero_reduced(pixels[sample.name])) and sample.mask.dtype == np.uint8
        assert set(np.unique(sample.mask)) >= {0, 149, 255}
    assert found.num_classes == len(found.classes) == len(found.palette) == 150
    assert found.classes[0] == "wall" and found.classes[149] == "flag"
    assert [s.name for s in open_dataset(root, "ade20k", "train")] == ["ADE_train_1"]


@pytest.mark.parametrize("given", ["archive", "folder"])
def test_ade20k_zipped(ade, tmp_path, given):
    root, pixels = ade
    plain = list(open_dataset(root, "ade20k"))
    packed = tmp_path / "packed"
    packed.mkdir()
    zipped(root, packed / "ADEChallengeData2016.zip", "ADEChallengeData2016")
    found = open_dataset(packed / "ADEChallengeData2016.zip" if given == "archive" else packed, "ade20k")
    for one, other in zip(found, plain, strict=True):
        assert one.name == other.name and np.array_equal(one.mask, other.mask)
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    # readers in other processes open the archive anew, forked ones included
    assert np.array_equal(pickle.loads(pickle.dumps(found))[1].mask, plain[1].mask)
    context = get_context("fork")
    receive, send = context.Pipe()

    def child():
        send.send((found[1].mask, found.files.parts[0]._opened[0] == os.getpid()))

    worker = context.Process(target=child)
    worker.start()
    mask_there, opened_there = receive.recv()
    worker.join()
    # with the parent's file offset, readers would mix each other up
    assert np.array_equal(mask_there, plain[1].mask) and opened_there


CITY_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
            28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip


def city(root: Path, split: str, name: str, what: str, values, seed: int = 0) -> np.ndarray:
    picture(root / "leftImg8bit" / split / name.split("_")[0] / f"{name}_leftImg8bit.png", seed)
    return mask(root / "gtFine" / split / name.split("_")[0] / f"{name}_gtFine_{what}.png", values)


@pytest.mark.parametrize("packed", [False, True])
def test_cityscapes(tmp_path, packed):
    ids = city(tmp_path, "val", "bonn_000000_000019", "labelIds", range(35))
    train = city(tmp_path, "val", "ulm_000001_000019", "labelTrainIds", [*range(19), 255], seed=1)
    mask(tmp_path / "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png", [0])  # labelTrainIds go first
    mask(tmp_path / "gtFine/val/ulm/ulm_000001_000019_gtFine_instanceIds.png", [0])
    city(tmp_path, "train", "jena_000002_000019", "labelTrainIds", [3])
    root = tmp_path
    if packed:
        root = tmp_path / "packed"
        root.mkdir()
        for part in ("leftImg8bit", "gtFine"):
            zipped(tmp_path, root / f"{part}_trainvaltest.zip", part)
    found = open_dataset(root, "cityscapes")
    first, second = found
    assert (first.name, second.name) == ("bonn/bonn_000000_000019", "ulm/ulm_000001_000019")
    mapped = [[CITY_IDS.get(value, 255) for value in row] for row in ids.tolist()]
    assert first.mask.tolist() == mapped
    assert np.array_equal(second.mask, train)
    assert found.num_classes == 19 and found.classes[-1] == "bicycle" and found.palette[0] == (128, 64, 128)
    assert [s.name for s in open_dataset(root, "cityscapes", "train")] == ["jena/jena_000002_000019"]


@pytest.mark.parametrize("inside", ["", "VOCdevkit/VOC2010"])
def test_pascal_context(tmp_path, inside):
    base = tmp_path / inside
    pixels = {}
    for seed, name in enumerate(["2008_1", "2008_2", "2008_3"]):
        picture(base / "JPEGImages" / f"{name}.jpg", seed)
        pixels[name] = mask(base / "SegmentationClassContext" / f"{name}.png", [0, 1, 59, 255, seed])
    text(base / "ImageSets/SegmentationContext/val.txt", ["2008_3", "2008_1"])
    text(base / "ImageSets/SegmentationContext/train.txt", ["2008_2"])
    with_background, without = (open_dataset(tmp_path, f"pascal_context{n}") for n in (60, 59))
    assert [s.name for s in without] == ["2008_3", "2008_1"]
    for sample in with_background:
        assert np.array_equal(sample.mask, pixels[sample.name])
    for sample in without:
        assert np.array_equal(sample.mask, zero_reduced(pixels[sample.name]))
    assert with_background.classes == ["background", *without.classes]
    assert (with_background.num_classes, without.num_classes) == (60, 59)
    assert with_background.palette[0] == (0, 0, 0) and without.palette[0] != (0, 0, 0)
    assert [s.name for s in open_dataset(tmp_path, "pascal_context59", "train")] == ["2008_2"]


def test_voc2012_reads_indices_of_palette_files(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    picture(base / "JPEGImages/2007_1.jpg")
    pixels = mask(base / "SegmentationClass/2007_1.png", [0, 15, 20, 255], palette=True)
    text(base / "ImageSets/Segmentation/val.txt", ["2007_1"])
    (sample,) = open_dataset(tmp_path, "voc2012")
    assert Image.open(base / "SegmentationClass/2007_1.png").mode == "P"
    assert np.array_equal(sample.mask, pixels)


def test_coco_stuff_164k(tmp_path):
    for seed, name in enumerate(["000000000139", "000000000285"]):
        picture(tmp_path / f"images/val2017/{name}.jpg", seed)
        mask(tmp_path / f"annotations/val2017/{name}.png", [200])  # the other numbering is not read
        pixels = mask(tmp_path / f"annotations/val2017/{name}_labelTrainIds.png", [0, 170, 255, seed])
    found = open_dataset(tmp_path, "coco_stuff164k")
    assert [s.name for s in found] == ["000000000139", "000000000285"]
    assert np.array_equal(found[1].mask, pixels) and found.num_classes == len(found.classes) == 171


def test_coco_stuff_10k(tmp_path):
    for split, name in (("test", "COCO_1"), ("test", "COCO_2"), ("train", "COCO_3")):
        picture(tmp_path / f"images/{split}2014/{name}.jpg")
        pixels = mask(tmp_path / f"annotations/{split}2014/{name}_labelTrainIds.png", [0, 1, 171, 255])
    text(tmp_path / "imagesLists/test.txt", ["COCO_2"])
    text(tmp_path / "imagesLists/train.txt", ["COCO_3"])
    (sample,) = open_dataset(tmp_path, "coco_stuff10k")
    assert sample.name == "COCO_2" and np.array_equal(sample.mask, zero_reduced(pixels))
    assert [s.name for s in open_dataset(tmp_path, "coco_stuff10k", "train")] == ["COCO_3"]


# ---- plain folders


@pytest.fixture
def plain(tmp_path):
    for seed, name in enumerate(["b.jpg", "a.png", "sub/c.jpeg"]):
        picture(tmp_path / "images" / name, seed)
        mask(tmp_path / "masks" / Path(name).with_suffix(".png"), [0, 1, 2, 3, 255])
    text(tmp_path / "images/notes.txt", ["no image"])
    return tmp_path


def test_folder(plain):
    found = open_dataset(plain)
    assert [s.name for s in found] == ["a", "b", "sub/c"]
    assert found.num_classes is None and found.classes is None
    assert set(np.unique(found[0].mask)) == {0, 1, 2, 3, 255}
    assert set(np.unique(open_dataset(plain, ignore=3)[0].mask)) == {0, 1, 2, 255}
    assert set(np.unique(open_dataset(plain, ignore=[3, 1])[0].mask)) == {0, 2, 255}
    # values to ignore are those of the file, before the others move down
    assert set(np.unique(open_dataset(plain, ignore=3, zero_label=True)[0].mask)) == {0, 1, 255}
    assert open_dataset(plain, masks=False)[0].mask is None


@pytest.mark.parametrize("shape", ["{split}/{kind}", "{kind}/{split}"])
def test_folder_with_splits(tmp_path, shape):
    for split in ("train", "test"):
        picture(tmp_path / shape.format(split=split, kind="images") / f"{split}_1.jpg")
        mask(tmp_path / shape.format(split=split, kind="masks") / f"{split}_1.png", [0])
    assert [s.name for s in open_dataset(tmp_path, split="test")] == ["test_1"]


def test_classes_come_as_names_or_files(plain, tmp_path):
    text(tmp_path / "names.txt", ["sky", "road ", "tree", "car"])
    (tmp_path / "names.json").write_text('["sky", "road", "tree", "car"]')
    for given in (["sky", "road", "tree", "car"], tmp_path / "names.txt", str(tmp_path / "names.json")):
        found = open_dataset(plain, classes=given)
        assert found.classes == ["sky", "road", "tree", "car"] and found.num_classes == len(found.palette) == 4
    for content, wrong in (("a\n\nb\n", "empty name"), ("a\na\n", "twice")):
        (tmp_path / "bad.txt").write_text(content)
        with pytest.raises(ValueError, match=wrong):
            read_classes(tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="missing.txt does not exist"):
        open_dataset(plain, classes=tmp_path / "missing.txt")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a list of names"):
        open_dataset(plain, classes=tmp_path / "bad.json")


def test_pictures_become_rgb_and_are_not_rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    picture(tmp_path / "images/rotated.jpg", exif=exif)
    for mode in ("L", "RGBA", "P"):
        picture(tmp_path / f"images/{mode}.png", mode=mode)
    for name in ("rotated", "L", "RGBA", "P"):
        mask(tmp_path / f"masks/{name}.png", [0])
    for sample in open_dataset(tmp_path):
        assert sample.image.mode == "RGB" and sample.image.size == (SIZE[1], SIZE[0])


def test_sixteen_bits_are_read_and_large_values_refused(tmp_path):
    picture(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    for value in (7, 300):
        Image.fromarray(np.full(SIZE, value, np.uint16)).save(tmp_path / "masks/a.png")
        found = open_dataset(tmp_path)
        if value == 7:
            assert found[0].mask.dtype == np.uint8 and found[0].mask.max() == 7
        else:
            with pytest.raises(BrokenSample, match=r"a.png \(mode I;16\) holds values outside 0 to 255"):
                found[0]


def test_colours_are_those_of_voc():
    assert colours(5) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert len(set(colours(256))) == 256


# ---- faults


def test_faults_of_samples_are_named(plain):
    (plain / "masks/sub/c.png").unlink()
    picture(plain / "masks/b.png")
    (plain / "images/a.png").write_bytes(b"no image at all")
    found = open_dataset(plain)
    assert found.without_mask == ["sub/c"]
    for index, name, reason in (
        (0, "a", "images/a.png cannot be read .not an image in a format"),
        (1, "b", "masks/b.png has colours .mode RGB., not class indices"),
        (2, "sub/c", "images/sub/c.jpeg has no mask; expected images/"),
    ):
        with pytest.raises(BrokenSample, match=reason) as error:
            found[index]
        assert error.value.name == name and str(plain) in str(error.value)


@pytest.mark.parametrize("keep", [0.4, 0.7])
@pytest.mark.parametrize("what", ["images", "masks"])
def test_cut_off_files_are_named(plain, what, keep):
    path = plain / what / "a.png"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(BrokenSample, match=f"{what}/a.png cannot be read"):
        open_dataset(plain)[0]


def test_sizes_that_differ_are_named(plain):
    mask(plain / "masks/a.png", [0], size=(9, 6))
    with pytest.raises(BrokenSample, match="a.png is 9x6, its mask .*a.png is 6x9"):
        open_dataset(plain)[0]


def test_labels_above_the_class_count_are_named(plain, ade):
    with pytest.raises(BrokenSample, match="masks/a.png holds class 3, there are only 3"):
        open_dataset(plain, num_classes=3)[0]
    assert open_dataset(plain, num_classes=3, ignore=3)[0].mask is not None
    root, _ = ade
    mask(root / "ADEChallengeData2016/annotations/validation/ADE_val_1.png", [151])
    with pytest.raises(BrokenSample, match=r"class 150 \(value 151 in the file\), there are only 150"):
        open_dataset(root, "ade20k")[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_wrong_roots_say_what_is_expected(plain, kind):
    layout = KINDS[kind].layout.split("{")[0].split("/")[0]
    with pytest.raises(ValueError, match=f"is no {kind} data set with a split .*expected {layout}"):
        open_dataset(plain, kind)
    with pytest.raises(ValueError, match=f"missing does not exist; {kind} expects"):
        open_dataset(plain / "missing", kind)
    with pytest.raises(ValueError, match=f"{kind} has no split 'evening'; use one of"):
        open_dataset(plain, kind, "evening")
    with pytest.raises(ValueError, match="labels of its own"):
        (plain / "images/validation").mkdir()
        open_dataset(_empty(plain, kind), kind, ignore=3)


def _empty(root: Path, kind: str) -> Path:
    """A tree of this kind with one picture and no mask."""
    about, split = KINDS[kind], next(iter(KINDS[kind].splits.values()))
    base = root / kind
    for need in about.needs:
        (base / need.format(split)).mkdir(parents=True)
    place = about.needs[0].format(split)
    suffix = "_leftImg8bit.png" if kind == "cityscapes" else ".jpg"
    picture(base / place / f"x{suffix}")
    for listing in ("ImageSets/SegmentationContext/val.txt", "ImageSets/Segmentation/val.txt", "imagesLists/test.txt"):
        text(base / listing, ["x"])
    return base


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_masks_at_all(tmp_path, kind):
    if kind == "folder":
        picture(tmp_path / "folder/images/x.jpg")
        root = tmp_path / "folder"
    else:
        root = _empty(tmp_path, kind)
    with pytest.raises(ValueError, match="none of the 1 images in .* has a mask"):
        open_dataset(root, kind)
    assert open_dataset(root, kind, masks=False)[0].mask is None


def test_other_mistakes(plain, tmp_path):
    (tmp_path / "empty/images").mkdir(parents=True)
    for arguments, options, message in (
        ((tmp_path / "empty",), {}, "holds no images; folder expects images/"),
        ((plain, "folder", "evening"), {}, "holds no images of split 'evening'"),
        ((plain, "ade"), {}, "kind 'ade' is unknown; use one of folder, ade20k"),
        ((plain / "images/a.png",), {}, "is a file; expected images/"),
        ((plain,), {"ignore": 300}, "cannot hold"),
        ((plain,), {"num_classes": 0}, "give 1 to 255"),
        ((plain,), {"num_classes": 256}, "give 1 to 255"),
        ((plain,), {"num_classes": 3, "classes": ["a", "b"]}, "num_classes=3, but 2 classes are named"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(*arguments, **options)
    picture(plain / "images/a.jpg")
    with pytest.raises(ValueError, match="two images called a"):
        open_dataset(plain)
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="not a readable zip archive"):
        open_dataset(tmp_path / "ADEChallengeData2016.zip", "ade20k")


def test_a_listed_picture_that_is_missing_is_named(tmp_path):
    base = tmp_path / "VOC2012"
    picture(base / "JPEGImages/1.jpg")
    for name in "12":
        mask(base / f"SegmentationClass/{name}.png", [0])
    text(base / "ImageSets/Segmentation/val.txt", ["1", "2"])
    found = open_dataset(tmp_path, "voc2012")
    with pytest.raises(BrokenSample, match="JPEGImages/2.jpg cannot be read .FileNotFoundError"):
        found[1]
    assert found.sizes()[1][0] is None and found.sizes()[0][0] > 0
    (base / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(ValueError, match="holds no ImageSets/Segmentation/val.txt, the list of images"):
        open_dataset(base, "voc2012")
