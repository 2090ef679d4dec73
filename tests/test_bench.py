"""`tokenzoo bench` and its parts: the order of the steps, the ratios, and what is written."""

import csv
import json
import shlex
import statistics
import subprocess
import time

import pytest
import timm
import torch

import tokenzoo
from tokenzoo.cli import bench_command, main
from tokenzoo.evaluation import Precision, Run, bench, environment, plot_speed
from tokenzoo.evaluation.environment import git_state
from tokenzoo.evaluation.results import BENCH_COLUMNS, write_results
from tokenzoo.evaluation.timing import clock_for, interleave

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 4}
RUNS = [Run("tome", {"r": 4}), Run("ats", {"layers": [0]})]


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


class FakeClock:
    """A clock by which the steps take given times, in the order in which they are timed."""

    def __init__(self, durations):
        self.durations = iter(durations)
        self.now = 0.0
        self.running = False

    def __call__(self):
        if self.running:
            self.now += next(self.durations)
        self.running = not self.running
        return self.now


def test_steps_run_round_robin():
    order, clock = [], FakeClock([1, 2, 3, 4, 5, 6])
    times = interleave([lambda n=n: order.append(n) for n in "ABC"], 2, clock)
    assert order == list("ABCABC")
    assert times == [[1, 4], [2, 5], [3, 6]]


def test_models_are_timed_in_turn(model):
    calls = []
    model.patch_embed.register_forward_pre_hook(lambda module, args: calls.append((id(module), len(args[0]))))
    bench(model, RUNS, batch_size=5, rounds=3, warmup=1)
    own = list(dict.fromkeys(i for i, n in calls if n == 5))
    assert len(own) == 3  # every run has modules of its own
    for size in (5, 1):
        timed = [own.index(i) for i, n in calls if n == size][-9:]
        assert timed == [0, 1, 2] * 3


def test_speedup_is_the_median_of_ratios_within_a_round(model):
    # unpatched, tome; rounds of the batch, then of one image
    clock = FakeClock([4, 2, 6, 2, 10, 10, 3, 1, 3, 2, 3, 3])
    plain, tome = bench(model, RUNS[:1], batch_size=2, rounds=3, warmup=1, clock=clock)
    assert plain.step_times == [4, 6, 10] and tome.step_times == [2, 2, 10]
    assert tome.speedups == [2, 3, 1] and tome.speedup == 2  # the ratio of the medians would be 3
    assert plain.speedups == [1, 1, 1]
    assert tome.latency_times == [1, 2, 3] and tome.latency_speedups == [3, 1.5, 1]
    macs = [tokenzoo.report(model).total]
    with tokenzoo.patched(model, "tome", r=4):
        macs.append(tokenzoo.report(model).total)
    assert tome.gmac_ratio == pytest.approx(macs[0] / macs[1]) and tome.gmac_ratio > 1
    assert tome.speedup_per_gmac_ratio == pytest.approx(2 * macs[1] / macs[0])
    row = tome.row()
    assert row["infer_samples_per_sec"] == 1.0 and row["infer_step_time"] == 2000.0
    assert (row["infer_step_time_q1"], row["infer_step_time_q3"]) == (2000.0, 6000.0)
    assert (row["speedup"], row["speedup_q1"], row["speedup_q3"]) == (2.0, 1.5, 2.5)
    assert (row["latency_b1_ms"], row["latency_speedup"]) == (2000.0, 1.5)
    assert row["tokens_out"] == 9.0 and row["infer_batch_size"] == 2 and row["infer_img_size"] == 32


def test_real_times_are_positive_and_the_model_is_left_alone(model):
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    results = bench(model, RUNS, batch_size=2, rounds=3, warmup=1, latency=False)
    assert all(t > 0 for r in results for t in r.step_times)
    assert all(r.latency_times == [] and r.row()["latency_b1_ms"] is None for r in results)
    assert torch.equal(model(images), before) and not tokenzoo.is_patched(model)
    assert [r.method for r in results] == ["unpatched", "tome", "ats"]
    assert 1 < results[2].tokens_out < 17  # a mean over the images


def test_clock_follows_the_threads():
    torch.set_num_threads(1)
    assert clock_for(torch.device("cpu")) == (time.process_time, "cpu time")
    torch.set_num_threads(2)
    assert clock_for(torch.device("cpu")) == (time.perf_counter, "wall time")


def test_out_of_memory_halves_the_batch_of_all(model, caplog):
    def refuse(module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.patch_embed.register_forward_pre_hook(refuse)
    results = bench(model, RUNS, batch_size=8, rounds=1, warmup=1)
    assert [r.batch_size for r in results] == [2, 2, 2]
    assert "going on with batch 4" in caplog.text and "going on with batch 2" in caplog.text


def test_nothing_fits(model):
    def refuse(module, args):
        if torch.is_inference_mode_enabled():  # counting multiply-adds comes before
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model.patch_embed.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=r"not even one image of \(3, 32, 32\) fits.*unpatched.*smaller --img-size"):
        bench(model, RUNS, batch_size=2, rounds=1)


@pytest.mark.parametrize("name", ["batch_size", "rounds", "warmup"])
def test_counts_below_one_are_refused(model, name):
    with pytest.raises(ValueError, match="is 0; give at least 1"):
        bench(model, RUNS, **{name: 0})


def test_precision_is_recorded(model):
    low = bench(model, RUNS, rounds=1, warmup=1, batch_size=1, precision=Precision(torch.bfloat16))
    mixed = bench(model, RUNS, rounds=1, warmup=1, batch_size=1, precision=Precision(amp=torch.bfloat16))
    assert {r.precision for r in low} == {"bfloat16"} and {r.precision for r in mixed} == {"float32, amp bfloat16"}
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_compiled_runs_do_not_fall_back_to_eager():
    """All runs share the code that dynamo caches graphs for, nine methods are more than its default limit."""
    graphs = []

    def backend(module, inputs):
        graphs.append(len(inputs))
        return module.forward

    torch._dynamo.register_backend(backend, name="counting")
    torch._dynamo.reset()
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 1}).eval()
    runs = [*(Run("tome", {"r": r}) for r in range(1, 9)), Run("tome", {"r": 4, "prop_attn": False})]
    results = bench(model, runs, batch_size=2, rounds=1, warmup=1, latency=False, compiler="counting")
    assert len(graphs) == len(results) == 10 and {r.compiled for r in results} == {"counting"}
    torch._dynamo.reset()


def test_unknown_backend_is_refused(model):
    with pytest.raises(ValueError, match="'inductive' is not a backend of torch.compile; use one of .*inductor"):
        bench(model, [], compiler="inductive", rounds=1)


# ---- files


@pytest.fixture
def results(model):
    runs = [Run("tome", {"r": 2}), Run("tome", {"r": 4}), Run("uniform")]
    return bench(model, runs, batch_size=2, rounds=2, warmup=1)


def test_csv_and_json(results, tmp_path):
    rows = [{"model": "tiny", **r.row()} for r in results]
    record = environment("cpu")
    write_results(tmp_path / "a.csv", rows, BENCH_COLUMNS, record)
    write_results(tmp_path / "a.json", rows, BENCH_COLUMNS, record)
    read = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert list(read[0]) == [*BENCH_COLUMNS, *record]
    assert [float(r["speedup"]) for r in read] == [r["speedup"] for r in rows]
    assert json.loads(read[2]["method_kwargs"]) == {"r": 4} and read[0]["torch"] == torch.__version__
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == {"environment": record, "results": rows}
    assert len(written["results"][0]["step_times_ms"]) == 2


def test_plot_shows_every_method(results, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plain = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, **k: drawn.update({k["label"]: (x, y)}) or plain(self, x, y, **k)
    )
    plot_speed(results, tmp_path / "speed.png", "tiny")
    assert set(drawn) == {"unpatched", "tome", "uniform"}
    assert drawn["tome"][0] == pytest.approx([results[1].gmacs / results[0].gmacs, results[2].gmacs / results[0].gmacs])
    assert drawn["tome"][1] == pytest.approx([results[1].speedup, results[2].speedup])
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_environment(tmp_path):
    record = environment("cpu", ["bench", "--plot", "/somewhere/a.png"])
    assert record["tokenzoo"] == tokenzoo.__version__ and record["threads"] == torch.get_num_threads()
    assert record["command"] == "tokenzoo bench --plot a.png" and record["device"]
    assert environment("cpu")["command"] is None
    assert json.loads(json.dumps(record)) == record


def test_git_state(tmp_path):
    def git(*words):
        done = subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) == (None, None)
    git("init")
    assert git_state(package) == (None, None)  # lies in a checkout that does not track it
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", "a")
    assert git_state(package) == (git("rev-parse", "HEAD"), False)
    (package / "__init__.py").write_text("changed = True\n")
    assert git_state(package)[1] is True
    assert git_state(tmp_path / "nowhere") == (None, None)


# ---- the command

SMALL = [
    "bench", "--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", "patch_size=8", "--img-size", "32",
    "--device", "cpu", "--threads", "1", "--batch-size", "2", "--num-warm-iter", "1", "--num-bench-iter", "3",
]  # fmt: skip


def test_command_writes_table_files_and_result_line(tmp_path, capsys):
    files = ["--results-file", str(tmp_path / "out.csv"), "--plot", str(tmp_path / "out.png")]
    assert main([*SMALL, "--method", "tome", "r=4", "--method", "tome", "flops=0.8", *files]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [r["method_kwargs"] for r in rows] == ["", '{"r": 4}', '{"flops": 0.8}']
    assert {r["infer_batch_size"] for r in rows} == {"2"} and {r["threads"] for r in rows} == {"1"}
    for row in rows:
        ratio = float(row["speedup"]) / float(row["gmac_ratio"])
        assert float(row["speedup_per_gmac_ratio"]) == pytest.approx(ratio, abs=2e-4)
    assert (tmp_path / "out.png").is_file()
    assert out.splitlines()[-2] == "--result"
    last = json.loads(out.splitlines()[-1])
    assert [str(r["speedup"]) for r in last] == [r["speedup"] for r in rows]
    assert statistics.median(last[1]["step_times_ms"]) == pytest.approx(last[1]["infer_step_time"], abs=1e-3)
    assert "speed-up / GMAC ratio" in out and "medians of 3 rounds, cpu time" in out


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--plot", "a.pdf"], "--plot a.pdf does not end in .png"),
        (["--results-file", "a.xls"], "a.xls does not end in .csv or .json"),
        (["--num-bench-iter", "0"], "rounds is 0"),
        (["--method", "tome", "q=1"], "tome has no option 'q'"),
    ],
)
def test_command_refuses_with_one_line(capsys, extra, message):
    assert main([*SMALL, *extra]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
def test_example_of_the_help_runs_as_printed(capsys):
    program, *words = shlex.split(bench_command.EXAMPLE)
    assert program == "tokenzoo" and main(words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["method"] for r in rows] == ["unpatched", "tome", "evit"]


def test_a_recipe_file_may_hold_a_budget(tmp_path):
    from tokenzoo.evaluation.runs import Run

    file = tmp_path / "recipe.yaml"
    file.write_text("method: tome\nflops: 0.7\n")
    run = Run(str(file))
    assert run.flops == 0.7 and run.name == "tome" and Run("tome", {"flops": 0.6}).flops == 0.6
    with pytest.raises(ValueError, match="given twice"):
        Run(str(file), {"flops": 0.6}).recipe()


def test_rounds_go_through_images_that_are_given(model):
    """Every round the next batch, the same for all; what is left over is not used; counts are those of the images."""
    torch.manual_seed(1)
    images, seen = torch.randn(7, 3, 32, 32), []
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append((id(module), args[0])))
    plain, _, ats = bench(model, RUNS, batch_size=2, rounds=4, warmup=1, images=images)
    own = list(dict.fromkeys(i for i, x in seen if len(x) == 2))

    def shown(size):
        last = [(own.index(i), x) for i, x in seen if len(x) == size][-12:]
        return [n for n, _ in last], [next(k for k in range(7) if torch.equal(x[0], images[k])) for _, x in last]

    assert shown(2) == ([0, 1, 2] * 4, [0, 0, 0, 2, 2, 2, 4, 4, 4, 0, 0, 0])
    assert shown(1) == ([0, 1, 2] * 4, [n for k in range(4) for n in (k, k, k)])
    with tokenzoo.patched(model, "ats", layers=[0]):
        share = tokenzoo.expected_share(model, images)
        counts = [model.forward_tokens(image).length for image in images[:6].split(1)]
    assert ats.gmacs == pytest.approx(plain.gmacs * share)
    assert ats.tokens_out == pytest.approx(statistics.mean(counts))


@pytest.mark.parametrize(
    "shape, size, message",
    [
        ((2, 3, 32), None, "give normalised ones"),
        ((2, 3, 40, 32), (3, 32, 32), "3, 32, 32"),
        ((1, 3, 32, 32), None, "1 images"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(model, shape, size, message):
    with pytest.raises(ValueError, match=message):
        bench(model, RUNS, batch_size=2, rounds=1, images=torch.zeros(shape), input_size=size)


def test_images_of_a_folder(tmp_path, capsys):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 20, 200)).save(tmp_path / f"{number}.png")
    command = "bench --model vit_tiny_patch16_224 --img-size 32 --model-kwargs patch_size=8 depth=2 --num-classes 4"
    options = f"--batch-size 2 --num-bench-iter 2 --num-warm-iter 1 --method ats layers=[0] --data-dir {tmp_path}"
    assert main([*command.split(), *options.split(), "--no-progress"]) == 0
    assert "ats" in capsys.readouterr().out
    assert main([*command.split(), *options.split(), "--batch-size", "8"]) != 0
    assert "3 images, but a batch is 8" in capsys.readouterr().err
