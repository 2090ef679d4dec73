"""train_imagenet.py from its command line: it learns, goes on after a kill, works in two processes, and refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_data import ROOT, draw, words

from tokenzoo.evaluation.distributed import World
from tokenzoo.training.data import open_splits
from tokenzoo.training.options import parse_options
from tokenzoo.training.validation import ValBatches

SCRIPT = ROOT / "train_imagenet.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_imagenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "ten")


def result_of(text: str, whole: bool = False) -> Any:
    """The record behind what a command prints: its first row, or all."""
    lines = text.strip().splitlines()
    assert lines[-2] == "--result"
    return json.loads(lines[-1]) if whole else json.loads(lines[-1])[0]


def same(one: Path, other: Path, atol: float = 0.0) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        if atol:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)
        else:
            assert torch.equal(a[name], b[name]), name


# ---- a run


def test_fine_tunes_in_under_a_minute(data, tmp_path):
    start, output = time.perf_counter(), tmp_path / "run"
    more = [
        "--method",
        "evit",
        "--method-kwargs",
        "keep_rate=0.6",
        "--epochs",
        "12",
        "--no-aug",
        "--smoothing",
        "0",
        "--lr",
        "4e-3",
    ]
    more += ["--eval-unpatched", "--warmup-epochs", "2", "--sched-on-updates"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words(data, output, *more)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 60
    result = result_of(done.stdout)
    with (output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(12))
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert float(rows[-1]["eval_top1"]) == result["eval_top1"] >= 60  # chance is 10
    assert rows[-1]["unpatched_top1"] != ""
    assert result["best"]["eval_top1"] == max(float(row["eval_top1"]) for row in rows)
    assert json.loads((output / "recipe.json").read_text()) == result["method"] == {"method": "evit", "keep_rate": 0.6}
    assert yaml.safe_load((output / "args.yaml").read_text())["batch_size"] == 10
    assert (output / "curve.png").stat().st_size > 5000
    assert result["gmac_ratio"] < 0.85 and result["without_gradient"] == []
    assert load_file(output / "model.safetensors")["head.weight"].shape == (10, 48)


def test_the_written_options_give_the_run_again(main, data, tmp_path, capsys):
    assert main(words(data, tmp_path / "a", "--epochs", "1", "--method", "tome", "--method-kwargs", "r=2")) == 0
    assert main(["-c", str(tmp_path / "a" / "args.yaml"), "--output", str(tmp_path / "b")]) == 0
    same(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")


def test_workers_change_nothing(main, data, tmp_path, capsys):
    more = ["--epochs", "2", "--method", "tome", "--method-kwargs", "r=2", "--mixup", "0.5", "--aug-repeats", "3"]
    for workers in "02":
        assert main(words(data, tmp_path / workers, *more, "--workers", workers)) == 0
    same(tmp_path / "0" / "model.safetensors", tmp_path / "2" / "model.safetensors")


PARTS = {
    "everything": [
        "--method", "mctf", "--method-kwargs", "r=3", "min_tokens=4", "--consistency", "3", "--consistency-r", "2",
        "--consistency-threshold", "0.05", "--kd-model-name", "unpatched", "--mixup", "0.8", "--cutmix", "1",
        "--reprob", "0.25", "--grad-accum-steps", "2", "--clip-grad", "1", "--model-ema", "--layer-decay", "0.8",
        "--amp", "--channels-last", "--drop-path", "0.1", "--grad-checkpointing", "--aa", "rand-m9-mstd0.5",
    ],
    "shrinking": ["--method", "evit", "--shrink-start-epoch", "1", "--shrink-epochs", "1"],
    "budget": ["--method", "tome", "--flops", "0.7"],
    "unpatched": ["--sched", "none"],
    "compiled": ["--method", "tome", "--method-kwargs", "r=2", "--torchcompile"],
    "half": ["--method", "topk", "--amp", "--amp-dtype", "float16"],
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_work_together(main, data, tmp_path, capsys, monkeypatch, name):
    compilations = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: compilations.append(graph) or graph)
    )
    assert main(words(data, tmp_path, "--epochs", "3", *PARTS[name])) == 0, capsys.readouterr().err
    result = result_of(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    if name == "everything":
        assert all(result[f"train_{part}"] > 0 for part in ("distillation", "second_task", "consistency"))
        parts = [result[f"train_{part}"] for part in ("task", "distillation", "second_task", "consistency")]
        assert result["train_loss"] == pytest.approx(sum(w * p for w, p in zip((1, 0.5, 1, 3), parts)), rel=1e-4)
        assert result["weights"] == "averaged"
    if name == "shrinking":
        rates = [float(row["keep_rate"]) for row in rows]
        assert rates[0] == 1 > rates[1] > rates[2] == 0.7
    assert bool(compilations) == (name == "compiled")
    if name == "budget":
        assert abs(result["gmac_ratio"] - 0.7) < 0.03
    if name == "unpatched":
        assert result["method"] is None and (tmp_path / "recipe.json").read_text() == "null\n"


# ---- going on


LONG = [
    "--method", "evit", "--epochs", "6", "--recovery-interval", "1", "--shrink-epochs", "4", "--mixup", "0.8",
    "--reprob", "0.25", "--drop-path", "0.2", "--model-ema", "--deterministic",
]  # fmt: skip


def killed(command: list[str], moment) -> None:
    """Starts a run and ends it with SIGKILL as soon as `moment` is true."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    text = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed:\n{text}"


@pytest.mark.slow
def test_goes_on_bit_equal_after_sigkill(main, data, tmp_path, capsys):
    assert main(words(data, tmp_path / "whole", *LONG)) == 0
    folder = tmp_path / "part"
    command = [sys.executable, str(SCRIPT), *words(data, folder, *LONG)]

    def newest() -> str:
        return max((path.name for path in folder.glob("checkpoint-*.pt")), default="")

    killed(command, lambda: newest() >= "checkpoint-00000-0000003.pt")  # inside the first epoch
    assert newest() < "checkpoint-00006"
    seen = newest()
    # while a checkpoint is being written
    killed([*command, "--resume"], lambda: newest() > seen and any(folder.glob("checkpoint-*.part")))
    killed([*command, "--resume"], lambda: newest() >= "checkpoint-00004-0000000.pt")  # at the end of an epoch
    assert main([*command[2:], "--resume"]) == 0
    same(tmp_path / "whole" / "model.safetensors", folder / "model.safetensors")
    columns = ("epoch", "lr", "keep_rate", "train_loss", "eval_loss", "eval_top1")
    tables = [list(csv.DictReader((p / "summary.csv").open())) for p in (tmp_path / "whole", folder)]
    assert [[row[c] for c in columns] for row in tables[0]] == [[row[c] for c in columns] for row in tables[1]]


def test_torn_checkpoints(main, data, tmp_path, capsys, caplog):
    assert main(words(data, tmp_path / "whole", "--epochs", "3")) == 0
    assert main(words(data, tmp_path / "part", "--epochs", "3")) == 0
    newest = tmp_path / "part" / "checkpoint-00003-0000000.pt"
    whole = newest.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + b"\xff" + whole[5001:], b""):
        newest.write_bytes(damaged)
        (tmp_path / "part" / "model.safetensors").unlink()
        caplog.clear()
        assert main(words(data, tmp_path / "part", "--epochs", "3", "--resume")) == 0
        assert "checkpoint-00003-0000000.pt is torn" in caplog.text
        assert "going on from checkpoint-00002-0000000.pt" in caplog.text
        same(tmp_path / "whole" / "model.safetensors", tmp_path / "part" / "model.safetensors")
    for path in (tmp_path / "part").glob("checkpoint-*.pt"):
        path.write_bytes(whole[:100])
    assert main(words(data, tmp_path / "part", "--epochs", "3", "--resume")) == 2
    assert "are torn" in capsys.readouterr().err


def test_resume_from_another_run(main, data, tmp_path, capsys):
    assert main(words(data, tmp_path, "--epochs", "1", "--method", "evit", "--method-kwargs", "keep_rate=0.7")) == 0
    other = ["--epochs", "1", "--method", "evit", "--method-kwargs", "keep_rate=0.5", "fuse_token=false"]
    assert main(words(data, tmp_path, *other, "--lr", "0.1", "--resume")) == 2
    message = capsys.readouterr().err
    for part in ("recipe.keep_rate: 0.7 before, 0.5 now", "recipe.fuse_token: True before, False now",
                 "--lr: 0.002 before, 0.1 now"):  # fmt: skip
        assert part in message
    assert main(words(data, tmp_path, "--epochs", "1", "--method", "topk", "--resume")) == 2
    assert "recipe.method: 'evit' before, 'topk' now" in capsys.readouterr().err
    assert main(words(data, tmp_path, "--epochs", "1", "--method", "evit")) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err


# ---- several processes


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(arguments: list[str]) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(free_port()), str(SCRIPT), *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return result_of(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["evit", "mctf"])
def test_two_processes_give_the_weights_of_one(main, data, tmp_path, capsys, method):
    more = ["--epochs", "2", "--method", method, "--opt", "sgd", "--lr", "0.05", "--grad-accum-steps", "2"]
    if method == "mctf":
        more += ["--method-kwargs", "r=3", "min_tokens=4", "--consistency", "3", "--consistency-r", "2"]
        more += ["--consistency-threshold", "0"]
    assert main(words(data, tmp_path / "one", *more, "--batch-size", "10")) == 0
    one = result_of(capsys.readouterr().out)
    two = torchrun(words(data, tmp_path / "two", *more, "--batch-size", "5"))
    assert two["processes"] == 2 and two["eval_top1"] == one["eval_top1"]
    same(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors", atol=1e-5)
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)


# ---- bad input


def refused(main, capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("train_imagenet.py: ") and message.count("\n") == 1
    return message


def test_refused_options(main, data, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    for text, expected in (
        ("epoch: 3", "'epoch' is no flag of this program; did you mean epochs?"),
        ("epochs: many", "epochs='many'; give int"),
        ("amp: 1", "amp=1; give true or false"),
        ("amp_dtype: float8", "use one of bfloat16, float16"),
        ("[1, 2]", "holds list"),
        ("a: [", "not valid YAML"),
    ):
        config.write_text(text)
        assert expected in refused(main, capsys, words(data, tmp_path / "o", "-c", str(config)))
    for more, expected in (
        (["--method", "evil"], "'evil' is unknown"),
        (["--method", "tome", "--method-kwargs", "keep=1"], "keep"),
        (["--method-kwargs", "r=1"], "need a --method"),
        (["--model", "vit_tinny"], "no timm model"),
        (["--batch-size", "5", "--mixup", "1"], "is odd"),
        (["--method", "evit", "--consistency", "1"], "one number r"),
        (["--method", "tome", "--method-kwargs", "r=1", "--shrink-epochs", "2"], "no method with one"),
        (["--method", "evit", "--freeze-epochs", "2"], "this model has none"),
        (["--batch-size", "100"], "50 training pictures are fewer than one batch of 100"),
        (["--initial-checkpoint", str(tmp_path / "none.pth")], "does not exist"),
        (["--opt", "nothing"], "nothing"),
        (["--sched", "plateau"], "plateau"),
        (["--log-wandb"], "pip install wandb"),
        (["--checkpoint-hist", "1"], "keep at least 2"),
    ):
        if more == ["--log-wandb"] and importlib.util.find_spec("wandb"):
            continue
        assert expected in refused(main, capsys, words(data, tmp_path / "o", *more))


def test_refused_data(main, data, tmp_path, capsys):
    def run(folder, *more):
        return refused(main, capsys, words(folder, tmp_path / "o", *more))

    assert "class count mismatch: --num-classes 7, but the pictures have 10" in run(data, "--num-classes", "7")
    assert "does not exist" in run(tmp_path / "nowhere")
    empty = draw(tmp_path / "empty", 4, 3)
    (empty / "train" / "class_1a").mkdir()
    (empty / "train" / "class_1a" / "notes.txt").write_text("no picture")
    assert "class folders without pictures" in run(empty, "-b", "2") and "class_1a" in run(empty, "-b", "2")
    other = draw(tmp_path / "other", 4, 3)
    (other / "val" / "class_3").rename(other / "val" / "class_x")
    assert "without class_x" in run(other, "-b", "2")
    single = draw(tmp_path / "single", 4, 3) / "train"
    assert "the same pictures" in run(single, "-b", "2")


def test_missing_evaluation_class_keeps_the_numbers(tmp_path, caplog):
    folder = draw(tmp_path / "ten")
    for path in (folder / "val" / "class_0").iterdir():
        path.unlink()
    (folder / "val" / "class_0").rmdir()
    args = parse_options(words(folder, tmp_path / "run"))
    splits = open_splits(args, ALONE)
    assert "no evaluation pictures of class_0" in caplog.text
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    targets = torch.cat([target for _, target in ValBatches(splits, config, args, ALONE)])
    assert targets.tolist() == [label for label in range(1, 10) for _ in range(2)]


def test_corrupt_pictures_are_named_and_counted(main, tmp_path, capsys, caplog):
    folder = draw(tmp_path / "ten")
    (folder / "train" / "class_3" / "1.png").write_bytes(b"no picture")
    cut = folder / "train" / "class_4" / "2.png"
    cut.write_bytes(cut.read_bytes()[:300])
    assert main(words(folder, tmp_path / "run", "--epochs", "2")) == 0
    assert result_of(capsys.readouterr().out)["n_broken"] == 2
    assert caplog.text.count("class_3/1.png cannot be read") == caplog.text.count("class_4/2.png cannot be read") == 1


def test_unwritable_output(main, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(main, capsys, words(data, tmp_path / "file" / "run"))


def test_a_loss_that_is_no_number_stops_the_run(main, data, tmp_path, capsys):
    assert main(words(data, tmp_path, "--epochs", "1")) == 0
    kept = (tmp_path / "checkpoint-00001-0000000.pt").read_bytes()
    poison = load_file(tmp_path / "model.safetensors")
    torch.save({"state_dict": {**poison, "norm.bias": poison["norm.bias"] * float("nan")}}, tmp_path / "nan.pth")
    message = refused(main, capsys, words(data, tmp_path / "b", "--initial-checkpoint", str(tmp_path / "nan.pth")))
    assert "the loss is no number in epoch 0, at or before batch 0" in message
    assert not list((tmp_path / "b").glob("checkpoint-*"))
    # a learning rate beyond reason: what was saved before stays sound
    more = ["--epochs", "4", "--lr", "1e30", "--warmup-epochs", "2", "--warmup-lr", "0", "--recovery-interval", "1"]
    message = refused(main, capsys, words(data, tmp_path / "c", *more))
    assert "the last good checkpoint is kept" in message
    newest = max((tmp_path / "c").glob("checkpoint-*.pt"))
    state = torch.load(newest, weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())
    assert (tmp_path / "checkpoint-00001-0000000.pt").read_bytes() == kept
