"""Segmentation scores equal torchmetrics; windows, sizes and averaging equal loops by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tokenzoo.evaluation.segmentation.confusion import areas, confusion_matrix, reduce_zero_label, scores
from tokenzoo.evaluation.segmentation.inference import Inference, Predictor, keep_ratio_size, labels_at, resize_bilinear
from tokenzoo.evaluation.segmentation.paired import bootstrap_miou, standard_error
from tokenzoo.evaluation.segmentation.windows import (
    average_windows,
    slide_even,
    slide_mmseg,
    slide_segmenter,
    spans_even,
)

K = 4


# ---- scores


@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_torchmetrics(seed):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    rng = np.random.default_rng(seed)
    classes, count = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    shape = (count, *rng.integers(3, 20, 2))
    reduce = seed % 3 == 0
    values = np.array([*range(classes + reduce), 255])
    labelled = rng.permutation(values)[: rng.integers(2, len(values) + 1)]  # some classes are absent
    raw = rng.choice(labelled, size=shape).astype(np.uint8)
    answered = rng.permutation(classes)[: rng.integers(1, classes + 1)]
    prediction = rng.choice(answered, size=shape).astype(np.uint8)
    masks = reduce_zero_label(raw) if reduce else raw
    total = sum(areas(confusion_matrix(p, m, classes)) for p, m in zip(prediction, masks))
    found = scores(total)

    plain = raw.astype(int)
    plain = np.where((plain == 255) | reduce * (plain == 0), 255, plain - reduce)
    metrics = {
        "iou": MulticlassJaccardIndex(classes, average=None, ignore_index=255),
        "miou": MulticlassJaccardIndex(classes, average="macro", ignore_index=255),
        "acc": MulticlassAccuracy(classes, average=None, ignore_index=255),
        "aacc": MulticlassAccuracy(classes, average="micro", ignore_index=255),
    }
    for metric in metrics.values():
        for p, m in zip(prediction, plain):
            metric.update(torch.from_numpy(p.astype(int))[None], torch.from_numpy(m)[None])
    expected = {name: metric.compute().double().numpy() for name, metric in metrics.items()}
    if (plain == 255).all():
        assert math.isnan(found.aacc)
        return
    there = np.isin(np.arange(classes), plain)
    seen = there | np.isin(np.arange(classes), prediction[plain != 255])
    assert np.array_equal(np.isnan(found.iou), ~seen) and np.array_equal(np.isnan(found.acc), ~there)
    np.testing.assert_allclose(found.iou[seen], expected["iou"][seen], atol=1e-6)  # absent ones are 0 there
    np.testing.assert_allclose(found.acc[there], expected["acc"][there], atol=1e-6)
    assert found.miou == pytest.approx(expected["miou"], abs=1e-6)
    assert found.aacc == pytest.approx(expected["aacc"], abs=1e-6)
    assert found.macc == pytest.approx(expected["acc"][there].mean(), abs=1e-6)


def test_counts_stay_exact_beyond_single_precision():
    """Of 2 ** 24 + 1 pixels in float32 the last one is lost."""
    many = np.zeros((1, 2)), np.array([[2.0**24, 0], [0, 0]])
    one = confusion_matrix(np.array([[0]]), np.array([[0]]), 2)
    assert one.dtype == np.float64 and areas(many[1] + one)[0, 0] == 2**24 + 1


def test_zero_labels_in_eight_bits():
    assert reduce_zero_label(np.array([0, 1, 254, 255], np.uint8)).tolist() == [255, 0, 253, 255]


@pytest.mark.parametrize("prediction, label, message", [
    ([[0, 4]], [[0, 0]], "prediction holds class 4, there are only 4"),
    ([[0, -1]], [[0, 0]], "prediction holds class -1"),
    ([[0, 0]], [[0, 200]], "mask holds class 200, there are only 4"),
    ([[0]], [[0, 0]], "differ in shape"),
])  # fmt: skip
def test_classes_outside_the_range_are_refused(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(prediction), np.array(label), K)


def test_bootstrap():
    rng = np.random.default_rng(0)
    area = np.stack(
        [areas(confusion_matrix(rng.integers(0, 3, (9, 9)), rng.integers(0, 3, (9, 9)), 3)) for _ in "12345"]
    )
    draws = bootstrap_miou(area, 40, seed=3)
    picked = np.random.default_rng(3).multinomial(5, [0.2] * 5, size=40)
    slow = [scores(sum(n * a for n, a in zip(row, area))).miou for row in picked]
    np.testing.assert_allclose(draws, slow)
    assert standard_error(draws) == pytest.approx(np.std(slow, ddof=1))
    assert standard_error(bootstrap_miou(area[:1])) == pytest.approx(0, abs=1e-12)  # one picture draws itself
    # pixels that move from one class to another: the error of a share is sqrt(p (1 - p) / n) there
    hits = np.zeros((400, 3, 2))
    hits[:, 2, 0] = hits[:, 1, 0] = 1
    hits[:100, 0, 0] = 1
    hits[100:, 1] = [0, 1]
    share = bootstrap_miou(hits, 4000)
    assert standard_error(2 * share) == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.05)


# ---- windows and sizes


@pytest.mark.parametrize("size, limits, expected", [
    ((480, 640), (2048, 512), (512, 683)),
    ((640, 480), (2048, 512), (683, 512)),
    ((256, 2048), (2048, 512), (256, 2048)),  # the long side meets its limit first
    ((1024, 2048), (2048, 1024), (1024, 2048)),
    ((100, 99), (200, 50), (51, 50)),
])  # fmt: skip
def test_keep_ratio(size, limits, expected):
    assert keep_ratio_size(*size, limits) == expected


def test_resizing_is_bilinear_without_antialias():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 17), dtype=np.uint8)
    out = resize_bilinear(torch.from_numpy(pixels)[None, None].float(), (5, 23))[0, 0].numpy()
    for y in range(5):
        for x in range(23):
            v, u = (y + 0.5) * 11 / 5 - 0.5, (x + 0.5) * 17 / 23 - 0.5
            top, left = math.floor(v), math.floor(u)
            rows, columns = (np.clip([n, n + 1], 0, m - 1) for n, m in ((top, 11), (left, 17)))
            square = pixels[np.ix_(rows, columns)].astype(float)
            value = np.array([1 - (v - top), v - top]) @ square @ np.array([1 - (u - left), u - left])
            assert abs(out[y, x] - value) <= 0.501


def shifted(images: torch.Tensor) -> torch.Tensor:
    """A toy model whose answer depends on where in the window a pixel lies."""
    y, x = (torch.arange(n).float() for n in images.shape[-2:])
    return torch.stack([images[:, 0] + y[:, None], images[:, 1] * x, images.sum(1)], 1)


@pytest.mark.parametrize("size", [(20, 20), (31, 20), (23, 57), (64, 40)])
@pytest.mark.parametrize("form", ["segmenter", "mmseg", "even"])
def test_windows_average_what_covers_a_pixel(form, size):
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    if form == "even":
        image = image[:, :, :20] if size[0] < size[1] else image[:, :, :, :20]
        out = slide_even(shifted, image, 20)
    else:
        out = {"segmenter": slide_segmenter, "mmseg": slide_mmseg}[form](shifted, image, 20, 9, batch_size=3)
    high, wide = image.shape[-2:]
    assert out.shape == (1, 3, high, wide)

    def starts(length: int) -> list[int]:
        if form == "even":
            return [start for start, _ in spans_even(length, 20)]
        return sorted({min(i * 9, length - 20) for i in range(100)})

    tops, lefts = starts(high), starts(wide)
    assert max(tops) == high - 20 and max(lefts) == wide - 20
    if form == "even":
        assert len(tops) * len(lefts) == math.ceil(max(high, wide) / 20)
    for y, x in ((0, 0), (high - 1, wide - 1), (high // 2, wide // 3)):
        values = [
            shifted(image[:, :, top : top + 20, left : left + 20])[0, :, y - top, x - left]
            for top in tops for left in lefts if top <= y < top + 20 and left <= x < left + 20
        ]  # fmt: skip
        torch.testing.assert_close(out[0, :, y, x], torch.stack(values).mean(0), atol=1e-5, rtol=1e-5)


def test_small_images():
    image = torch.randn(1, 3, 12, 30)
    assert slide_mmseg(shifted, image, 20, 9).shape[-2:] == (12, 30)
    assert slide_segmenter(shifted, image, 20, 9).shape[-2:] == (20, 50)
    with pytest.raises(ValueError, match="resize its short side to 20"):
        slide_even(shifted, image, 20)


def test_every_window_goes_through_alone():
    seen = []

    def model(crops):
        seen.append(len(crops))
        return crops

    image = torch.randn(1, 3, 40, 40)
    assert torch.allclose(slide_mmseg(model, image, 20, 10, batch_size=4), image, atol=1e-6)
    assert seen == [4, 4, 1]
    with pytest.raises(TypeError):
        average_windows(model, image, [], 1)


@pytest.mark.parametrize("options, message", [
    ({"mode": "tiles"}, "mode 'tiles' is unknown; use one of whole"),
    ({"mode": "segmenter", "window": 20}, "takes window and stride"),
    ({"mode": "whole", "window": 20}, "takes no window and stride"),
    ({"mode": "mmseg", "window": 20, "stride": 21}, "leave gaps"),
    ({"mode": "mmseg", "window": 20, "stride": 0}, "do not move"),
    ({"mode": "even", "window": 20, "limits": (9, 9)}, "resizes by itself"),
    ({"scales": (1.0, 0.0)}, "have to be positive"),
    ({"batch_size": 0}, "have to be positive"),
])  # fmt: skip
def test_inference_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Inference(**options)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_labels_in_chunks(chunk):
    logits = torch.randn(1, 7, 5, 6, generator=torch.Generator().manual_seed(0)).round()  # with ties
    full = F.interpolate(logits, (13, 9), mode="bilinear", align_corners=False).argmax(1)[0]
    assert np.array_equal(labels_at(logits, (13, 9), chunk), full.numpy())


def test_scales_and_flips_average_probabilities():
    torch.manual_seed(0)
    toy = nn.Conv2d(3, K, 3, padding=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8))
    settings = Inference(limits=(60, 30), scales=(0.5, 1.0), flip=True)
    with torch.no_grad():
        labels, finite = Predictor(toy, (0.5,) * 3, (0.25,) * 3, settings)(picture)
        total = 0
        for limits in ((30, 15), (60, 30)):
            factor = limits[1] / 20
            size = (int(20 * factor + 0.5), int(26 * factor + 0.5))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
            x = F.interpolate(pixels, size, mode="bilinear").round()
            x = (x / 255 - 0.5) / 0.25
            for flip in (False, True):
                out = toy(x.flip(3) if flip else x)
                out = F.interpolate(out, (20, 26), mode="bilinear")
                total = total + (out.flip(3) if flip else out).softmax(1)
    assert finite and np.array_equal(labels, total.argmax(1)[0].numpy())
