"""Commands in two gloo processes: counts equal those of one process, one process writes, FSDP2 trains as DDP does."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import test_evaluation
import test_segmentation_eval
import timm
import torch
import torch.multiprocessing as mp
import training_data
from cases import build, images
from safetensors.torch import load_file
from test_distributed import free_ports
from torch.distributed.fsdp import FSDPModule

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.dense import save_segmenter
from tokenzoo.evaluation import PictureLoader, data_config, open_pictures
from tokenzoo.evaluation.distributed import World, join
from tokenzoo.training.sharding import Answering, shard

MODEL = [*test_evaluation.SMALL[1:], "--num-classes", "4"]
TOME = ["--method", "tome", "--method-kwargs", "r=2"]
TRAIN = [*TOME, "--epochs", "2", "--batch-size", "5", "--model-ema", "--model-ema-decay", "0.9", "--clip-grad", "1"]
TRAIN += ["--grad-accum-steps", "2", "--kd-model-name", "unpatched"]
EVIT = ["--method", "evit", "--method-kwargs", "keep_rate=0.6", "--epochs", "2", "--batch-size", "5"]
EVIT += ["--shrink-start-epoch", "1", "--shrink-epochs", "1", "--grad-checkpointing", "--amp"]


def commands(root: Path, output: Path) -> dict[str, list[str]]:
    """What runs in one process and in two."""
    few = ["--workers", "0", "--no-progress"]
    images, broken = (["--data-dir", str(root / name), *few] for name in ("images", "broken"))
    # ATS pads to the longest of a batch, so batches have to be the same ones
    methods = ["--method", "tome", "r=2", "--method", "ats", "layers=[1]"]
    many = ["tome", "topk", "uniform", "pool", "evit", "random", "radial"]
    return {
        "eval": ["eval", *MODEL, *broken, *methods, "-b", "7", "--skip-broken", "--results-file",
                 f"{output}/eval.json"],
        "segment": ["segment", "eval", "--checkpoint", f"{root}/dense.safetensors", "--data-dir", f"{root}/dense",
                    "--device", "cpu", "--method", "tome", "r=4", "--method", "topk", "keep_rate=0.4", "layers=[0]",
                    "--num-bench-iter", "0", "--resamples", "20", "--no-progress", "--results-file",
                    f"{output}/segment.json"],
        "tune": ["tune", *MODEL, *images, "--flops", "0.7", "--methods", *many, "--refine", "3", "-b", "4",
                 "--max-images", "24", "--output", f"{output}/tuned"],
        "refused": ["eval", *MODEL, *broken, "-b", "7"],
    }  # fmt: skip


def training(root: Path, output: Path) -> dict[str, list[str]]:
    """Runs of two processes; the resumed one finds what the one before it left after its first epoch."""
    def words(folder, *more):
        return ["train", *training_data.words(root / "train", output / folder, *more)]

    return {
        "ddp": words("ddp", *TRAIN),
        "fsdp": words("fsdp", *TRAIN, "--fsdp", "--checkpoint-hist", "9", "--recovery-interval", "1"),
        "evit ddp": words("evit_ddp", *EVIT),
        "evit fsdp": words("evit_fsdp", *EVIT, "--fsdp"),
        "consistency": words("none", *TOME, "--consistency", "1", "--fsdp"),
    }


def said(words: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return status, out.getvalue(), err.getvalue()


def worker(rank: int, port: int, root: Path, output: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    found, ports = {}, iter(range(port, port + PORTS))

    def run(name: str, words: list[str]) -> None:
        os.environ["MASTER_PORT"] = str(next(ports))
        found[name] = said(words)

    for name, words in commands(root, output).items():
        run(name, words)
    every = training(root, output)
    for name, words in every.items():
        run(name, words)
    if rank == 0:  # what a run leaves that was killed inside its second epoch
        os.makedirs(output / "again")
        (kept,) = (output / "fsdp").glob("checkpoint-00001-0000002.pt")
        (output / "again" / kept.name).write_bytes(kept.read_bytes())
        os.makedirs(output / "mixed")
        (output / "mixed" / kept.name).write_bytes(kept.read_bytes())
    os.environ["MASTER_PORT"] = str(next(ports))
    with join("cpu") as world:
        world.wait()
    for name, folder, more in (("again", "again", ["--fsdp"]), ("mixed", "mixed", [])):
        words = training_data.words(root / "train", output / folder, *TRAIN, *more, "--resume")
        run(name, ["train", *words])
    os.environ["MASTER_PORT"] = str(next(ports))
    with join("cpu") as world:
        found["parts"] = parts_of(world)
    (output / f"said_{rank}.json").write_text(json.dumps(found))


PORTS = 16


def parts_of(world: World) -> dict[str, list]:
    """What a process holds of every unit and of every parameter of a patched model, and what its shards answer."""
    model = build("deit")
    tokenzoo.patch_model(model, "tome", r=2)
    x = images(model, batch=2)
    with torch.no_grad():
        expected = model(x)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    root = Answering(model)
    shard(root, model, world)
    units = [name for name, module in root.named_modules() if isinstance(module, FSDPModule)]
    held = {name: (p.to_local().numel(), sizes[name]) for name, p in model.named_parameters()}
    with torch.no_grad():
        return {"units": units, "held": held, "apart": (root(x) - expected).abs().max().item()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    test_evaluation.draw(root / "images", count=8)
    test_evaluation.draw(root / "broken", count=8)
    (root / "broken" / "class_2" / "3.png").write_bytes(b"no image")
    training_data.draw(root / "train", count=3, val=1)
    test_segmentation_eval.draw(root / "dense")
    save_segmenter(test_segmentation_eval.build(), root / "dense.safetensors")
    return root


@pytest.fixture(scope="module")
def one(root, tmp_path_factory) -> tuple[Path, dict]:
    """Where one process wrote, and what it said."""
    output, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: said(words) for name, words in commands(root, output).items()}
    torch.set_num_threads(threads)
    return output, found


@pytest.fixture(scope="module")
def two(root, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Where two processes wrote, and what each said."""
    output = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (free_ports(PORTS), root, output), nprocs=2)
    return output, [json.loads((output / f"said_{rank}.json").read_text()) for rank in range(2)]


def results(path: Path) -> list[dict]:
    record = json.loads(path.read_text())
    return record["environment"].pop("processes"), record["environment"].get("skipped"), record["results"]


@pytest.mark.parametrize("name", ["eval", "segment"])
def test_counts_are_those_of_one_process(one, two, name):
    (alone, _), (together, words) = one, two
    assert words[0][name][0] == words[1][name][0] == 0, words
    assert words[1][name][1] == "", "the second process printed"
    processes, skipped, rows = results(alone / f"{name}.json")
    assert processes == 1 and len(rows) == 3
    assert results(together / f"{name}.json") == (2, skipped, rows)  # to the last digit
    if name == "eval":
        assert skipped == ["class_2/3.png"] and rows[0]["n_images"] == 31


def test_the_search_finds_what_one_process_finds(one, two):
    (alone, _), (together, words) = one, two
    assert words[0]["tune"][0] == words[1]["tune"][0] == 0, words
    assert words[1]["tune"][1] == ""
    assert (alone / "tuned" / "best.yaml").read_text() == (together / "tuned" / "best.yaml").read_text()
    tables = [json.loads((folder / "tuned" / "tune.json").read_text()) for folder in (alone, together)]
    assert tables[0]["rows"] == tables[1]["rows"] and len(tables[0]["rows"]) > 2
    states = []
    for folder in (alone, together):
        lines = [json.loads(line) for line in (folder / "tuned" / "state.jsonl").read_text().splitlines()]
        states.append({(line["what"], str(line["recipe"])): line["value"] for line in lines[1:]})
    assert states[0].items() <= states[1].items()  # a group of candidates is measured at once


def test_a_failure_ends_all_processes(one, two):
    status, _, error = one[1]["refused"]
    assert status == 2 and "class_2/3.png cannot be read" in error
    errors = [words["refused"] for words in two[1]]
    assert [status for status, *_ in errors] == [2, 2]
    assert errors[1][2] == error  # the second one has the image
    assert "process 1 stopped: ValueError: image" in errors[0][2]


def losses(folder: Path) -> list[float]:
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows for name in ("train_loss", "eval_loss", "eval_top1")]


@pytest.mark.parametrize("kind, tolerance", [("", 1e-5), ("evit_", 2e-2)], ids=["float32", "bfloat16"])
def test_sharded_training_is_that_of_ddp(two, kind, tolerance):
    folder, words = two
    name = kind.replace("_", " ")
    for rank in range(2):
        assert words[rank][f"{name}ddp"][0] == words[rank][f"{name}fsdp"][0] == 0, words[rank]
    assert losses(folder / f"{kind}fsdp") == pytest.approx(losses(folder / f"{kind}ddp"), abs=tolerance)
    ddp, fsdp = (load_file(folder / f"{kind}{which}" / "model.safetensors") for which in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for key, value in ddp.items():
        torch.testing.assert_close(fsdp[key], value, atol=tolerance, rtol=0, msg=key)


def shapes(state):
    if isinstance(state, torch.Tensor):
        assert type(state) is torch.Tensor and state.device.type == "cpu"
        return tuple(state.shape), state.dtype
    if isinstance(state, dict):
        return {key: shapes(value) for key, value in state.items()}
    return [shapes(value) for value in state] if isinstance(state, (list, tuple)) else type(state)


def test_checkpoints_are_the_same_files(two):
    states = [
        torch.load(two[0] / which / "checkpoint-00002-0000000.pt", weights_only=True) for which in ("ddp", "fsdp")
    ]
    assert shapes(states[0]) == shapes(states[1])
    assert states[0]["optimizer"]["state"] and states[0]["ema"] is not None


@pytest.mark.parametrize("name", ["again", "mixed"])
def test_resumes_sharded_and_whole(two, name):
    folder, words = two
    assert words[0][name][0] == 0, words[0][name]
    expected, found = (load_file(folder / which / "model.safetensors") for which in ("fsdp", name))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0 if name == "again" else 1e-5, rtol=0, msg=key)


def test_patched_blocks_are_the_units(two):
    parts = [words["parts"] for words in two[1]]
    for part in parts:
        assert part["units"] == ["", *(f"model.blocks.{i}" for i in range(4))]
        assert part["apart"] < 1e-5
    for name, (_, size) in parts[0]["held"].items():
        assert sum(part["held"][name][0] for part in parts) == size, name
    for part in parts:
        held, sizes = (sum(values) for values in zip(*part["held"].values()))
        assert 0.4 * sizes < held < 0.6 * sizes


def test_what_two_processes_counted_is_kept_for_one(two, root, tmp_path):
    words = commands(root, tmp_path)["segment"]
    shutil.copytree(two[0] / "segment.json.state", tmp_path / "segment.json.state")
    status, out, _ = said(words)
    assert status == 0 and "7 images were counted already" in out
    assert results(tmp_path / "segment.json") == (1, *results(two[0] / "segment.json")[1:])


def test_what_does_not_go_together(two, root, tmp_path):
    assert "--consistency does not go with --fsdp" in two[1][0]["consistency"][2]
    status, _, error = said(["train", *training_data.words(root / "train", tmp_path / "run", *TOME, "--fsdp")])
    assert status == 2 and "start it with torchrun" in error


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_read_the_batches_of_one(root, size):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()

    def batches(world):
        return list(PictureLoader(open_pictures(root / "images"), data_config(model), 7, world=world))

    whole = batches(World(0, 1, torch.device("cpu")))
    parts = [batch for rank in range(size) for batch in batches(World(rank, size, torch.device("cpu")))]
    assert len(whole) == len(parts) == 5
    for (x, y), (x_part, y_part) in zip(whole, parts):
        assert torch.equal(x, x_part) and torch.equal(y, y_part)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_are_a_partition(count):
    shares = [list(World(rank, 3, torch.device("cpu")).share(count)) for rank in range(3)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
