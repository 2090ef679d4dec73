"""The scripts of benchmarks/speed in small: what they write, in which order they work, and that they keep to a time."""

import csv
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "speed"))
    return importlib.import_module("bench_cuda")


def run(module, path, minutes):
    module.main(["--small", "--minutes", str(minutes), "--rounds", "2", "--results-file", str(path)])
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), json.loads(path.with_suffix(".json").read_text())


def test_rows_and_what_cannot_be_done(cuda, tmp_path, monkeypatch):
    ours = ("speed", cuda.SMALL, 64, 1)
    todo = [
        *(cuda.Task(*ours, mode, method) for mode, method in [("eager", "tome"), ("graph", "evit"), ("eager", "none")]),
        cuda.Task("memory", *ours[1:], "eager", "evit"),
        cuda.Task("scan", "selective_scan", 64, 1, "eager", ""),
    ]
    monkeypatch.setattr(cuda, "tasks", lambda small: todo)
    rows, record = run(cuda, tmp_path / "out.csv", 1)
    by_name = {(row["section"], row["method"]): row for row in rows}
    timed = by_name["speed", "tome"]
    assert float(timed["ms"]) > 0 and float(timed["speedup"]) > 0 and timed["note"] == ""
    assert float(timed["gmac_ratio"]) > 1 and int(timed["tokens_out"]) < 17
    assert "CUDA" in by_name["speed", "evit"]["note"] and by_name["speed", "evit"]["ms"] == ""
    assert "none" in by_name["speed", "none"]["note"]
    assert by_name["memory", "evit"]["unpatched_peak_mib"] == by_name["memory", "evit"]["peak_mib"]  # both empty here
    assert float(by_name["scan", "blocked"]["ms"]) > 0
    assert record["not_reached"] == [] and record["minutes"] == 1 and record["torch"] and "--small" in record["command"]


def test_what_was_not_reached_is_named(cuda, tmp_path):
    rows, record = run(cuda, tmp_path / "out.csv", 0)
    expected = list(dict.fromkeys(str(task) for task in cuda.tasks(True)))
    assert rows == [] and record["not_reached"] == expected


def test_the_most_important_comes_first(cuda):
    todo = list(cuda.tasks(False))
    assert str(todo[0]) == "speed: vit_large_patch16_384 at 384, batch 64, eager, tome"
    methods = {task.method for task in todo if task.section == "speed" and task.model == todo[0].model}
    configured = {file.parent.name for file in ROOT.glob("configs/*/deit_small_patch16_224.yaml")}
    assert configured - {"evit+tome"} <= methods
    for model in cuda.MODELS.values():
        modes = {(task.mode, task.batch) for task in todo if task.model == model}
        assert {("eager", 64), ("eager", 1), ("graph", 1), ("compiled", 64)} <= modes, model
    order = [task.section for task in todo]
    assert order.index("memory") < order.index("scan") < len(order) // 4


def test_refusals(cuda, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cuda.main(["--small", "--results-file", str(tmp_path / "out.txt")])
    assert "out.txt" in capsys.readouterr().err
