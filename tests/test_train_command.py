"""`tokenzoo train` and its front train_imagenet.py: one parser, one run, one record."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_train_imagenet import data, main, result_of, same  # noqa: F401 (main and data are fixtures)
from training_data import ROOT, words

from tokenzoo import load, save
from tokenzoo.cli import build_parser
from tokenzoo.cli import main as tokenzoo
from tokenzoo.evaluation.runs import Run
from tokenzoo.training.options import build_parser as every_option
from tokenzoo.training.options import options_of, parse_options

CONFIG = "configs/evit/deit_small_patch16_224_train.yaml"
LINES = [
    f"-c {CONFIG} --data-dir x --output y",
    f"--data-dir x --epochs 2 --output y -c {CONFIG} --amp --method-kwargs keep_rate=0.5 layers=[1,2]",
    f"-c {CONFIG} --data-dir x --output y --method tome --method-kwargs --opt-betas 0.9 0.99 --val-split ''",
    "-m vit_tiny_patch16_224 --data-dir x --output y --method tome --flops 0.6 --kd-model-name unpatched -b 4 -j 0",
]


@pytest.mark.parametrize("line", LINES)
def test_command_and_front_read_the_same(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = build_parser().parse_args(["train", *shlex.split(line)])
    options = options_of(vars(given))
    assert vars(options) == vars(parse_options(shlex.split(line)))
    assert set(vars(options)) == set(vars(every_option().parse_args([])))  # neither more nor less


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: vit_tiny_patch16_224\nepochs: 7\namp: true\nlr: 5e-4\ndata_dir: x\noutput: y\n")
    options = parse_options(["--epochs", "30", "-c", str(file)])  # 30 is the default, and given all the same
    assert (options.epochs, options.amp, options.lr, options.seed) == (30, True, 5e-4, 42)


@pytest.mark.parametrize("main_of", ["command", "front"])
def test_shortened_flags_are_refused(main, main_of, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        (main if main_of == "front" else lambda argv: tokenzoo(["train", *argv]))(["--outp", "y"])
    assert stop.value.code == 2 and "--outp" in capsys.readouterr().err


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        tokenzoo(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = {flag for action in every_option()._actions for flag in action.option_strings}
    assert len(flags) > 80 and all(flag in text for flag in flags)


def test_both_train_the_same_model(main, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    more = ["--epochs", "1", "--method", "evit"]
    assert main(words(data, tmp_path / "front", *more)) == 0
    front = result_of(capsys.readouterr().out)
    argv = ["train", *words(data, tmp_path / "command", *more)]
    monkeypatch.setattr(sys, "argv", ["tokenzoo", *argv])
    assert tokenzoo(argv) == 0
    command = result_of(capsys.readouterr().out)
    same(tmp_path / "front" / "model.safetensors", tmp_path / "command" / "model.safetensors")
    for result in (front, command):
        assert result["environment"]["command"].startswith("tokenzoo train --model vit_tiny_patch16_224 ")
    apart = {"seconds", "images_per_second", "environment"}
    assert {k: v for k, v in front.items() if k not in apart} == {k: v for k, v in command.items() if k not in apart}
    recipes = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("front", "command")]
    assert recipes[0] == recipes[1]
    # and the command goes on with what the front began
    assert main(words(data, tmp_path / "front", *more, "--epochs", "1", "--resume")) == 0
    assert tokenzoo(["train", *words(data, tmp_path / "front", *more, "--resume")]) == 0


def test_errors_name_the_command(capsys):
    assert tokenzoo(["train", "--data-dir", "x"]) == 2
    assert capsys.readouterr().err == (
        "tokenzoo train: --model is missing; give it on the command line or in the YAML file\n"
    )


def test_the_folder_of_a_run_is_a_model_and_a_method(data, tmp_path, capsys):  # noqa: F811
    """Learned modules come with it: a run can be loaded, compared, exported and drawn."""
    folder = tmp_path / "run"
    assert tokenzoo(["train", *words(data, folder, "--epochs", "1", "--method", "dynamicvit")]) == 0
    trained = result_of(capsys.readouterr().out)
    model = load(folder)
    assert [m.name for m in model.tokenzoo_recipe.methods] == ["dynamicvit"]
    same(folder / "model.safetensors", save(model, tmp_path / "again") / "model.safetensors")
    start = tmp_path / "start.safetensors"  # other weights, which must not be those that answer, nor change
    torch.manual_seed(3)
    kind = json.loads((folder / "model.json").read_text())["timm"]
    save_file(timm.create_model(kind["name"], **kind["options"]).state_dict(), start)
    side = kind["options"].pop("img_size")
    given = ["--model", kind["name"], "--num-classes", str(kind["options"].pop("num_classes")), "--img-size", str(side)]
    given += ["--model-kwargs", *(f"{key}={value}" for key, value in kind["options"].items())]
    given += ["--checkpoint", str(start), "--method", str(folder)]
    assert tokenzoo(["eval", *given, "--data-dir", str(data), "--split", "val", "--device", "cpu"]) == 0
    rows = result_of(capsys.readouterr().out, whole=True)
    assert [row["method"] for row in rows] == ["unpatched", "dynamicvit"]
    assert rows[1]["top1"] == pytest.approx(trained["eval_top1"])
    assert tokenzoo(["export", *given, "--output", str(tmp_path / "run.pt2"), "--device", "cpu"]) == 0
    x = torch.randn(2, 3, side, side)
    exported = torch.export.load(tmp_path / "run.pt2").module()
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=0)
    assert tokenzoo(["eval", *given, "keep_rate=0.5", "--data-dir", str(data)]) == 2
    assert "brings a recipe of its own; leave keep_rate out" in capsys.readouterr().err
    assert tokenzoo(["eval", "--model", kind["name"], "--method", "runs/none", "--data-dir", str(data)]) == 2
    assert "runs/none is no method, and no folder" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert tokenzoo(["eval", *given, "--data-dir", str(data)]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err


def test_the_folder_of_an_unpatched_run_is_one_row(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder = tmp_path / "run"
    assert tokenzoo(["train", *words(data, folder, "--epochs", "1")]) == 0
    capsys.readouterr()
    runs = [Run(), Run(str(folder)), Run(str(folder), {})]
    assert [run.methods for run in runs] == [(), (), ()] and runs[1].name == "unpatched"
    torch.manual_seed(3)
    kind = json.loads((folder / "model.json").read_text())["timm"]
    model = timm.create_model(kind["name"], **kind["options"])
    (tmp_path / "tome").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert Run("tome").name == "tome" and not Run("tome").saved and Run("./tome").saved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own = runs[1].put_on(model)
    same(folder / "model.safetensors", save(own, tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(next(own.parameters()), next(model.parameters()))
