"""What goes to TensorBoard and Weights & Biases: the numbers of every epoch, once, also across resumes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_train_imagenet import main, result_of  # noqa: F401 (main is a fixture)
from training_data import ROOT, draw, words

CURVES = {
    "epoch", "lr", "train_loss", "train_task", "eval_loss", "eval_top1", "eval_top5", "n_broken", "images_per_second",
    "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "four", 4, 3, 1)


def small(data: Path, output: Path, *more: str) -> list[str]:
    return words(data, output, "--batch-size", "4", "--epochs", "3", *more)


def column(output: Path, name: str) -> list[float]:
    with (output / "summary.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def torn(output: Path) -> None:
    """As after a stop while the last checkpoint was written: its epoch was logged, and comes again."""
    newest = max(output.glob("checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:500])


# ---- stand-ins


class Writer:
    """The part of SummaryWriter that is used."""

    made: list[Writer] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.points: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points[name].append((step, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Wandb(ModuleType):
    """The part of wandb that is used."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: list[dict] = []
        self.calls: list[tuple[int, bool, dict]] = []
        self.ends: list[int] = []
        self.refuses = False

    def init(self, **settings) -> Wandb:
        if self.refuses:
            raise self.Error("api_key not configured (no-tty)")
        self.settings.append(settings)
        return self

    def log(self, numbers: dict, step: int, commit: bool) -> None:
        self.calls.append((step, commit, numbers))

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def writers(monkeypatch) -> list[Writer]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_every_epoch_is_a_point_of_every_curve(main, data, tmp_path, capsys, writers, wandb):  # noqa: F811
    assert main(small(data, tmp_path / "run", "--log-tensorboard", "--log-wandb")) == 0
    (writer,) = writers
    assert writer.folder == str(tmp_path / "run" / "tensorboard") and writer.purge_step is None and writer.closed
    assert set(writer.points) == CURVES
    for name, points in writer.points.items():
        assert points == list(enumerate(pytest.approx(v) for v in column(tmp_path / "run", name))), name
    assert [(step, commit, set(numbers)) for step, commit, numbers in wandb.calls] == [
        (epoch, True, CURVES) for epoch in range(3)
    ]
    (settings,) = wandb.settings
    assert settings["project"] == "tokenzoo" and settings["name"] == "run" and settings["dir"] == str(tmp_path / "run")
    assert settings["config"]["batch_size"] == 4 and "resume" not in settings["config"]
    assert wandb.ends == [0]


def test_curves_of_a_reduced_model(main, data, tmp_path, capsys, writers):  # noqa: F811
    more = ["--method", "evit", "--shrink-epochs", "2", "--eval-unpatched", "--eval-every", "2", "--log-tensorboard"]
    assert main(small(data, tmp_path / "run", *more)) == 0
    points = writers[0].points
    assert set(points) == CURVES | {"keep_rate", "unpatched_top1", "unpatched_top5"}
    assert [step for step, _ in points["unpatched_top1"]] == [step for step, _ in points["eval_top1"]] == [1, 2]
    assert [value for _, value in points["keep_rate"]] == column(tmp_path / "run", "keep_rate")


def test_a_resumed_run_goes_on_in_its_curves(main, data, tmp_path, capsys, writers, wandb):  # noqa: F811
    folder, logs = tmp_path / "run", ["--log-tensorboard", "--log-wandb"]
    assert main(small(data, folder, *logs)) == 0
    torn(folder)
    assert main(small(data, folder, *logs, "--resume")) == 0
    assert writers[1].purge_step == 2 and [step for step, _ in writers[1].points["lr"]] == [2]
    assert [step for step, *_ in wandb.calls] == [0, 1, 2, 2]
    first, second = wandb.settings
    assert first["id"] == second["id"] == (folder / "wandb_id.txt").read_text().strip()
    assert first["resume"] == second["resume"] == "allow" and first["config"] == second["config"]
    assert main(small(data, tmp_path / "other" / "run", *logs, "--resume")) == 0  # nothing there: from the beginning
    assert wandb.settings[2]["id"] != first["id"] and wandb.settings[2]["name"] == "run"
    assert writers[2].purge_step == 0


def test_a_failed_run_is_told_to_the_loggers_and_a_refused_one_is_not_begun(
    main,  # noqa: F811
    data,
    tmp_path,
    capsys,
    writers,
    wandb,
):
    logs = ["--log-tensorboard", "--log-wandb"]
    assert main(small(data, tmp_path / "a", *logs, "--lr", "1e30")) == 2
    assert wandb.ends == [1] and writers[0].closed
    assert main(small(data, tmp_path / "b", *logs, "--batch-size", "100")) == 2
    assert len(wandb.settings) == len(writers) == 1
    wandb.refuses = True
    capsys.readouterr()
    assert main(small(data, tmp_path / "c", "--log-wandb")) == 2
    assert "api_key not configured (no-tty)); log in with `wandb login`, or set WANDB_MODE" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_loggers_are_named_with_the_remedy(main, data, tmp_path, capsys, monkeypatch, name):  # noqa: F811
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    assert main(small(data, tmp_path, f"--log-{name}")) == 2
    message = capsys.readouterr().err
    assert f"--log-{name} needs {name}" in message and message.endswith(f"pip install {name}\n")


# ---- the real ones


def test_event_files(main, data, tmp_path, capsys):  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    assert main(small(data, folder, "--log-tensorboard")) == 0
    torn(folder)
    assert main(small(data, folder, "--log-tensorboard", "--resume")) == 0
    assert len(list((folder / "tensorboard").iterdir())) == 2
    found = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == CURVES
    for name in CURVES:
        points = found.Scalars(name)
        assert [point.step for point in points] == [0, 1, 2], name
        assert [point.value for point in points] == pytest.approx(column(folder, name), rel=1e-6), name


def entries(content: bytes) -> Iterator[bytes]:
    """The records of a wandb file: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
def test_offline_runs_of_wandb(data, tmp_path):
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    folder = tmp_path / "run"

    def run(*more: str) -> None:
        variables = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(ROOT / "train_imagenet.py"), *small(data, folder, "--log-wandb", *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        assert done.returncode == 0, done.stderr
        result_of(done.stdout)

    def steps(path: Path) -> list[int]:
        found = []
        for content in entries(path.read_bytes()):
            record = internal.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                found.append(record.history.step.num)
                assert CURVES <= {item.key or item.nested_key[0] for item in record.history.item}
        return found

    run()
    torn(folder)
    run("--resume")
    (first, second) = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{(folder / 'wandb_id.txt').read_text().strip()}.wandb"
    assert steps(first) == [0, 1, 2] and steps(second) == [2]
