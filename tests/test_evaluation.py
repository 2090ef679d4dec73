"""`tokenzoo eval` and its parts: the same numbers as a loop written by hand, and every bad input named."""

import csv
import json
import logging
import math
import shlex
import shutil
import statistics
import tarfile

import pytest
import timm
import torch
from PIL import Image

import tokenzoo
from tokenzoo.cli import eval_command, main
from tokenzoo.evaluation import PictureLoader, Precision, Run, data_config, estimate, evaluate, open_pictures
from tokenzoo.evaluation.data import PictureStream
from tokenzoo.evaluation.environment import command_line
from tokenzoo.evaluation.memory import Pieces, is_out_of_memory
from tokenzoo.evaluation.results import EVAL_COLUMNS
from tokenzoo.evaluation.runs import prepare

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 4}
RUNS = [Run("tome", {"r": 4}), Run("evit", {"keep_rate": 0.4, "layers": [0]}), Run("ats", {"layers": [0]})]


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)  # random weights attend evenly; sharper maps differ from picture to picture
    return model


def draw(folder, classes=4, count=6, size=(48, 40)):
    """Folders of random pictures, `class_0` and so on."""
    generator = torch.Generator().manual_seed(1)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
            # a few flat pictures make scores differ more than noise does
            pixels[:: number + 1] = (40 * label + 30 * number) % 256
            Image.fromarray(pixels.numpy()).save(folder / f"class_{label}" / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "images")


def loader_of(model, folder, **options):
    return PictureLoader(open_pictures(folder), data_config(model), **{"batch_size": 7, **options})


def by_hand(folder, model):
    """All pictures and targets, read without any of the code under test."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model))
    files = sorted(folder.glob("*/*.png"))
    images = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    return images, torch.tensor([int(f.parent.name[-1]) for f in files])


# ---- the numbers


def test_equals_a_loop_by_hand(model, folder):
    images, targets = by_hand(folder, model)
    results = evaluate(model, RUNS, loader_of(model, folder))
    with torch.inference_mode():
        plain = model(images)
        for run, result in zip([None, *RUNS], results):
            logits, tokens = plain, 17.0
            if run is not None:
                with tokenzoo.patched(model, run.method, **run.options):
                    logits = model(images)
                    final = model.forward_tokens(images)
                    tokens = final.length if final.valid is None else final.valid.sum(1).double().mean().item()
                    assert run.method != "ats" or tokens < final.length - 0.5, "all images keep the same count"
            right, base = logits.argmax(1) == targets, plain.argmax(1) == targets
            assert result.n_images == len(targets) == 24
            assert result.top1.mean == pytest.approx(100 * right.double().mean().item())
            assert result.top5.mean == 100.0  # four classes
            assert result.agreement == pytest.approx(100 * (logits.argmax(1) == plain.argmax(1)).double().mean().item())
            assert result.tokens_out == pytest.approx(tokens)
            if run is not None:
                differences = (right.double() - base.double()).tolist()
                assert result.diff_top1.mean == pytest.approx(100 * statistics.mean(differences))
                assert result.diff_top1.se == pytest.approx(100 * statistics.stdev(differences) / math.sqrt(24))
    assert any(r.agreement < 100 for r in results), "the case is too easy to tell runs apart"
    assert results[0].diff_top1 is None and results[0].method == "unpatched"


def test_top5_counts_the_five_best(folder):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 12}).eval()
    images, targets = by_hand(folder, model)
    with torch.inference_mode():
        ranks = (model(images).argsort(dim=1, descending=True) == targets[:, None]).int().argmax(1)
    (result,) = evaluate(model, [], loader_of(model, folder))
    assert result.top5.mean == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert result.top1.mean == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert result.top1.mean < result.top5.mean < 100


def test_standard_errors():
    hits = torch.tensor([True, False, True, True, False])
    share = 0.6
    assert estimate(hits) == pytest.approx((60.0, 100 * math.sqrt(share * (1 - share) / 4)))
    paired = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 1.0])
    assert estimate(paired) == pytest.approx((100 / 6, 100 * statistics.stdev(paired.tolist()) / math.sqrt(6)))
    assert estimate(torch.tensor([True])) == (100.0, None)


def test_paired_errors_are_those_of_the_differences_not_of_two_samples(model, folder):
    """A run that agrees everywhere has a difference of 0 without error, however uncertain both accuracies are."""
    result = evaluate(model, [Run("tome", {"r": 0, "layers": [0]})], loader_of(model, folder))[1]
    assert (result.diff_top1, result.agreement) == ((0.0, 0.0), 100.0)
    assert result.top1.se > 1


def test_together_equals_alone(model, folder):
    together = evaluate(model, RUNS, loader_of(model, folder))
    for run, result in zip(RUNS, together[1:]):
        assert evaluate(model, [run], loader_of(model, folder))[1] == result
    assert evaluate(model, [], loader_of(model, folder)) == together[:1]


def test_model_is_left_alone_and_weights_are_shared(model):
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    candidates = prepare(model, RUNS, (3, 32, 32))
    assert torch.equal(model(images), before) and not tokenzoo.is_patched(model)
    assert [tokenzoo.is_patched(c.model) for c in candidates] == [False, True, True, True]
    for candidate in candidates:
        assert all(a is b for a, b in zip(model.parameters(), candidate.model.parameters(), strict=True))
        assert candidate.gmacs == pytest.approx(
            tokenzoo.count_macs(candidate.model, (3, 32, 32)).total / 1e9, rel=0.005
        )
    assert candidates[1].gmacs < candidates[0].gmacs


def test_recipe_of_a_result_gives_the_same_run_again(model, folder):
    result = evaluate(model, [Run("tome", {"flops": 0.8})], loader_of(model, folder))[1]
    assert result.method_kwargs == {"flops": 0.8} and "flops" not in result.recipe
    again = evaluate(model, [Run(result.recipe)], loader_of(model, folder))[1]
    assert (again.top1, again.gmacs, again.agreement) == (result.top1, result.gmacs, result.agreement)
    assert again.method == "tome"


def test_composition_is_one_run(model, folder):
    both = [{"method": "evit", "layers": [0], "keep_rate": 0.5}, {"method": "tome", "layers": [1], "r": 2}]
    result = evaluate(model, [Run(both)], loader_of(model, folder))[1]
    assert (result.method, result.tokens_out) == ("evit+tome", 1 + 8 + 1 - 2)


def test_patched_model_is_refused(model, folder):
    tokenzoo.patch_model(model, "tome", r=2)
    with pytest.raises(ValueError, match="VisionTransformer is patched already.*unpatch_model"):
        evaluate(model, RUNS, loader_of(model, folder))


def test_backbone_without_tokens_can_be_the_only_run(folder):
    model = timm.create_model("resnet10t", num_classes=4).eval()
    (result,) = evaluate(
        model, [], PictureLoader(open_pictures(folder), data_config(model, [64])), input_size=(3, 64, 64)
    )
    assert (result.tokens_out, result.attn_impl, result.n_images) == (None, "", 24)
    with pytest.raises(TypeError, match="ResNet"):
        evaluate(model, [Run("tome")], [])


def test_attention_path(model):
    assert [c.attn_impl for c in prepare(model, RUNS[:1], (3, 32, 32))] == ["fused", "fused"]
    model.blocks[1].attn.fused_attn = False
    assert [c.attn_impl for c in prepare(model, RUNS[:1], (3, 32, 32))] == ["unfused", "unfused"]


@pytest.mark.parametrize("precision", [Precision(torch.bfloat16), Precision(amp=torch.bfloat16)])
def test_low_precision_leaves_the_weights_alone(model, folder, precision):
    results = evaluate(model, RUNS, loader_of(model, folder), precision=precision)
    assert {r.n_images for r in results} == {24}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_scores_that_are_not_finite_are_told(model, folder, caplog):
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    evaluate(model, [], loader_of(model, folder))
    assert "unpatched: scores of 24 images are not finite" in caplog.text


@pytest.mark.parametrize("target", [-1, 4])
def test_targets_outside_the_model_are_refused(model, target):
    with pytest.raises(ValueError, match=f"class index {target}, the model answers with 4 classes"):
        evaluate(model, [], [(torch.randn(2, 3, 32, 32), torch.tensor([0, target]))])


def test_no_batches_are_refused(model):
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(model, [], [])


# ---- memory


def refuse_large(module, args):
    """Stands for a device that holds three pictures."""
    SEEN.append(len(args[0]))
    if len(args[0]) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


SEEN: list[int] = []


def test_out_of_memory_halves_the_batch_and_repeats_the_pictures(model, folder, caplog):
    expected = evaluate(model, RUNS, loader_of(model, folder))
    model.patch_embed.register_forward_pre_hook(refuse_large)
    SEEN.clear()
    results = evaluate(model, RUNS, loader_of(model, folder, batch_size=12))
    tried = [n for n in SEEN if n > 1]  # counting multiply-adds takes one picture
    assert tried == [12, 6, *[3] * 32]  # two batches, four models
    assert [(r.top1, r.diff_top1, r.agreement, r.tokens_out) for r in results] == [
        (r.top1, r.diff_top1, r.agreement, r.tokens_out) for r in expected
    ]
    assert "unpatched: out of memory at batch 12, going on with 6" in caplog.text
    assert "unpatched: out of memory at batch 6, going on with 3" in caplog.text


def test_one_picture_that_does_not_fit_ends_with_a_remedy():
    def step(piece):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore")

    with pytest.raises(ValueError, match=r"tome r=4: not even one image of \(3, 8, 8\).*cpu.*smaller --img-size"):
        Pieces(torch.device("cpu")).run(step, torch.zeros(5, 3, 8, 8), "tome r=4")


def test_other_errors_are_not_taken_for_memory():
    def step(piece):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Pieces(torch.device("cpu")).run(step, torch.zeros(5, 3, 8, 8))


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_memory(error, expected):
    assert is_out_of_memory(error) is expected


# ---- pictures


def cut(file, share=0.5):
    """Keeps the first part of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_picture_is_named(model, folder, workers):
    cut(folder / "class_2" / "3.png")
    with pytest.raises(ValueError, match=r"class_2/3\.png cannot be read \(OSError.*--skip-broken"):
        evaluate(model, [], loader_of(model, folder, workers=workers))


def test_broken_pictures_are_skipped_counted_and_named(model, folder, caplog):
    Image.open(folder / "class_1" / "0.png").save(folder / "class_1" / "z.jpg")
    cut(folder / "class_1" / "z.jpg")
    (folder / "class_0" / "0.png").write_text("no image")
    (folder / "class_3" / "5.png").write_bytes(b"")
    loader = loader_of(model, folder, batch_size=1, skip_broken=True)
    (result,) = evaluate(model, [], loader)
    assert result.n_images == 22
    assert [name.rsplit("images/")[1] for name, _ in loader.skipped] == [
        "class_0/0.png",
        "class_1/z.jpg",
        "class_3/5.png",
    ]
    assert "3 broken images left out" in caplog.text
    for name in ("class_0/0.png", "class_3/5.png"):
        (folder / name).unlink()
    (folder / "class_1" / "z.jpg").unlink()
    (clean,) = evaluate(model, [], loader_of(model, folder))
    assert clean == result


def test_tar_file_gives_the_same(model, folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, "images")
    assert evaluate(model, RUNS, loader_of(model, tmp_path / "images.tar")) == evaluate(
        model, RUNS, loader_of(model, folder)
    )


def test_broken_archive_member_is_named(model, folder, tmp_path):
    cut(folder / "class_2" / "3.png")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, "images")
    with pytest.raises(ValueError, match=r"images/class_2/3\.png cannot be read"):
        evaluate(model, [], loader_of(model, tmp_path / "images.tar"))


def test_torchvision_data_set(model, folder):
    pictures = open_pictures(folder, "torch/image_folder")
    cut(folder / "class_2" / "3.png")
    loader = PictureLoader(pictures, data_config(model), skip_broken=True)
    (result,) = evaluate(model, [], loader)
    assert result.n_images == 23 and loader.skipped[0].name.endswith("class_2/3.png")


def test_stream(model, folder):
    """Data sets that can only be read in order: same pictures, and a broken one ends the run with its number."""

    class Source:
        reader = [(Image.open(f), int(f.parent.name[-1])) for f in sorted(folder.glob("*/*.png"))]

    loader = PictureLoader(PictureStream(Source()), data_config(model), batch_size=7, workers=2)
    assert evaluate(model, RUNS, loader) == evaluate(model, RUNS, loader_of(model, folder))

    class Broken:
        @property
        def reader(self):
            yield Image.new("RGB", (32, 32)), 0
            raise OSError("end of file")

    with pytest.raises(ValueError, match="image number 1 of the stream cannot be read .*end of file"):
        evaluate(model, [], PictureLoader(PictureStream(Broken()), data_config(model)))


def test_split_folder_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set" / "val")
    draw(tmp_path / "set" / "train", count=1)
    assert len(open_pictures(tmp_path / "set")) == 24
    assert len(open_pictures(tmp_path / "set", split="train")) == 4


def test_grey_models_read_grey(folder):
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, **TINY).eval()
    with pytest.raises(ValueError, match="takes 1 channels, its configuration has a mean for 3; give --mean"):
        data_config(model)
    loader = PictureLoader(open_pictures(folder), data_config(model, mean=[0.5], std=[0.25]))
    images, _ = next(iter(loader))
    assert images.shape == (24, 1, 32, 32)


def no_pictures(folder):
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "missing", r"missing does not exist; give a folder"),
        (lambda p: no_pictures(p / "bare"), r"bare holds no images.*\.png, \.jpg, \.jpeg"),
        (lambda p: (p / "file.tar", (p / "file.tar").write_bytes(b"x"))[0], r"file\.tar holds no images"),
        (lambda p: draw(p / "flat", 1, 1) / "class_0", r"class_0 itself holds images, such as 0\.png.*one subfolder"),
    ],
)
def test_folders_without_labelled_pictures_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_pictures(make(tmp_path))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'torch/nothing', split 'validation', could not be opened"):
        open_pictures(tmp_path, "torch/nothing")


def test_class_map_gives_the_indices(model, folder, tmp_path, caplog):
    names = tmp_path / "classes.txt"
    names.write_text("class_3\nclass_1\nclass_0\n")
    pictures = open_pictures(folder, class_map=names)
    targets = torch.cat([t for _, t in PictureLoader(pictures, data_config(model))])
    assert targets.tolist() == [2] * 6 + [1] * 6 + [0] * 6
    assert pictures.num_classes == 3
    assert "6 images left out: the class map does not name class_2" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("class_0\nclass_1\nclass_0\n", "holds a name twice"),
        ("class_0\n\nclass_1\n", "holds an empty line"),
        ("cat\ndog\n", "holds no images in subfolders named in the class map"),
    ],
)
def test_unusable_class_maps_are_refused(folder, tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_pictures(folder, class_map=tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=r"class map nowhere\.txt does not exist"):
        open_pictures(folder, class_map="nowhere.txt")


def test_patches_of_features_do_not_hide_the_channels_of_the_image():
    """A network in front of the patches: its first layer says what an image is, not the patch embedding."""
    hybrid = timm.create_model(
        "vit_tiny_r_s16_p8_224", img_size=64, patch_size=1, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    assert data_config(hybrid, mean=[0.5, 0.4, 0.3])["input_size"] == (3, 64, 64)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hybrid(image)
        with tokenzoo.patched(hybrid, "tome", r=0):
            torch.testing.assert_close(hybrid(image), expected, atol=1e-5, rtol=1e-5)


def test_data_config_follows_the_model_and_its_overrides(model):
    config = data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == model.pretrained_cfg["crop_pct"]
    config = data_config(
        model, [48, 64], crop_pct=0.5, crop_mode="squash", interpolation="bilinear", mean=[0.1], std=[1, 2, 3]
    )
    assert config["input_size"] == (3, 48, 64)
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.5, "squash", "bilinear")
    assert tuple(config["mean"]) == (0.1, 0.1, 0.1) and tuple(config["std"]) == (1, 2, 3)
    with pytest.raises(ValueError, match="--std has 2 values"):
        data_config(model, std=[1, 2])
    with pytest.raises(ValueError, match="--crop-pct 1.5"):
        data_config(model, crop_pct=1.5)


# ---- the command

SMALL = [
    "eval", "--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", "patch_size=8", "--img-size", "32",
    "--num-classes", "4", "--workers", "0", "--device", "cpu",
]  # fmt: skip


def test_command_writes_table_csv_and_result_line(folder, tmp_path, capsys):
    file = tmp_path / "out.csv"
    assert (
        main(
            [
                *SMALL,
                "--data-dir",
                str(folder),
                "--method",
                "tome",
                "r=4",
                "--method",
                "evit",
                "--results-file",
                str(file),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    rows = list(csv.DictReader(file.open()))
    assert list(rows[0])[: len(EVAL_COLUMNS)] == list(EVAL_COLUMNS)
    assert {"torch", "timm", "tokenzoo", "device", "threads", "commit", "dirty", "command"} <= set(rows[0])
    assert [r["method"] for r in rows] == ["unpatched", "tome", "evit"]
    assert [r["method_kwargs"] for r in rows] == ["", '{"r": 4}', ""]
    assert rows[1]["tokens_out"] == "9.0" and rows[1]["n_images"] == "24" and rows[1]["img_size"] == "32"
    assert float(rows[1]["top1"]) + float(rows[1]["top1_err"]) == pytest.approx(100)
    assert rows[0]["diff_top1"] == "" and rows[1]["diff_top1"] != ""
    last = json.loads(out.splitlines()[-1])
    assert out.splitlines()[-2] == "--result"
    assert [str(r["top1"]) for r in last] == [r["top1"] for r in rows]
    assert "tome r=4" in out and "fused" in out


def test_command_names_what_it_skipped(folder, tmp_path, capsys):
    cut(folder / "class_2" / "3.png")
    command = [*SMALL, "--data-dir", str(folder)]
    assert main(command) == 2
    assert "class_2/3.png cannot be read" in capsys.readouterr().err
    assert main([*command, "--skip-broken", "--results-file", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "broken images skipped: 1" in out and "class_2/3.png (OSError" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["skipped"] == ["class_2/3.png"]
    assert written["results"][0]["n_skipped"] == 1 and written["results"][0]["n_images"] == 23
    assert str(tmp_path) not in json.dumps(written)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--results-file", "out.txt"], "out.txt does not end in .csv or .json"),
        (["--results-file", "nowhere/out.csv"], "the folder nowhere does not exist"),
        (["--method", "tomee"], "did you mean 'tome'"),
        (["--method", "tome", "r=40"], "r=40 cannot be reached"),
        (["--num-classes", "3"], "the images have 4 classes, the model answers with 3"),
        (["--batch-size", "0"], "--batch-size 0 is not positive"),
    ],
)
def test_command_refuses_with_one_line(folder, capsys, extra, message):
    assert main([*SMALL, "--data-dir", str(folder), *extra]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_command_needs_pictures(capsys):
    assert main(SMALL) == 2
    assert "give --data-dir" in capsys.readouterr().err


def test_command_tells_when_class_numbers_are_assumed(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert main([*SMALL, "--data-dir", str(folder), "--num-classes", "10"]) == 0
    assert "folders in sorted order are taken as its classes 0 to 3" in caplog.text


def test_example_of_the_help_runs_as_printed(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "images", classes=10, count=1)
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(eval_command.EXAMPLE)
    assert program == "tokenzoo" and main(words) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        (["eval", "--data-dir", "/home/me/images/"], "tokenzoo eval --data-dir images/"),
        (["eval", "--results-file=/home/me/a.csv", "/tmp"], "tokenzoo eval --results-file=a.csv tmp"),
        (["eval", "--data-dir", "images/val", "a=[1]"], "tokenzoo eval --data-dir images/val 'a=[1]'"),
    ],
)
def test_recorded_command_holds_no_path_of_the_machine(words, expected):
    assert command_line(words) == expected
