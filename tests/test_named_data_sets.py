"""Data sets of other libraries through timm (hfds/, hfids/, tfds/, wds/): trained on where installed, else refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
from test_train_imagenet import main, result_of, same  # noqa: F401 (main is a fixture)
from training_data import draw, words

from tokenzoo.evaluation import open_pictures

OLD = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 20)


@pytest.mark.parametrize(
    "dataset, library, package",
    [
        ("hfds/some", "datasets", "datasets"),
        ("HFIDS/some", "datasets", "datasets"),
        ("tfds/some", "tensorflow", "tensorflow"),
        ("wds/some", "webdataset", "'tokenzoo[wds]'"),
    ],
)
def test_a_missing_library_is_named(main, tmp_path, capsys, monkeypatch, dataset, library, package):  # noqa: F811
    monkeypatch.setitem(sys.modules, library, None)
    more = ["--dataset", dataset, "--num-classes", "4", "--train-split", "train-{0..1}.tar|8"]
    assert main(words(tmp_path, tmp_path / "run", *more)) == 2
    prefix = dataset.partition("/")[0].lower()
    expected = f"--dataset {prefix}/ needs {library}; pip install {package}"
    assert capsys.readouterr().err == f"train_imagenet.py: {expected}\n"
    with pytest.raises(ImportError) as caught:
        open_pictures(tmp_path, dataset, "val")
    assert str(caught.value) == expected


# ---- Hugging Face data sets, without a network


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """train/ and val/ of four classes, the library's cache beside it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    return draw(tmp_path / "pictures", 4, 3)


def skip_new() -> None:
    if OLD and int(pytest.importorskip("datasets").__version__.partition(".")[0]) >= 4:
        pytest.skip("streams of this timm need datasets<4")


def named(folder: Path, output: Path, prefix: str, *more: str) -> list[str]:
    cache = str(folder.parent / "cache")
    return words(folder, output, "--dataset", f"{prefix}/{folder}", "--data-dir", cache, "-b", "4", *more)


def test_hugging_face_table(main, folder, tmp_path, capsys):  # noqa: F811
    """The pictures of the folder, in the same order: the same weights."""
    assert main(words(folder, tmp_path / "a", "-b", "4", "--epochs", "1")) == 0
    one = result_of(capsys.readouterr().out)
    assert main(named(folder, tmp_path / "b", "hfds", "--epochs", "1")) == 0
    two = result_of(capsys.readouterr().out)
    same(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    assert one["eval_top1"] == two["eval_top1"] and one["eval_loss"] == two["eval_loss"]
    for more, expected in (
        (["--val-split", "nothing"], "split 'nothing', could not be opened"),
        (["--num-classes", "3"], "--num-classes 3, but the images have 4 classes"),
        (["--dataset", f"hfds/{tmp_path}/none"], "could not be opened"),
    ):
        assert main(named(folder, tmp_path / "c", "hfds", "--epochs", "1", *more)) == 2
        assert expected in capsys.readouterr().err


def break_two(folder: Path) -> set[str]:
    paths = [folder / "train" / "class_1" / "0.png", folder / "train" / "class_2" / "2.png"]
    paths[0].write_bytes(b"no image")
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    return {str(path) for path in paths}


@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_broken_pictures_are_named_and_counted(main, folder, tmp_path, capsys, prefix):  # noqa: F811
    if prefix == "hfids":
        skip_new()
    paths = break_two(folder)
    more = ["--epochs", "2"]
    if prefix == "hfids":
        more += ["--train-num-samples", "12", "--num-classes", "4"]
    assert main(named(folder, tmp_path / "run", prefix, *more)) == 0
    result = result_of(capsys.readouterr().out)
    assert result["n_broken"] == 2 and set(result["broken"]) == paths and result["epoch"] == 1


def test_broken_pictures_inside_tables_are_told_apart(main, folder, tmp_path, capsys):  # noqa: F811
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": int(path.parent.name[-1])}
        for path in sorted(folder.glob("train/*/*.png"))
    ]
    for place in (0, 3):
        rows[place]["image"]["bytes"] = b"no image"
    names = datasets.ClassLabel(names=[f"class_{i}" for i in range(4)])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names})
    table = tmp_path / "table"
    table.mkdir()
    content = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    parquet.write_table(content, table / "train.parquet")
    assert main(named(table, tmp_path / "run", "hfds", "--epochs", "1", "--val-split", "")) == 0
    assert set(result_of(capsys.readouterr().out)["broken"]) == {"0.png, number 0", "0.png, number 3"}


def test_hugging_face_stream(main, folder, tmp_path, capsys):  # noqa: F811
    skip_new()
    more = ["--num-classes", "4", "--epochs", "1"]
    assert main(named(folder, tmp_path / "a", "hfids", *more)) == 2
    assert "--train-num-samples" in capsys.readouterr().err
    more += ["--train-num-samples", "12"]
    assert main(named(folder, tmp_path / "b", "hfids", *more, "--workers", "2")) == 2
    assert "1 shards cannot be spread over 2 readers" in capsys.readouterr().err
    assert main(named(folder, tmp_path / "c", "hfids", *more, "--workers", "1", "--recovery-interval", "1")) == 0
    assert result_of(capsys.readouterr().out)["n_broken"] == 0
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "whole.safetensors")
    for path in (tmp_path / "c").glob("checkpoint-00001-*.pt"):
        path.unlink()
    assert (
        main(named(folder, tmp_path / "c", "hfids", *more, "--workers", "1", "--recovery-interval", "1", "--resume"))
        == 0
    )
    same(tmp_path / "whole.safetensors", tmp_path / "c" / "model.safetensors")
