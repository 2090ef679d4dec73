"""`tokenzoo segment eval` and its parts: the numbers of torchmetrics and of loops by hand, ended runs, broken files."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.cost.trace import count_macs
from tokenzoo.dense import create_segmenter, save_segmenter
from tokenzoo.evaluation.runs import Precision, Run
from tokenzoo.evaluation.segmentation import inference as inference_module
from tokenzoo.evaluation.segmentation.costs import _Encoder, dense_macs
from tokenzoo.evaluation.segmentation.data import open_dataset
from tokenzoo.evaluation.segmentation.evaluate import default_inference, evaluate_segmentation
from tokenzoo.evaluation.segmentation.inference import Inference, Predictor
from tokenzoo.evaluation.segmentation.results import SEGMENT_COLUMNS

K = 4
RUNS = [Run("tome", {"r": 4}), Run("topk", {"keep_rate": 0.4, "layers": [0]})]


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def build(head: str = "linear", **options) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = create_segmenter(
        "vit_tiny_patch16_224",
        K,
        head,
        encoder_kwargs=kwargs,
        img_size=(24, 32),
        classes=["a", "b", "c", "d"],
        **options,
    )
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.qkv.weight.mul_(12)  # random weights attend evenly; sharper maps differ from picture to picture
        if head == "linear":
            model.decoder.head.weight.mul_(50)
    return model.eval()


@pytest.fixture
def model():
    return build()


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "data")


def draw(root: Path, count: int = 7, size=(24, 32)) -> Path:
    rng = np.random.default_rng(1)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        pixels[: 3 * number] = 30 * number
        Image.fromarray(pixels).save(root / f"images/p{number}.png")
        values = rng.choice([0, 1, 2, 3, 255], p=[0.6, 0.2, 0.05, 0.05, 0.1], size=size).astype(np.uint8)
        values[:, : 4 * number] = number % 3
        Image.fromarray(values).save(root / f"masks/p{number}.png")
    return root


def by_hand(folder: Path, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Class maps and masks, read without any of the code under test."""
    files = sorted((folder / "images").iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files])
    masks = torch.stack([torch.from_numpy(np.array(Image.open(folder / "masks" / f.name))).long() for f in files])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        return model((images / 255 - mean) / std).argmax(1), masks


def miou_of(labels: torch.Tensor, masks: torch.Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    return 100 * multiclass_jaccard_index(labels, masks, K, average="macro", ignore_index=255).item()


# ---- the whole run


def test_equals_a_loop_by_hand(model, folder):
    report = evaluate_segmentation(model, RUNS, open_dataset(folder), resamples=50)
    plain, masks = by_hand(folder, model)
    assert (report.classes, report.crop, report.skipped, report.resumed) == (["a", "b", "c", "d"], (24, 32), [], 0)
    for run, result in zip([None, *RUNS], report.results):
        labels = plain
        if run is not None:
            with tokenzoo.patched(model, run.method, **run.options):
                labels, _ = by_hand(folder, model)
        counted = masks != 255
        assert result.n_images == 7
        assert result.miou.mean == pytest.approx(miou_of(labels, masks), abs=1e-4)
        assert 100 * result.scores.aacc == pytest.approx(100 * (labels == masks)[counted].double().mean().item())
        assert result.agreement == pytest.approx(100 * (labels == plain)[counted].double().mean().item())
        averaged = np.mean([miou_of(one, mask) for one, mask in zip(labels[:, None], masks[:, None])])
        assert abs(averaged - result.miou.mean) > 0.1, "the case cannot tell the mean over images apart"
        if run is None:
            assert result.diff_miou is None and result.diff_pixel_acc is None and result.method == "unpatched"
            continue
        assert result.diff_miou.mean == pytest.approx(miou_of(labels, masks) - miou_of(plain, masks), abs=1e-4)
        shares = [
            [(p == m)[m != 255].double().mean().item() for p, m in zip(which, masks)] for which in (labels, plain)
        ]
        differences = 100 * (np.array(shares[0]) - np.array(shares[1]))
        assert result.diff_pixel_acc.mean == pytest.approx(differences.mean())
        assert result.diff_pixel_acc.se == pytest.approx(differences.std(ddof=1) / math.sqrt(7))
        assert result.agreement < 100 and result.diff_miou.se > 0
    assert not tokenzoo.apply.patch.is_patched(model)


def test_differences_are_paired(model, folder):
    """The same pictures are drawn for both: at no reduction there is nothing between them."""
    report = evaluate_segmentation(model, [Run("tome", {"r": 0})], open_dataset(folder), resamples=50)
    assert report.results[1].miou.se > 0
    assert report.results[1].diff_miou == (0, 0) and report.results[1].diff_pixel_acc == (0, 0)


def test_any_module_can_be_scored(folder):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, K, 1)

        def forward(self, images):
            return self.conv(images)

    torch.manual_seed(0)
    toy = Toy()
    dataset = open_dataset(folder, num_classes=K)
    (result,) = evaluate_segmentation(toy, [], dataset, mean=[0.5] * 3, std=[0.5] * 3).results
    toy.mean = toy.std = (0.5,) * 3
    labels, masks = by_hand(folder, toy)
    assert result.miou.mean == pytest.approx(miou_of(labels, masks), abs=1e-4)
    assert result.macs is None and result.speed is None
    with pytest.raises(ValueError, match="neither the data set nor the model says how many classes"):
        evaluate_segmentation(toy, [], open_dataset(folder))
    with pytest.raises(ValueError, match="mean=None: give three values"):
        toy.mean = None
        evaluate_segmentation(toy, [], dataset)


def test_usual_inference(model):
    assert default_inference(model) == Inference()
    model.window, model.stride = 512, 480
    assert default_inference(model, "ade20k", 4) == Inference("segmenter", 512, 480, (2048, 512), batch_size=4)
    assert default_inference(model, "cityscapes").limits == (2048, 1024)
    assert default_inference(model).limits is None


@pytest.mark.parametrize("head", ["linear", "mask"])
def test_multiply_adds_equal_tracing(head):
    model = build(head)
    crops = torch.randn(2, 3, 24, 32)
    for run in [None, *RUNS]:
        if run is not None:
            tokenzoo.patch_model(model, run.method, **run.options)
        found = dense_macs(model, crops)
        traced = count_macs(_Encoder(model.encoder, crops[:1]), (3, 24, 32)).total
        assert found.encoder == pytest.approx(traced, rel=0.01)
        assert found.decoder == model.head_macs(12, (3, 4))
        assert found.tokens_out == tokenzoo.report(model).tokens_out
        if run is not None:
            tokenzoo.unpatch_model(model)
    # an odd size is padded to whole patches
    assert dense_macs(model, torch.randn(1, 3, 17, 25)) == dense_macs(model, crops)


def test_multiply_adds_of_data_dependent_methods_are_those_of_real_crops(model):
    flat = torch.zeros(1, 3, 24, 32)
    noise = 3 * torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    tokenzoo.patch_model(model, "ats", layers=[0])
    found = [dense_macs(model, crops) for crops in (flat, noise, torch.cat([flat, noise]))]
    assert found[0].tokens_out != found[1].tokens_out
    assert found[2].tokens_out == (found[0].tokens_out + found[1].tokens_out) / 2
    assert found[2].encoder == (found[0].encoder + found[1].encoder) / 2 < tokenzoo.report(model).total


def test_decoders_without_a_formula_are_counted_by_layer(model):
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.up = nn.ConvTranspose2d(K, 3, 2, 2)
            self.smooth = nn.Conv2d(3, 6, 3, padding=1, groups=3)

        @property
        def tokenzoo_backbone(self):
            return self.inner.encoder

        def forward(self, images):
            return self.smooth(self.up(self.inner(images)))

    macs = dense_macs(Other(model), torch.randn(1, 3, 24, 32))
    pixels = 24 * 32
    assert macs.decoder == model.head_macs(12, (3, 4)) + pixels * K * 3 * 4 + 4 * pixels * 6 * 9
    assert macs.encoder == dense_macs(model, torch.randn(1, 3, 24, 32)).encoder


def test_speed(model, folder):
    report = evaluate_segmentation(model, RUNS, open_dataset(folder), speed_rounds=3, speed_batch=2, resamples=5)
    for result in report.results:
        assert len(result.speed.step_times) == len(result.speed.speedups) == 3 and result.speed.batch_size == 2
        assert result.img_per_sec == pytest.approx(2 / sorted(result.speed.step_times)[1])
    assert report.results[0].speed.speedups == [1, 1, 1]


def test_precision(model, folder):
    dataset = open_dataset(folder)
    (half,) = evaluate_segmentation(model, [], dataset, precision=Precision(torch.bfloat16)).results
    (amp,) = evaluate_segmentation(model, [], dataset, precision=Precision(amp=torch.bfloat16)).results
    (full,) = evaluate_segmentation(model, [], dataset).results
    assert abs(half.miou.mean - full.miou.mean) < 5 and abs(amp.miou.mean - full.miou.mean) < 5
    assert next(model.parameters()).dtype == torch.float32


def test_out_of_memory_halves_the_windows(model, folder, monkeypatch, caplog):
    settings = Inference("mmseg", 16, 8, batch_size=8)
    dataset = open_dataset(folder)
    expected = evaluate_segmentation(model, [], dataset, inference=settings, resamples=5)
    forward = type(model).forward

    def short(self, images):
        if len(images) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", short)
    limit = 3
    found = evaluate_segmentation(model, [], dataset, inference=settings, resamples=5)
    assert found.results[0].miou == expected.results[0].miou and found.inference.batch_size == 2
    assert "going on with 2 windows at a time" in caplog.text
    limit = 0
    with pytest.raises(ValueError, match="not even one window of an image of 32x24"):
        evaluate_segmentation(model, [], dataset, inference=settings)


def test_scores_that_are_no_numbers_are_reported(model, folder, caplog):
    with torch.no_grad():
        model.decoder.head.bias[1] = math.nan
    evaluate_segmentation(model, [], open_dataset(folder), resamples=5)
    assert "scores of 7 images are not finite" in caplog.text


# ---- ended runs


class Stop(Exception):
    """Ends a run where a test wants it."""


def stop_after(monkeypatch, calls: int) -> list[int]:
    """Lets predictors answer so many times; returns a list with one entry an answer."""
    done: list[int] = []
    answer = Predictor.__call__

    def limited(self, picture):
        if len(done) == calls:
            raise Stop
        done.append(1)
        return answer(self, picture)

    monkeypatch.setattr(inference_module.Predictor, "__call__", limited)
    return done


def test_a_run_goes_on_where_it_was_ended(model, folder, tmp_path, monkeypatch):
    dataset, state = open_dataset(folder), tmp_path / "state"
    expected = evaluate_segmentation(model, RUNS, dataset, resamples=20)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3 * 4 + 1)  # four pictures, and one run of the fifth
        evaluate_segmentation(model, RUNS, dataset, state=state, resamples=20)
    files = sorted(state.iterdir())
    assert len(files) == 3
    for file in files[:2]:  # ended within a line
        file.write_bytes(file.read_bytes() + b'["p9", 12, true, [[0, 1')
    with monkeypatch.context() as patch:
        done = stop_after(patch, 1000)
        found = evaluate_segmentation(model, RUNS, dataset, state=state, resamples=20)
    assert len(done) == 3 * 3 and found.resumed == 4
    for one, other in zip(found.results, expected.results):
        assert one.row(found.classes) == other.row(expected.classes)
    with monkeypatch.context() as patch:
        done = stop_after(patch, 1000)
        again = evaluate_segmentation(model, RUNS, dataset, state=state, resamples=20)
        assert not done and again.resumed == 7 and again.results[1].miou == expected.results[1].miou
        # a method that is added needs the unpatched answers for its agreement, and nothing else
        more = evaluate_segmentation(model, [*RUNS, Run("tome", {"r": 2})], dataset, state=state, resamples=20)
    assert len(done) == 2 * 7
    fresh = evaluate_segmentation(model, [Run("tome", {"r": 2})], dataset, resamples=20)
    assert more.results[3].row(more.classes) == fresh.results[1].row(fresh.classes)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tokenzoo.cli import main
from tokenzoo.evaluation import inference
answer, left = inference.Predictor.__call__, [7]

def limited(self, picture):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, picture)

inference.Predictor.__call__ = limited
main(sys.argv[1:])
"""


def test_a_killed_command_goes_on(model, folder, tmp_path, capsys):
    checkpoint = save_segmenter(model, tmp_path / "m.safetensors")
    words = ["segment", "eval", "--checkpoint", str(checkpoint), "--data-dir", str(folder), "--device", "cpu"]
    words += ["--num-bench-iter", "0", "--method", "tome", "r=4", "--results-file", str(tmp_path / "r.json")]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "r.json").exists()
    assert main(words) == 0
    assert "3 images were counted already" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    (tmp_path / "r.json").unlink()
    assert main([*words, "--state", str(tmp_path / "elsewhere")]) == 0
    assert "counted already" not in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["results"] == results


def test_counts_of_another_run_are_not_taken(model, folder, tmp_path, monkeypatch):
    state = tmp_path / "state"

    def resumed(**options) -> int:
        given = {"state": state, "resamples": 5, **options}
        return evaluate_segmentation(model, [], open_dataset(folder), **given).resumed

    assert resumed() == 0 and resumed() == 7
    assert resumed(inference=Inference(batch_size=3)) == 7  # how many at a time changes nothing
    assert resumed(inference=Inference(flip=True)) == 0
    assert resumed(mean=[0.4] * 3) == 0
    assert resumed(precision=Precision(torch.bfloat16)) == 0
    with torch.no_grad():
        model.decoder.head.bias[0] += 1e-3
    assert resumed() == 0 and resumed() == 7
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "masks/p0.png")
    assert resumed() == 0


def test_counts_of_other_weights_in_a_folder_are_not_taken(model, folder, tmp_path):
    """A folder keeps its name when it is trained further; what its weights answered before is no answer now."""

    def resumed() -> int:
        given = {"state": tmp_path / "state", "resamples": 5}
        return evaluate_segmentation(model, [Run(str(tmp_path / "run"))], open_dataset(folder), **given).resumed

    trained = tokenzoo.patch_model(copy.deepcopy(model), "tome", r=4)
    tokenzoo.save(trained, tmp_path / "run")
    assert resumed() == 0 and resumed() == 7
    with torch.no_grad():
        trained.decoder.head.bias[0] += 1e-3
    tokenzoo.save(trained, tmp_path / "run")
    assert resumed() == 0 and resumed() == 7


def test_damaged_state_is_named(model, folder, tmp_path):
    state, dataset = tmp_path / "state", open_dataset(folder)
    evaluate_segmentation(model, [], dataset, state=state, resamples=5)
    (file,) = state.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    for damage in (lines[:2] + ["{]\n"] + lines[2:], [lines[0], '["p0", 1]\n'], ["{}\n", *lines[1:]]):
        file.write_text("".join(damage))
        with pytest.raises(ValueError, match=f"{file.name} is damaged .*delete it to start this run anew"):
            evaluate_segmentation(model, [], dataset, state=state)
    with pytest.raises(ValueError, match="is not a folder"):
        evaluate_segmentation(model, [], dataset, state=folder / "masks/p0.png")


# ---- broken files


def test_a_broken_file_in_the_middle(model, folder, tmp_path, monkeypatch, caplog):
    good = open_dataset(folder)
    (folder / "masks/p3.png").write_bytes((folder / "masks/p3.png").read_bytes()[:60])
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "masks/p5.png")
    expected = evaluate_segmentation(model, RUNS, good.subset([0, 1, 2, 4, 6]), resamples=20)
    state = tmp_path / "state"
    with pytest.raises(ValueError, match="masks/p3.png cannot be read .*--skip-broken; counts so far are kept in"):
        evaluate_segmentation(model, RUNS, open_dataset(folder), state=state)
    with monkeypatch.context() as patch:
        done = stop_after(patch, 1000)
        found = evaluate_segmentation(
            model, RUNS, open_dataset(folder), state=state, skip_broken=True, workers=2, resamples=20
        )
    assert len(done) == 3 * 2 and found.resumed == 3  # what was counted before the first broken file is not lost
    assert [name for name, _ in found.skipped] == ["p3", "p5"]
    assert "is 32x24, its mask" in found.skipped[1].reason
    assert "2 broken images left out: p3, p5" in caplog.text
    for one, other in zip(found.results, expected.results):
        assert one.row(found.classes) == other.row(expected.classes)
    assert all(row["n_skipped"] == 2 for row in found.rows())


def test_missing_masks_are_said_at_once(model, folder, monkeypatch):
    (folder / "masks/p6.png").unlink()
    done = stop_after(monkeypatch, 1000)
    with pytest.raises(ValueError, match="1 of 7 images have no mask, such as p6"):
        evaluate_segmentation(model, [], open_dataset(folder))
    assert not done
    report = evaluate_segmentation(model, [], open_dataset(folder), skip_broken=True, resamples=5)
    assert [name for name, _ in report.skipped] == ["p6"]


def test_bad_input_is_named(model, folder, tmp_path):
    dataset = open_dataset(folder)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 7 images can be used; the first: .*p0.png cannot be read"):
        evaluate_segmentation(model, [], dataset, skip_broken=True)
    dataset = open_dataset(draw(tmp_path / "more"))
    with pytest.raises(ValueError, match="answers with 4 classes, the data set has 5"):
        evaluate_segmentation(model, [], open_dataset(tmp_path / "more", num_classes=5))
    with pytest.raises(ValueError, match="opened without masks"):
        evaluate_segmentation(model, [], open_dataset(tmp_path / "more", masks=False))
    with pytest.raises(ValueError, match="tome at block 0: r=100 cannot be reached"):
        evaluate_segmentation(model, [Run("tome", {"r": 100})], dataset)
    Image.fromarray(np.full((24, 32), 4, np.uint8)).save(tmp_path / "more/masks/p2.png")
    with pytest.raises(ValueError, match="masks/p2.png holds class 4, there are only 4"):
        evaluate_segmentation(model, [], dataset)
    with tokenzoo.patched(model, "tome", r=2), pytest.raises(ValueError, match="patched already"):
        evaluate_segmentation(model, [], dataset)


# ---- the command


def test_command(model, folder, tmp_path, capsys):
    checkpoint = save_segmenter(model, tmp_path / "m.safetensors")
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\ncar\n")
    words = ["segment", "eval", "-c", str(checkpoint), "--data-dir", str(folder), "--device", "cpu", "--threads", "1"]
    words += ["--classes", str(tmp_path / "names.txt"), "--method", "tome", "r=4", "--num-bench-iter", "2"]
    for suffix in ("csv", "json"):
        assert main([*words, "--results-file", str(tmp_path / f"r.{suffix}")]) == 0
    out = capsys.readouterr().out
    assert "m.safetensors on data, 7 images, whole images, float32" in out and "GMACs of one crop of 24x32" in out
    assert [line.split()[0] for line in out.split("IoU by class")[1].splitlines()[2:6]] == [
        "sky",
        "road",
        "tree",
        "car",
    ]
    rows = json.loads(out.rsplit("--result\n", 1)[1])
    assert [row["method"] for row in rows] == ["unpatched", "tome"]
    assert set(SEGMENT_COLUMNS) < set(rows[0]) and rows[0]["iou"].keys() == {"sky", "road", "tree", "car"}
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["results"] == rows and stored["environment"]["skipped"] == []
    with (tmp_path / "r.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table[1]["method"] == "tome" and float(table[1]["miou"]) == rows[1]["miou"]
    assert json.loads(table[1]["iou"]) == rows[1]["iou"] and table[0]["diff_miou"] == ""
    assert rows[0]["gmacs"] == pytest.approx(rows[0]["gmacs_encoder"] + rows[0]["gmacs_decoder"], abs=2e-6)


@pytest.mark.parametrize("extra, message", [
    (["--inference", "mmseg"], "--inference mmseg needs --window"),
    (["--inference", "whole", "--stride", "4"], "takes no --window and --stride"),
    (["--window", "16", "--stride", "17"], "leave gaps"),
    (["--resize", "100"], "give the limits of the long and the short side"),
    (["--dataset", "voc2012"], "is no voc2012 data set"),
    (["--dataset", "ade20k", "--ignore", "3"], "is no ade20k data set"),
    (["--method", "tome", "strength=3"], "strength"),
    (["--results-file", "table.txt"], "--results-file table.txt does not end in .csv or .json"),
    (["--checkpoint", "missing.safetensors"], "missing.safetensors does not exist"),
    (["--resamples", "1"], "--resamples at least 2"),
])  # fmt: skip
def test_mistakes_end_in_one_line(model, folder, tmp_path, capsys, extra, message):
    checkpoint = save_segmenter(model, tmp_path / "m.safetensors")
    assert main(["segment", "eval", "-c", str(checkpoint), "--data-dir", str(folder), "--device", "cpu", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("tokenzoo segment: ") and error.count("\n") == 1


@pytest.mark.parametrize("words, expected", [
    ([], Inference(batch_size=8)),
    (["--window", "16"], Inference("segmenter", 16, 16, batch_size=8)),
    (["--inference", "mmseg", "--window", "16", "--stride", "8", "--resize", "64", "32", "-b", "2"],
     Inference("mmseg", 16, 8, (64, 32), batch_size=2)),
    (["--inference", "even", "--window", "24"], Inference("even", 24, batch_size=8)),
    (["--scales", "0.5", "1", "--flip"], Inference(scales=(0.5, 1.0), flip=True, batch_size=8)),
])  # fmt: skip
def test_inference_of_the_command(model, folder, tmp_path, monkeypatch, words, expected):
    from tokenzoo.cli import segment_eval

    seen = []

    def evaluate(*args, inference, **options):
        seen.append(inference)
        return evaluate_segmentation(*args, inference=inference, **{**options, "resamples": 5})

    monkeypatch.setattr(segment_eval, "evaluate_segmentation", evaluate)
    checkpoint = save_segmenter(model, tmp_path / "m.safetensors")
    base = ["segment", "eval", "-c", str(checkpoint), "--data-dir", str(folder), "--device", "cpu"]
    assert main([*base, "--num-bench-iter", "0", *words]) == 0
    assert seen == [expected]


def test_the_bar_counts_pictures(model, folder, capsys):
    evaluate_segmentation(model, [], open_dataset(folder), resamples=5, progress=True)
    assert "7/7" in capsys.readouterr().err
