"""The segmentation trainer: it learns, goes on where it was ended, and names what it cannot do."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.dense import LinearHead, Segmenter, create_segmenter, load_segmenter
from tokenzoo.evaluation.segmentation.data import open_dataset
from tokenzoo.training.segmentation.augment import Gallery, Views
from tokenzoo.training.segmentation.step import class_weights as _class_weights
from tokenzoo.training.segmentation.train import SegmentTraining, evaluate_whole, train_segmenter

OPTIONS = dict(img_size=[32, 48], patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pictures whose left half is bright class 1, right half dark class 0, bottom row ignored."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for i in range(6):
        split = int(rng.integers(12, 36))
        pixels = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
        pixels[:, :split] += 150
        mask = np.zeros((32, 48), np.uint8)
        mask[:, :split] = 1
        mask[-1] = 9
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return root


def gallery(data):
    return Gallery(open_dataset(data, ignore=9, num_classes=2))


def model(**more):
    torch.manual_seed(0)
    return create_segmenter("vit_tiny_patch16_224", 2, "linear", {**OPTIONS, **more})


VIEWS = Views(crop=(32, 48), scale=(0.8, 1.25))


def test_learns(data, tmp_path):
    pictures = gallery(data)
    net = model()
    before = evaluate_whole(net, pictures)
    options = SegmentTraining(epochs=12, batch_size=3, lr=3e-3, warmup_epochs=1, eval_every=6)
    rows = train_segmenter(net, pictures, pictures, VIEWS, options, tmp_path)
    assert rows[-1]["val_miou"] > max(0.8, float(before.miou))
    assert [row["val_miou"] != "" for row in rows] == [i in (5, 11) for i in range(12)]
    again = evaluate_whole(load_segmenter(tmp_path / "model.safetensors"), pictures)
    assert float(again.miou) == pytest.approx(rows[-1]["val_miou"], abs=0.01)  # float16 in the file
    assert (tmp_path / "summary.csv").read_text().count("\n") == 13
    rates = [row["lr"] for row in rows]
    assert rates[0] < max(rates) <= 3e-3 and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 3e-4


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_goes_on_where_it_was_ended(data, tmp_path, ema):
    pictures = gallery(data)
    options = SegmentTraining(epochs=4, batch_size=3, warmup_epochs=1, ema=ema, class_weights="sqrt-inverse")
    whole, part = model(), model()
    train_segmenter(whole, pictures, None, VIEWS, options, tmp_path / "whole")

    def stop(row):
        if row["epoch"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        train_segmenter(part, pictures, None, VIEWS, options, tmp_path / "part", progress=stop)
    fresh = model()
    rows = train_segmenter(fresh, pictures, None, VIEWS, options, tmp_path / "part", resume=True)
    assert len(rows) == 4
    for (name, a), b in zip(whole.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(a, b), name
    stored = [load_segmenter(tmp_path / run / "model.safetensors").state_dict() for run in ("whole", "part")]
    assert all(torch.equal(value, stored[1][key]) for key, value in stored[0].items())
    other = SegmentTraining(epochs=4, batch_size=2, warmup_epochs=1, ema=ema, class_weights="sqrt-inverse")
    with pytest.raises(ValueError, match=r"other options \(batch_size\)"):
        train_segmenter(model(), pictures, None, VIEWS, other, tmp_path / "part", resume=True)
    fewer = Gallery(open_dataset(data, ignore=9, num_classes=2).subset(range(5)))
    with pytest.raises(ValueError, match=r"other options \(pictures\)"):  # an epoch would have other steps
        train_segmenter(model(), fewer, None, VIEWS, options, tmp_path / "part", resume=True)
    with pytest.raises(ValueError, match=r"other options \(flip, scale\)"):
        views = Views(crop=(32, 48), scale=(0.5, 1.25), flip=0.0)
        train_segmenter(model(), pictures, None, views, options, tmp_path / "part", resume=True)
    with pytest.raises(ValueError, match=r"last.pt does not fit Segmenter; shapes: .*pos_embed"):
        train_segmenter(model(img_size=64), pictures, None, VIEWS, options, tmp_path / "part", resume=True)


def test_averaged_weights_are_kept(data, tmp_path):
    """Two steps by hand: the file holds the average, the model the last weights."""
    net, seen = model(), []
    forward = net.register_forward_pre_hook(lambda module, _: seen.append(module.decoder.head.weight.detach().clone()))
    options = SegmentTraining(epochs=1, batch_size=3, warmup_epochs=0, ema=0.5, opt="sgd", lr=0.1)
    train_segmenter(net, gallery(data), None, VIEWS, options, tmp_path)
    forward.remove()
    first, second, last = seen[0], seen[1], net.decoder.head.weight.detach()
    assert not torch.equal(first, second) and not torch.equal(second, last)
    kept = first
    for step, new in ((1, second), (2, last)):
        decay = min(0.5, step / (step + 9))
        kept = decay * kept + (1 - decay) * new
    stored = load_segmenter(tmp_path / "model.safetensors").decoder.head.weight
    assert torch.allclose(stored, kept, atol=1e-3 * float(kept.abs().max()))  # float16 in the file
    assert (kept - last).abs().max() > 0


def test_class_weights_even_out_shares(data):
    pictures = gallery(data)
    share = pictures.class_pixels(2)
    assert share.sum() == 6 * 31 * 48  # the last row is ignored
    weight = _class_weights(pictures, 3, "sqrt-inverse")  # class 2 does not occur
    assert weight[2] == 0 and weight[:2].mean() == pytest.approx(1)
    assert weight[0] / weight[1] == pytest.approx(float((share[1] / share[0]).sqrt()), rel=1e-5)
    assert _class_weights(pictures, 2, "none") is None


@pytest.mark.parametrize("kind", ["none", "sqrt-inverse"])
def test_the_loss_is_the_weighted_mean_over_labelled_pixels(data, tmp_path, kind):
    pictures, net = gallery(data), model(drop_path_rate=0.0)
    images = (torch.stack(pictures.images) / 255 - 0.5) / 0.5
    masks = torch.stack(pictures.masks).long()
    counted = masks != 255
    picked = net(images).log_softmax(1).gather(1, masks.where(counted, 0)[:, None])[:, 0]
    weight = torch.ones(2) if kind == "none" else _class_weights(pictures, 2, kind)
    weights = weight[masks.where(counted, 0)] * counted
    expected = -(weights * picked.detach()).sum() / weights.sum()
    views = Views(crop=(32, 48), scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    options = SegmentTraining(epochs=1, batch_size=6, warmup_epochs=0, class_weights=kind)
    rows = train_segmenter(net, pictures, None, views, options, tmp_path)
    assert rows[0]["train_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_views_without_labels_count_as_no_loss(data, tmp_path, caplog):
    pictures = gallery(data)
    for mask in pictures.masks[1:]:
        mask.fill_(255)
    options = SegmentTraining(epochs=1, batch_size=1, warmup_epochs=0)
    rows = train_segmenter(model(), pictures, None, VIEWS, options, tmp_path)
    assert 0 < rows[0]["train_loss"] < float("inf")
    assert sum("every pixel is ignored" in r.getMessage() for r in caplog.records) == 5


def test_a_loss_that_is_no_number_ends_the_run(data, tmp_path):
    net = model()
    with torch.no_grad():
        net.decoder.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan in epoch 0, step 0"):
        train_segmenter(net, gallery(data), None, VIEWS, SegmentTraining(epochs=1, batch_size=3), tmp_path)


def test_frozen_encoder_stays(data, tmp_path):
    net = model()
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    options = SegmentTraining(epochs=2, batch_size=3, warmup_epochs=0, freeze_encoder=True)
    head = net.decoder.head.weight.clone()
    train_segmenter(net, gallery(data), None, VIEWS, options, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items())
    assert not torch.equal(net.decoder.head.weight, head)


@pytest.mark.parametrize("method", [{"method": "tome", "r": 3}, ["cluster", "reconstruct"], {"method": "topk"}])
def test_trains_patched(data, tmp_path, method):
    net = tokenzoo.patch_model(model(), method)
    options = SegmentTraining(epochs=2, batch_size=3, warmup_epochs=0, ema=0.9)
    rows = train_segmenter(net, gallery(data), None, VIEWS, options, tmp_path)
    assert len(rows) == 2 and all(np.isfinite(row["train_loss"]) for row in rows)
    assert not tokenzoo.is_patched(load_segmenter(tmp_path / "model.safetensors"))


def test_masks_follow_their_pictures():
    """What the mask says is what the picture shows, wherever a view is cut; outside of the picture nothing counts."""
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 5:25] = 1
    image = (mask * 200).expand(3, -1, -1).contiguous()
    views, rng = Views(crop=(48, 48), scale=(0.5, 1.5), jitter=0.0), torch.Generator().manual_seed(0)
    ignored = 0
    for _ in range(50):
        x, y = views.draw(image, mask, rng)
        assert x.shape == (3, 48, 48) and y.shape == (48, 48)
        inside = y != 255
        ignored += int((~inside).sum())
        assert torch.equal(x[0][~inside], torch.full_like(x[0][~inside], 0.5))
        agree = ((x[0][inside] > 0.39) == (y[inside] == 1)).float().mean()
        assert agree > 0.97  # edges are interpolated
    assert ignored > 0


def test_a_flip_mirrors_picture_and_mask():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    mask = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    draws = []
    for flip in (0.0, 1.0):
        views = Views(crop=(4, 6), scale=(1.0, 1.0), flip=flip, jitter=0.0)
        draws.append(views.draw(image, mask, torch.Generator().manual_seed(0)))
    (x, y), (mirrored_x, mirrored_y) = draws
    assert torch.equal(y, mask.long()) and torch.allclose(x, image / 255)
    assert torch.equal(mirrored_y, y.flip(1)) and torch.allclose(mirrored_x, x.flip(2))


def test_a_crop_is_cut_from_anywhere_and_repeats_with_its_seed():
    mask = torch.arange(240, dtype=torch.uint8).reshape(12, 20)
    image, views = mask.expand(3, -1, -1).contiguous(), Views(crop=(4, 6), scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    corners, rng = set(), torch.Generator().manual_seed(0)
    for _ in range(400):
        x, y = views.draw(image, mask, rng)
        row, column = divmod(int(y[0, 0]), 20)
        assert torch.equal(y, mask[row : row + 4, column : column + 6].long())
        assert torch.allclose(x[0] * 255, y.float(), atol=1e-3)
        corners.add((row, column))
    assert {row for row, _ in corners} == set(range(9)) and {column for _, column in corners} == set(range(15))
    one, two = (views.draw(image, mask, torch.Generator().manual_seed(3))[1] for _ in range(2))
    assert torch.equal(one, two)


def test_jitter_changes_the_picture_only():
    image = torch.randint(60, 180, (3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    views = Views(crop=(8, 8), scale=(1.0, 1.0), flip=0.0, jitter=0.3)
    x, y = views.draw(image, mask, torch.Generator().manual_seed(0))
    assert torch.equal(y, mask.long()) and not torch.allclose(x, image / 255, atol=0.01)
    assert 0 <= float(x.min()) and float(x.max()) <= 1


@pytest.mark.parametrize("options,message", [
    ({"clip_grad": 0.0}, "clip_grad=0.0"),
    ({"sched": "plateau"}, "sched='plateau'"),
    ({"batch_size": 1.5}, "batch_size=1.5"),
    ({"epochs": 0}, "epochs=0"),
    ({"lr": 0.0}, "lr=0.0"),
    ({"ema": 1.0}, "ema=1.0"),
    ({"class_weights": "inverse"}, "class_weights='inverse'"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentTraining(**options)


def test_bad_views_and_too_few_pictures(data, tmp_path):
    for options, message in (({"crop": (0, 4)}, "crop"), ({"crop": (4, 4), "scale": (2, 1)}, "scale"),
                             ({"crop": (4, 4), "flip": 2}, "flip")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Views(**options)
    with pytest.raises(ValueError, match="6 pictures are fewer than batch_size=7"):
        train_segmenter(model(), gallery(data), None, VIEWS, SegmentTraining(batch_size=7), tmp_path)


def test_models_that_cannot_be_stored_are_named(tmp_path):
    from tokenzoo.dense import save_segmenter

    net = Segmenter(VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2), LinearHead(32, 2), 2)
    with pytest.raises(ValueError, match="create_segmenter"):
        save_segmenter(net, tmp_path / "model.safetensors")


def test_command(data, tmp_path, capsys):
    words = ["segment", "train", "--data", str(data), "--val", str(data), "--ignore", "9", "--num-classes", "2"]
    kwargs = [f"{k}={v}" for k, v in OPTIONS.items()]
    words += ["--encoder-kwargs", *kwargs, "--epochs", "2", "-b", "3", "--warmup-epochs", "0"]
    run = tmp_path / "run"
    assert main([*words, "--output", str(run), "--method", "tome", "r=2"]) == 0
    assert sorted(p.name for p in run.iterdir()) == ["args.yaml", "last.pt", "model.safetensors", "summary.csv"]
    assert "val mIoU" in capsys.readouterr().out
    assert main([*words, "--output", str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    resumed = [*words, "--output", str(run), "--method", "tome", "r=2", "--resume"]
    assert main([*resumed, "--threads", "1", "--eval-every", "1"]) == 0
    weights = (run / "model.safetensors").read_bytes()
    saved = (run / "args.yaml").read_text()
    for more, message in ((["--crop", "16", "16"], "(--crop)"), (["--head", "mask"], "(--head)"),
                          (["--method", "tome", "r=3", "--lr", "1"], "(--lr, --method)")):  # fmt: skip
        assert main([*resumed, *more]) == 2
        assert message in capsys.readouterr().err
    assert (run / "args.yaml").read_text() == saved and (run / "model.safetensors").read_bytes() == weights
    assert main([*words, "--output", str(run / "last.pt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "third"), "--sched", "nope", "--clip-grad", "0"]) == 2
    assert "nope" in capsys.readouterr().err
    init = ["--init", str(run / "model.safetensors"), "--head", "mask", "--head-kwargs", "depth=1", "--freeze-encoder"]
    assert main([*words, "--output", str(tmp_path / "second"), *init]) == 0
    first, second = (load_segmenter(p / "model.safetensors").encoder for p in (run, tmp_path / "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
