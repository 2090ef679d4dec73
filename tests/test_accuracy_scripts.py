"""The scripts behind the accuracy tables: rows, commands and curves on ten classes of coloured noise."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from training_data import ROOT, draw

import tokenzoo
from tokenzoo.training.build import build
from tokenzoo.training.options import parse_options


@pytest.fixture(scope="module")
def curves():
    sys.path.insert(0, str(ROOT / "benchmarks" / "accuracy"))
    import accuracy_curves

    yield accuracy_curves
    sys.path.remove(str(ROOT / "benchmarks" / "accuracy"))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A configuration with weights and pictures beside it."""
    folder = tmp_path_factory.mktemp("accuracy")
    draw(folder / "data")
    values = {
        "model": "vit_tiny_patch16_224", "model_kwargs": {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3},
        "img_size": 32, "num_classes": 10, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "batch_size": 10,
        "device": "cpu", "threads": 1, "workers": 0, "lr": 1e-3, "warmup_epochs": 0, "epochs": 1, "color_jitter": 0,
    }  # fmt: skip
    (folder / "vit.yaml").write_text(yaml.safe_dump(values))
    args = parse_options(["-c", str(folder / "vit.yaml"), "--data-dir", str(folder / "data"), "--output", "unused"])
    save_file(build(args, 10, torch.device("cpu")).model.state_dict(), folder / "vit.safetensors")
    values["initial_checkpoint"] = str(folder / "vit.safetensors")
    (folder / "vit.yaml").write_text(yaml.safe_dump(values))
    return folder / "vit.yaml"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(curves, monkeypatch, *words: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["accuracy_curves.py", *words])
    curves.main()


def test_off_the_shelf(curves, config, tmp_path, monkeypatch, capsys):
    names = ["ats", "cluster", "reconstruct", "ssm_prune", "sta", "tome"]
    monkeypatch.setattr(curves.tokenzoo, "list_methods", lambda: names)
    path = tmp_path / "noise_free.csv"
    data = config.parent / "data"
    words = ["free", "--config", str(config), "--data-dir", str(data), "--output", str(path), "--passes", "2"]
    run(curves, monkeypatch, *words)
    first, *rows = table(path)
    missing = [row for row in rows if row["note"]]
    assert missing and all("cannot be reached" in row["note"] and not row["top1"] for row in missing)
    rows = [row for row in rows if not row["note"]]
    assert len({row["images"] for row in rows}) == 1 and all(float(row["time_ratio"]) > 0 for row in rows)
    assert first["setting"] == "unpatched" and float(first["diff"]) == 0
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {name: [float(row["share"]) for row in rows if row["method"] == name] for name in methods}
    assert list(found) == ["ats", "cluster", "cluster+reconstruct", "sta", "tome"]
    assert all(len(shares) == len(set(shares)) <= 4 and shares == sorted(shares)[::-1] for shares in found.values())
    for share, wanted in zip(found["tome"], sorted(curves.SHARES)[::-1]):
        assert abs(share - wanted) < 0.03
    assert "left out: ssm_prune" in capsys.readouterr().out
    # started again, it measures nothing anew
    with monkeypatch.context() as again:
        again.setattr(curves, "measure", lambda *args: pytest.fail("measured anew"))
        before = path.read_text()
        run(curves, again, *words)
        assert path.read_text() == before
    capsys.readouterr()
    assert path.with_suffix(".png").stat().st_size > 10_000
    # the command of a row gives that row
    (row,) = [row for row in rows if row["setting"] == "tome flops=0.5"]
    words = row["row_command"].replace("--data-dir data", f"--data-dir {data}").split()
    assert words[:2] == ["tokenzoo", "eval"] and str(config.parent / "vit.safetensors") in words
    from tokenzoo.cli import main

    assert main([*words[1:], "--device", "cpu", "--no-progress"]) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])[1]
    assert float(row["top1"]) == pytest.approx(again["top1"], abs=0.01)
    assert float(row["diff"]) == pytest.approx(again["diff_top1"], abs=0.01)
    assert float(row["diff_se"]) == pytest.approx(again["diff_top1_se"], abs=0.01)
    assert float(row["gmacs"]) == pytest.approx(again["gmacs"], abs=1e-4)


def test_fine_tuned(curves, config, tmp_path, monkeypatch, capsys):
    path, data = tmp_path / "noise_tuned.csv", config.parent / "data"
    words = ["tuned", "--config", str(config), "--data-dir", str(data), "--output", str(path), "--runs", str(tmp_path)]
    words += ["--methods", "evit", "--train", "--epochs", "2"]
    run(curves, monkeypatch, *words)
    base, control, row = table(path)
    assert [base["method"], control["method"], row["method"]] == ["unpatched", "unpatched", "evit"]
    assert control["diff"] == control["diff_free"] and float(control["diff_control"]) == 0
    assert abs(float(row["share"]) - 0.6) < 0.03 and row["diff_free_se"] and row["diff_control_se"]
    assert "--method evit --flops 0.6 --epochs 2" in row["row_command"] and str(tmp_path) not in row["row_command"]
    assert path.with_suffix(".png").stat().st_size > 10_000
    # complete runs are not trained again
    before = (tmp_path / "evit" / "model.safetensors").stat().st_mtime_ns
    run(curves, monkeypatch, *words)
    assert (tmp_path / "evit" / "model.safetensors").stat().st_mtime_ns == before
    given = parse_options(["-c", str(config), "--data-dir", str(data), "--output", "unused",
                           "--initial-checkpoint", str(tmp_path / "evit" / "model.safetensors")])  # fmt: skip
    model = curves.load(given)
    tokenzoo.patch_model(model, "evit", flops=0.6)
    assert 100 * curves.answer(model, curves.read(model, given)).hits.double().mean() == float(row["top1"])


def test_seeded_subset(curves, tmp_path, monkeypatch, capsys):
    """As many of every class, the same ones each time; what is skipped is left to others."""
    import draw_subset

    source = tmp_path / "source"
    draw(source)
    found = {}
    for name, words in {"one": [], "again": [], "rest": ["--val-skip", "1"]}.items():
        argv = ["draw_subset.py", "--source", str(source), "--output", str(tmp_path / name), "--val", "1", *words]
        monkeypatch.setattr(sys, "argv", argv)
        draw_subset.main()
        found[name] = {p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob("*.png")}
    classes = {p.name for p in (source / "val").iterdir()}
    assert found["one"] == found["again"] and not found["one"] & found["rest"]
    assert len(found["one"]) == len(found["rest"]) == len(classes)
    assert all((tmp_path / "one" / name).resolve().parents[2] == source for name in found["one"])
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"b": 0, "a": 2}))
    draw_subset.write_classes(labels, tmp_path / "classes.txt")
    assert (tmp_path / "classes.txt").read_text() == "b\nunused_001\na\n"
    monkeypatch.setattr(sys, "argv", [*argv[:-3], "100000"])
    with pytest.raises(SystemExit, match="asked for"):
        draw_subset.main()


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/models/*_vit.yaml")), ids=lambda path: path.stem)
def test_configurations_of_the_cards(curves, path):
    """The models behind the tables are built by their configuration, and their card says where the weights are."""
    given = parse_options(["-c", str(path), "--data-dir", "none", "--output", "unused", "--initial-checkpoint", ""])
    model = curves.load(given)
    images = torch.randn(2, 3, *given.img_size * 2, generator=torch.Generator().manual_seed(0))
    plain = model(images)
    assert plain.shape == (2, given.num_classes) and plain.isfinite().all()
    with tokenzoo.patched(model, "tome", flops=0.6):
        reduced = model(images)
    assert reduced.isfinite().all() and not torch.equal(reduced, plain)
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    weights = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert f"> {weights['initial_checkpoint']}" in card and f"-c benchmarks/models/{path.name}" in card


def test_weights_in_the_tree_are_few_and_small():
    """Tests and the demo need theirs; others stay out."""
    folders = ("benchmarks", "configs", "docs", "examples", "scripts", "tokenzoo")
    paths = [path for folder in folders for path in ROOT.joinpath(folder).rglob("*.safetensors")]
    kept = [path for path in paths if path.parent != ROOT / "benchmarks" / "models"]  # where users put what cards name
    assert {path.parent.name for path in kept} == {"serve"}
    assert sum(path.stat().st_size for path in kept) <= 4_000_000
