"""`tokenzoo train` and its front train_imagenet.py: one parser, one run, one record."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from test_train_imagenet import data, main, result_of, same  # noqa: F401 (main and data are fixtures)
from training_data import ROOT, words

from tokenzoo.cli import build_parser
from tokenzoo.cli import main as tokenzoo
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
