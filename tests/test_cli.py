"""The commands list, show and export, called in this process; the help of all of them."""

import json
import re
import shlex
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import ROOT

import tokenzoo
from tokenzoo.cli import COMMANDS, build_parser, main
from tokenzoo.cli.common import runs_of
from tokenzoo.training.options import options_of

TINY = shlex.split(
    "--model vit_tiny_patch16_224 --num-classes 5 --device cpu --model-kwargs depth=2 embed_dim=32 num_heads=2"
)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, two of them with the same stem, one in a subfolder."""
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "sub/b.jpeg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    example = import_module(f"tokenzoo.cli.{command}_command").EXAMPLE
    assert f"example:\n  {example}" in capsys.readouterr().out
    program, *words = shlex.split(example)
    args = build_parser().parse_args(words)
    assert program == "tokenzoo" and args.command == command
    if command == "train":
        monkeypatch.chdir(ROOT)
        assert options_of(vars(args)).method["method"] == "evit"
    elif command not in ("list", "vlm") and hasattr(args, "method"):
        for run in runs_of(args):  # names and options of methods are checked as the command would
            assert run.method is None or run.recipe().methods


def test_completion_and_version(capsys):
    """Scripts for every shell that knows the commands; `--version` is the package's."""
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        assert {"serve", "tune"} <= set(re.findall(r"\w+", capsys.readouterr().out)), shell
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"tokenzoo {tokenzoo.__version__}\n"


def test_list(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in tokenzoo.list_methods():
        cls = tokenzoo.core.registry.method_class(name)
        assert any(line.split()[:1] == [name] and cls.kind in line for line in out.splitlines())
        assert cls.source in out
    for family, classes in tokenzoo.list_backbones().items():
        assert f"{family}: {', '.join(classes)}" in out


def test_list_json(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in listed["methods"]] == tokenzoo.list_methods()
    assert {b["family"]: b["classes"] for b in listed["backbones"]} == tokenzoo.list_backbones()
    for method in listed["methods"]:
        assert method["summary"].endswith(".") and method["summary"].count(". ") == 0 and method["kind"]


@pytest.mark.parametrize("name", tokenzoo.list_methods())
def test_list_one_method(name, capsys):
    assert main(["list", name]) == 0
    out = capsys.readouterr().out
    cls = tokenzoo.core.registry.method_class(name)
    assert cls.__doc__.splitlines()[0] in out
    assert main(["list", name, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert list(described["options"]) == list(cls.options())
    for option, value in described["options"].items():
        assert f"  {option} = {json.dumps(value)}" in out.splitlines()


def test_list_unknown_method(capsys):
    assert main(["list", "tone"]) == 2
    assert "tokenzoo list: method 'tone' is unknown; did you mean 'tome'?" in capsys.readouterr().err


def test_show_one_picture(folder, tmp_path, capsys):
    words = ["show", *TINY, "--method", "tome", "r=8", "--images", str(folder / "a.jpg")]
    assert main([*words, "--output", str(tmp_path / "map.png")]) == 0
    out = capsys.readouterr().out
    assert "weights are random" in out and str(tmp_path / "map.png") in out
    with Image.open(tmp_path / "map.png") as drawn:
        one_row = drawn.size
    # a folder instead of a file, the panels below each other, and a grid that is not square
    words += ["--columns", "1", "--img-size", "96", "128"]
    assert main([*words, "--output", str(tmp_path / "maps")]) == 0
    assert names(tmp_path / "maps") == ["a.png"]
    with Image.open(tmp_path / "maps" / "a.png") as drawn:
        assert drawn.height > 3 * 192 > one_row[1] and one_row[0] > 3 * 256 > drawn.width


def test_show_a_folder(folder, tmp_path):
    words = ["show", *TINY, "--img-size", "64", "--method", "evit", "keep_rate=0.5", "layers=[1]"]
    assert main([*words, "--images", str(folder), "--output", str(tmp_path / "maps")]) == 0
    assert names(tmp_path / "maps") == ["a.jpg.png", "a.png.png", "sub/b.png"]


def test_show_grey_pictures(folder, tmp_path):
    words = ["show", *TINY, "in_chans=1", "--img-size", "64", "--method", "topk", "layers=[1]"]
    words += ["--mean", "0.5", "--std", "0.5"]
    assert main([*words, "--images", str(folder / "a.png"), "--output", str(tmp_path / "map.png")]) == 0
    with Image.open(tmp_path / "map.png") as drawn:
        left = np.asarray(drawn).astype(int)[60:300, 12:200]
    assert np.ptp(left, axis=2).max() == 0 and left.std() > 5, "the image is there, and grey"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images", "in/none", "--output", "maps"], "--images in/none does not exist"),
        (["--images", "in/empty", "--output", "maps"], "--images in/empty holds no images"),
        (["--images", "in", "--output", "map.png"], "is one file, in holds 3 images; give a folder"),
        (["--images", "in/a.jpg", "--output", "map.jpg"], "map.jpg is neither a .png file nor a folder"),
        (["--images", "in/a.png", "--output", "in"], "would replace the image in/a.png"),
        (["--images", "in", "--output", "maps", "--columns", "0"], "--columns 0 is not positive"),
        (["--images", "in", "--output", "maps", "--method", "topk"], "2 were given; give one --method"),
        (
            ["--images", "in", "--output", "maps", "--img-size", "64", "--method-kwargs", "r=99"],
            "r=99 cannot be reached",
        ),
    ],
)
def test_show_refuses(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder.parent)
    (folder / "empty").mkdir()
    before = names(folder.parent)
    assert main(["show", *TINY, "--method", "tome", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenzoo show: ") and message in error and error.count("\n") == 1
    assert names(folder.parent) == before


def test_show_truncated_picture(folder, tmp_path, capsys):
    whole = (folder / "a.jpg").read_bytes()
    (folder / "sub" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    words = ["show", *TINY, "--img-size", "64", "--method", "tome", "r=1", "--images", str(folder)]
    words += ["--output", str(tmp_path / "maps")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"image {folder / 'sub' / 'cut.jpg'} cannot be read" in error and "--skip-broken" in error
    assert main([*words, "--skip-broken"]) == 0
    out = capsys.readouterr().out
    assert "skipped 1 broken images:" in out and "cut.jpg" in out
    assert names(tmp_path / "maps") == ["a.jpg.png", "a.png.png", "sub/b.png"]
    only = ["--images", str(folder / "sub" / "cut.jpg"), "--skip-broken"]
    assert main([*words, *only]) == 2
    assert "none of the 1 images" in capsys.readouterr().err


def test_export(tmp_path, capsys):
    path = tmp_path / "model.pt2"
    words = ["export", *TINY, "--img-size", "32", "48", "--method", "tome", "r=1", "--output", str(path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{path}: vit_tiny_patch16_224, tome r=1, any batch size" in out and "at batch sizes 2 and 1" in out
    assert torch.export.load(path).module()(torch.zeros(3, 3, 32, 48)).shape == (3, 5)


def test_export_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    words = ["export", *TINY, "--img-size", "64", "--method", "topk", "layers=[1]", "--output", str(path)]
    assert main([*words, "--static-batch", "--batch-size", "1"]) == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((1, 3, 64, 64), dtype=np.float32)})[0].shape == (1, 5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--method", "tome", "--output", "model.pb"], "model.pb does not end in .pt2 or .onnx"),
        (["--method", "tome", "--output", "none/model.pt2"], "the folder none does not exist"),
        (["--method", "ats", "layers=[1]", "--output", "model.onnx"], "ats keeps as many tokens as the images ask for"),
        (["--method", "tome", "--method", "evit", "--output", "model.pt2"], "2 were given; give one --method"),
        (["--method", "tome", "--batch-size", "0", "--output", "model.pt2"], "--batch-size 0 is not positive"),
        (["--method", "tome", "q=1", "--output", "model.pt2"], "tome has no option 'q'"),
    ],
)
def test_export_refuses(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenzoo export: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_export_leaves_no_file_that_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["export", *TINY, "--img-size", "32", "--method", "topk", "layers=[1]", "--output", "model.pt2"]
    assert main([*words, "--atol", "-1"]) == 2
    assert "model.pt2 was not kept" in capsys.readouterr().err and not list(tmp_path.iterdir())
