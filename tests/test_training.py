"""The parts of a training run: recorded losses and schedules, every method, order of pictures, streams, checkpoints."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import tarfile
from contextlib import nullcontext
from dataclasses import dataclass

import cases as vit_cases
import pytest
import scan_cases
import timm
import timm.models.vision_transformer
import torch
import yaml
from cases import METHODS, backbone_names, build, given, images, serves
from goldens import Case, cases, check_settings, close, read
from PIL import Image
from test_golden_mctf import options
from test_train_imagenet import main, result_of, same, torchrun  # noqa: F401 (main is a fixture)
from torch import nn
from training_data import ROOT, draw, picture, words

import tokenzoo
from tokenzoo.training.augment import Posterize, training_transform
from tokenzoo.training.build import build as build_model
from tokenzoo.training.checkpoints import Checkpoints, Place, damage_of
from tokenzoo.training.keep_rate import KeepRateWarmup
from tokenzoo.training.losses import TrainStep, distillation, second_strength, unused_parameters
from tokenzoo.training.optim import Schedule, build_optimizer, learning_rate
from tokenzoo.training.options import build_parser, parse_options
from tokenzoo.training.sampling import EpochOrder, Streamed
from tokenzoo.training.seeds import seed_everything
from tokenzoo.training.validation import unpatched_view


def defaults(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(build_parser().parse_args([])), **changes})


# ---- recorded numbers


@cases("mctf", lambda c: c.has("out_loss_consistency"))
def test_consistency_of_a_training_step(case: Case, monkeypatch):
    """The loss of the script, tasks left out, and its gradients."""
    s = case.settings
    check_settings(s, "activate", "r_student", "r_teacher_used", "threshold", "mctf_type", "note")
    targets = case["targets"]
    names = ("r", "r_teacher", "trace", "prop_attn", "one_step_ahead", "tau_sim", "tau_info", "tau_size", "bidirection",
             "pooling_type")  # fmt: skip
    model = case.model().train()
    setting = {**dict(zip(names, s["mctf_type"])), "activate": s["activate"]}
    tokenzoo.patch_model(model, "mctf", **options(setting, s["r_student"]))
    args = defaults(consistency=3.0, consistency_threshold=s["threshold"], consistency_task=0.0, smoothing=0.0)
    monkeypatch.setattr("tokenzoo.training.losses.second_strength", lambda *_: s["r_teacher_used"])
    losses = TrainStep(model, None, args).train()(case.input(len(targets)), targets)
    close(losses["consistency"].reshape(1), case["out_loss_consistency"])
    assert losses["loss"].item() == pytest.approx((losses["task"] + 3 * losses["consistency"]).item(), rel=1e-6)
    losses["consistency"].backward()
    parameters = {name.replace(".", "_"): p for name, p in model.named_parameters()}
    found = case.matching(r"out_grad_.*")
    assert found
    for key, expected in found.items():
        grad = parameters[key[len("out_grad_") :].replace(".", "_")].grad
        close(torch.zeros_like(expected) if grad is None else grad, expected)


@cases("evit", lambda c: c.short.startswith("ipe"))
def test_keep_rate_of_a_run(case: Case):
    steps, start, length, target = re.fullmatch(r"ipe(\d+)_start(\d+)_shrink(\d+)_base([\d.]+)", case.short).groups()
    model = build("deit")
    tokenzoo.patch_model(model, "evit", keep_rate=float(target))
    warmup = KeepRateWarmup(model, defaults(shrink_start_epoch=int(start), shrink_epochs=int(length)), int(steps))
    for update, epoch, rate in read(case.file)[0][case.name].tolist():
        assert abs(warmup.set(model, int(epoch), int(update)) - rate) < 1e-6
        assert tokenzoo.recipe(model).get("keep_rate", 0.7) == pytest.approx(rate)


# ---- losses

STEPS = [("deit", method) for method in METHODS]
STEPS += [(backbone, method) for backbone in scan_cases.CORE for method in scan_cases.SCAN_METHODS]


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backbone, method", STEPS)
def test_two_steps_with_every_method(backbone, method, amp):
    models = scan_cases if backbone in scan_cases.SCANNERS else vit_cases
    model = models.build(backbone).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokenzoo.patch_model(model, models.given(method))
    step = TrainStep(model, None, defaults()).train()
    x, target = models.images(model, 4), torch.arange(4)

    def context():
        return nullcontext() if amp is None else torch.autocast("cpu", amp)

    assert unused_parameters(step, (x, target), context()) == []
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(2):
        with context():
            loss = step(x, target)["loss"]
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("backbone", sorted({"gap", "dinov3", "t2t_vit", "distilled"} & set(backbone_names())))
def test_steps_on_other_backbones(backbone):
    for method in METHODS:
        model = build(backbone).train()
        if serves(method, model):
            tokenzoo.patch_model(model, given(method))
            step = TrainStep(model, None, defaults()).train()
            assert step(images(model, 2), torch.arange(2))["loss"].isfinite(), method


def test_parameters_without_gradient_are_named():
    model = build("deit").train()
    model.blocks[1].spare = nn.Linear(2, 2)
    step = TrainStep(model, None, defaults()).train()
    batch = images(model, 2), torch.arange(2)
    assert unused_parameters(step, batch, nullcontext()) == ["blocks.1.spare.weight", "blocks.1.spare.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_distillation_equals_its_formula():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    p = b.softmax(1)
    assert distillation(a, b).item() == pytest.approx(((p * (b.log_softmax(1) - a.log_softmax(1))).sum() / 5).item())
    assert distillation(b, b).item() == pytest.approx(0, abs=1e-6)
    p, q = (b / 2).softmax(1), (a / 2).softmax(1)
    assert distillation(a, b, 2.0).item() == pytest.approx((4 * (p * (p.log() - q.log())).sum() / 5).item())


def test_weaker_strengths():
    counts = [second_strength(16, 8, 0, update) for update in range(400)]
    assert set(counts) == set(range(8)) and counts == [second_strength(16, 8, 0, u) for u in range(400)]
    shares = [second_strength(0.35, 0.2, 0, update) for update in range(400)]
    assert set(shares) == {i / 100 for i in range(20)}


def test_the_second_pass_leaves_the_model_alone():
    model = build("deit").train()
    tokenzoo.patch_model(model, "mctf", r=3, min_tokens=4)
    step = TrainStep(model, None, defaults(consistency=1.0)).train()
    names = [name for name, _ in step.named_parameters()]
    assert names == [f"model.{name}" for name, _ in model.named_parameters()]
    for update in range(3):
        step(images(model, 2), torch.arange(2), update)
    assert tokenzoo.recipe(model)["r"] == 3
    with pytest.raises(ValueError, match="--consistency-r 4 has to lie above 0 and not above r=3"):
        TrainStep(model, None, defaults(consistency=1.0, consistency_r=4))
    view = unpatched_view(model)
    assert not tokenzoo.is_patched(view) and tokenzoo.is_patched(model)
    assert view.head.weight is model.head.weight


# ---- optimizer


def test_new_parameters_have_groups_of_their_own():
    from test_parameters import ToySlim

    model = build("deit")
    tokenzoo.patch_model(model, ToySlim(layers=(1, 2)))
    args = defaults(layer_decay=0.5, new_lr_scale=100.0, freeze_epochs=1, sched="none")
    optimizer = build_optimizer(model, args, 1e-3)
    schedule = Schedule(optimizer, args, 5)
    names = {id(p): name for name, p in model.named_parameters()}
    for epoch in range(2):
        schedule.set(epoch, 5 * epoch)
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names[id(p)]
                depth = {"norm": 4, "head": 5}.get(name.split(".")[0], 0)
                depth = 1 + int(name.split(".")[1]) if name.startswith("blocks") else depth
                new = ".tokenzoo_" in name
                scale = 0.5 ** (5 - depth) * (100 if new else 1) * (new or epoch > 0)
                assert group["new"] == new
                assert group["lr"] == pytest.approx(1e-3 * scale), name
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_learning_rate_follows_the_batch():
    args = defaults(lr_base=5e-4, batch_size=64, grad_accum_steps=2)
    assert learning_rate(args, 8) == pytest.approx(5e-4 * 2)
    assert learning_rate(defaults(lr=0.3), 8) == 0.3


# ---- order of pictures


@pytest.mark.parametrize("repeats", [0, 3])
def test_processes_share_an_epoch(repeats):
    whole = EpochOrder(50, 12, 7, repeats=repeats)
    parts = [EpochOrder(50, 4, 7, rank, 3, repeats) for rank in range(3)]
    for epoch in range(2):
        for order in (whole, *parts):
            order.start(epoch)
        keys = list(whole)
        assert len(keys) == len(whole) == 48 and [key.place for key in keys] == list(range(48))
        assert sorted(key for part in parts for key in part) == sorted(keys)
        assert len({key.index for key in keys}) == (16 if repeats else 48)
        for order in (whole, *parts):  # going on inside the epoch
            everything = list(order)
            order.start(epoch, 2)
            assert list(order) == everything[2 * order.batch_size :]
    whole.start(0)
    first = [key.index for key in whole]
    whole.start(1)
    assert [key.index for key in whole] != first


def test_every_checkpoint_leads_to_the_same_weights(main, tmp_path, capsys):  # noqa: F811
    """Going on from any update of the run, without starting processes for it."""
    data = draw(tmp_path / "data", 4, 5)
    more = ["--epochs", "2", "--method", "evit", "--shrink-epochs", "2", "--batch-size", "4", "--mixup", "0.5"]
    more += ["--recovery-interval", "1", "--checkpoint-hist", "99", "--grad-accum-steps", "2", "--drop-path", "0.2"]
    assert main(words(data, tmp_path / "run", *more)) == 0
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "whole.safetensors")
    found = Checkpoints(tmp_path / "run").list()
    assert [place for place, _ in found] == [(2, 0), (1, 4), (1, 2), (1, 0), (0, 4), (0, 2)]
    for place, path in found:
        assert main(words(data, tmp_path / "run", *more, "--resume")) == 0
        same(tmp_path / "whole.safetensors", tmp_path / "run" / "model.safetensors")
        for later, other in Checkpoints(tmp_path / "run").list():
            if later >= place:
                other.unlink()
        assert not path.exists()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original", "v0", "augmix-m9", "3a"])
def test_augmentation_takes_any_picture(policy):
    """Pillow 12 and later refuse to keep 0 bits, which timm's strongest magnitudes ask for."""
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    transform = training_transform(config, defaults(aa=policy))
    for seed in range(60):
        seed_everything(seed)
        image = torch.as_tensor(transform(Image.new("L" if seed % 2 else "RGB", (40, 36), 77)))
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    if policy.startswith("rand"):
        assert Posterize(None)(Image.new("RGB", (4, 4), 77), 0).getextrema() == ((0, 0),) * 3


def test_refused_augmentation():
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="--aa 'nothing'"):
        training_transform(config, defaults(aa="nothing"))


# ---- other readers


def test_tar_files(main, tmp_path, capsys):  # noqa: F811
    data = draw(tmp_path / "data", 4, 5)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(data / split, ".")
    more = ["--epochs", "1", "--batch-size", "4", "--method", "topk"]
    assert main(words(data, tmp_path / "a", *more)) == 0
    tars = ["--train-split", "train.tar", "--val-split", "val.tar"]
    assert main(words(tmp_path, tmp_path / "b", *more, *tars)) == 0
    same(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")


def write_shards(folder, shards: int, count: int, broken: int = -1) -> None:
    """Shards as the webdataset library reads them: pairs of members with a common stem."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as archive:
            for i in range(count):
                stream = io.BytesIO()
                picture(i % 4, generator).save(stream, "PNG")
                content = b"no picture" if shard * count + i == broken else stream.getvalue()
                for name, member in ((f"{shard}_{i}.png", content), (f"{shard}_{i}.cls", str(i % 4).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(member)
                    archive.addfile(info, io.BytesIO(member))


WDS = [
    "--dataset",
    "wds/small",
    "--num-classes",
    "4",
    "--batch-size",
    "4",
    "--method",
    "tome",
    "--method-kwargs",
    "r=2",
]


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is an extra")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards(main, tmp_path, capsys, caplog, workers):  # noqa: F811
    write_shards(tmp_path / "shards", 2, 12, broken=5)
    more = [*WDS, "--train-split", "train-{0000..0001}.tar|24", "--val-split", "train-{0000..0001}.tar"]
    more += ["--workers", workers, "--epochs", "2", "--recovery-interval", "1", "--checkpoint-hist", "99"]
    assert main(words(tmp_path / "shards", tmp_path / "run", *more[:8], *more[8:])) == 0
    result = result_of(capsys.readouterr().out)
    assert result["n_broken"] >= 1 and "cannot be read" in caplog.text
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "whole.safetensors")
    for place, path in Checkpoints(tmp_path / "run").list():
        if place > (1, 2):
            path.unlink()
    assert main(words(tmp_path / "shards", tmp_path / "run", *more, "--resume")) == 0
    same(tmp_path / "whole.safetensors", tmp_path / "run" / "model.safetensors")
    capsys.readouterr()
    assert main(words(tmp_path / "shards", tmp_path / "run", *more, "--resume", "--workers", "1")) == 2
    assert f"--workers: {workers} before, 1 now" in capsys.readouterr().err
    remote = [*more, "--data-dir", f"pipe:cat {tmp_path / 'shards'}"]
    assert main(words(tmp_path, tmp_path / "remote", *remote)) == 0
    same(tmp_path / "whole.safetensors", tmp_path / "remote" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is an extra")
def test_shards_in_two_processes(tmp_path):
    write_shards(tmp_path / "shards", 4, 12)
    more = [*WDS, "--train-split", "train-{0000..0003}.tar|48", "--val-split", "train-{0000..0002}.tar"]
    result = torchrun(words(tmp_path / "shards", tmp_path / "run", *more, "--workers", "1", "--epochs", "2"))
    assert result["processes"] == 2 and result["epoch"] == 1 and result["n_broken"] == 0
    assert result["eval_top1"] * 36 / 100 == pytest.approx(round(result["eval_top1"] * 36 / 100))  # each picture once


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is an extra")
def test_refused_shards(main, tmp_path, capsys):  # noqa: F811
    write_shards(tmp_path / "shards", 1, 4)
    one = [*WDS, "--val-split", "", "--train-split", "train-{0000..0000}.tar|4"]
    for more, expected in (
        ([*one, "--workers", "2"], "1 shards cannot be spread over 2 readers"),
        ([*one[:-1], "train-{0000..0000}.tar"], "could not be opened"),
        ([*one, "--num-classes", "2"], "class count mismatch: a picture has class index"),
        ([*one, "--aug-repeats", "3"], "a stream (wds/small) is read in order, give --aug-repeats 0"),
        ([*one[:-1], "train-{0000..0002}.tar|4"], "2 of 3 shards are not in"),
        (
            [*one, "--data-dir", f"pipe:cat {tmp_path / 'nothing'}"],
            "cannot be read",
        ),  # by version: at once, or after many
    ):
        assert main(words(tmp_path / "shards", tmp_path / "run", *more)) == 2
        assert expected in capsys.readouterr().err


@dataclass
class Shards:
    """What timm's reader of shards keeps of a split, as far as it is looked at."""

    filenames: tuple[str, ...]

    @property
    def split_info(self) -> Shards:
        return self

    @split_info.setter
    def split_info(self, value: Shards) -> None:
        self.filenames = value.filenames

    def __iter__(self):
        return ((name, 0) for name in self.filenames)


def test_a_part_of_many_shards_is_another_part_in_every_epoch():
    names = tuple(f"{i:05d}" for i in range(5000))
    source = argparse.Namespace(reader=Shards(names), set_epoch=lambda _: None)
    readers = [Streamed(source, lambda name: name, 0, rank) for rank in (0, 1)]
    seen = []
    for epoch in range(4):
        for reader in readers:
            reader.start(epoch)
        orders = [[name for name, _, _ in reader] for reader in readers]
        assert orders[0] == orders[1] and sorted(orders[0]) == list(names)
        assert source.reader.filenames == names  # the next epoch starts from the list as it was given
        seen.append(set(orders[0][:500]))
    assert len(set.union(*seen)) > 1500  # a tenth an epoch, drawn from all
    readers[0].start(0)
    assert {name for name, _, _ in list(readers[0])[:500]} == seen[0]


# ---- checkpoints and models


def test_checkpoints_are_kept_and_damage_is_seen(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for epoch in range(4):
        store.save(Place(epoch, 0), {"x": torch.full((1000,), float(epoch))})
    assert [place for place, _ in store.list()] == [(3, 0), (2, 0)]
    place, state = store.load()
    assert place == (3, 0) and state["x"][0] == 3
    path = store.list()[0][1]
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 7):
        path.write_bytes(content[:position])
        assert damage_of(path) is not None
    start = content.index(torch.full((4,), 3.0).numpy().tobytes())
    path.write_bytes(content[: start + 9] + b"\x01" + content[start + 10 :])
    assert "checksum" in damage_of(path)
    assert store.load()[0] == (2, 0)
    (tmp_path / "checkpoint-00009-0000000.pt.part").write_bytes(b"half")
    assert store.load()[0] == (2, 0)


def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(Place(1, 0), {"x": torch.ones(3)})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left.*the one before is kept"):
        store.save(Place(2, 0), {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00001-0000000.pt"]


def test_weights_for_another_number_of_classes(tmp_path, caplog):
    args = parse_options(words(tmp_path, tmp_path))
    model = build_model(args, 10, torch.device("cpu")).model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ten.pth")
    args.initial_checkpoint = str(tmp_path / "ten.pth")
    other = build_model(args, 7, torch.device("cpu")).model
    assert "head.weight, head.bias have another number of classes" in caplog.text
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert isinstance(other.head, nn.Linear) and other.head.out_features == 7


def test_weights_of_another_image_size(tmp_path, caplog):
    """Position embeddings are resized as timm does it for its own weights; what cannot be resized is refused."""
    args = parse_options(words(tmp_path, tmp_path))
    small = build_model(args, 10, torch.device("cpu")).model
    torch.save(small.state_dict(), tmp_path / "small.pth")
    args.initial_checkpoint, args.img_size = str(tmp_path / "small.pth"), [64]
    large = build_model(args, 10, torch.device("cpu")).model
    assert re.search(r"pos_embed was resized from \[1, \d+, 48\] to \[1, \d+, 48\]", caplog.text)
    grid = timm.layers.resample_abs_pos_embed(small.pos_embed, list(large.patch_embed.grid_size), num_prefix_tokens=1)
    assert torch.equal(large.pos_embed, grid) and torch.equal(large.head.weight, small.head.weight)
    args.model_kwargs = {**args.model_kwargs, "embed_dim": 96}
    with pytest.raises(ValueError, match="of another shape blocks.0"):
        build_model(args, 10, torch.device("cpu"))


def test_the_teacher_is_the_model_before_patching(tmp_path):
    more = ["--method", "topk", "--kd-model-name", "unpatched"]
    built = build_model(parse_options(words(tmp_path, tmp_path, *more)), 10, torch.device("cpu"))
    assert not tokenzoo.is_patched(built.teacher) and tokenzoo.is_patched(built.model)
    assert not built.teacher.training and not any(p.requires_grad for p in built.teacher.parameters())
    assert json.loads(json.dumps(built.recipe)) == built.recipe == {"method": "topk"}
    x = torch.randn(2, 3, 32, 32)
    tokenzoo.unpatch_model(built.model)
    assert torch.equal(built.teacher(x), built.model.eval()(x))


# ---- configurations

TRAINING_CONFIGS = sorted(ROOT.glob("configs/*/*_train.yaml"))
# shapes are enough; older timm cannot make models without memory for their weights
SHAPES = torch.device("meta" if hasattr(timm.models.vision_transformer, "DiffParallelScalingBlock") else "cpu")


def test_training_configurations_are_told_apart_by_name():
    found = {path for path in ROOT.glob("configs/*/*.yaml") if "model" in yaml.safe_load(path.open(encoding="utf-8"))}
    assert found == set(TRAINING_CONFIGS)
    assert {path.parent.name for path in found} == set(tokenzoo.list_methods())


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_training_configuration_loads_and_patches(path, tmp_path):
    args = parse_options(["-c", str(path), "--data-dir", "imagenet", "--output", str(tmp_path)])
    assert path.stem == f"{args.model}_train"
    args.pretrained = False  # no network here
    with SHAPES:
        built = build_model(args, 1000, SHAPES)
        plain = words(tmp_path, tmp_path, "--model", args.model, "--model-kwargs")
        beside = build_model(parse_options(plain), 1000, SHAPES).model
    names = built.recipe["method"]
    names = [part["method"] for part in names] if isinstance(names, list) else [names]
    assert path.parent.name in names
    report = tokenzoo.report(built.model)
    assert report.ratio < 1 or report.data_dependent or path.parent.name == "tap"  # which pools, and removes nothing
    assert (built.teacher is not None) == (args.kd_model_name is not None)
    # the training-free settings of the same backbone stand beside it, and are those that are trained with
    tokenzoo.patch_model(beside, path.parent / f"{args.model}.yaml")
    assert tokenzoo.report(beside).total == report.total
    free, trained = tokenzoo.recipe(beside), built.recipe
    if free != trained:  # but for what the authors train with otherwise, which the comment says
        assert [key for key in {**free, **trained} if free.get(key) != trained.get(key)] == ["threshold"]
        assert "off the shelf it is" in " ".join(path.read_text(encoding="utf-8").split("\n# "))


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_training_configuration_says_what_it_does(path, tmp_path):
    args = parse_options(["-c", str(path), "--data-dir", "imagenet", "--output", str(tmp_path)])
    model = nn.Linear(2, 2)  # a schedule does not look at the model
    if args.freeze_epochs or args.new_lr_scale != 1:  # but at what a method brings
        model = nn.ModuleDict({"0": nn.ModuleDict({"tokenzoo_0": model})})
    peak = learning_rate(args, 8)
    schedule = Schedule(build_optimizer(model, args, peak), args, 100)
    rates = [schedule.set(epoch, 100 * epoch) / args.new_lr_scale for epoch in range(args.epochs)]
    assert schedule.epochs == args.epochs and args.warmup_epochs < args.epochs
    low, high = sorted((peak, args.min_lr))
    assert low * 0.999 <= min(rates[args.warmup_epochs :]) and max(rates) <= max(high, args.warmup_lr) * 1.001
    # a long warm-up ends on the cosine that began with it, as timm's does
    around = rates[max(0, args.warmup_epochs - 1) : args.warmup_epochs + 1]
    assert min(abs(rate - peak) for rate in around) <= 0.08 * peak
    assert abs(rates[-1] - args.min_lr) <= 0.02 * high
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert text.startswith("# ") and " Source: " in comment
    assert f"train_imagenet.py -c configs/{path.parent.name}/{path.name} " in comment
    assert f"Off the shelf: configs/{path.parent.name}/{args.model}.yaml." in comment
    assert f"{args.epochs} epochs" in comment
    assert args.pretrained or "--initial-checkpoint" in comment or "random weights" in comment
