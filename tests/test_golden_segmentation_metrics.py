"""Segmentation scores and window inference against mmsegmentation's and Segmenter's own code."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import READ as NOTED
from goldens import Case, case_names, check_settings, close, files, fixture_model, read, settings
from torch import Tensor, nn

from tokenzoo.evaluation.segmentation.confusion import areas, confusion_matrix, reduce_zero_label, scores
from tokenzoo.evaluation.segmentation.inference import labels_at, probabilities_at
from tokenzoo.evaluation.segmentation.windows import slide_mmseg, slide_segmenter


def parts(kind: str):
    """A parametrize mark over the cases `<kind>/<name>` of all files of the folder."""
    found = []
    for file in files("segmentation_eval"):
        if kind in case_names(file):
            NOTED.add((file, kind))
            for name in sorted({key.split("/")[1] for key in read(file)[0] if key.startswith(f"{kind}/")}):
                found.append(pytest.param(Case(file, f"{kind}/{name}"), id=f"{kind}/{name}", marks=pytest.mark.golden))
    return pytest.mark.parametrize("case", found)


def settings_of(case: Case, prefix: str = "") -> dict:
    kind, name = case.name.split("/")
    meta = read(case.file)[1]
    return settings(meta.get("settings") or meta[kind])[prefix + name]


@parts("metric")
def test_scores(case: Case):
    s = settings_of(case)
    check_settings(s, "num_classes", "reduce_zero_label", "ignore_index")
    masks = case["annotation"].numpy()
    if s["reduce_zero_label"]:
        masks = reduce_zero_label(masks)
    total = np.zeros((s["num_classes"],) * 2)
    for prediction, mask in zip(case["pred"].numpy(), masks):
        total += confusion_matrix(prediction, mask, s["num_classes"], s["ignore_index"])
    found = scores(areas(total))
    for name in ("iou", "acc"):
        recorded = case[name].double().numpy()
        np.testing.assert_allclose(getattr(found, name), recorded, atol=1e-6, equal_nan=True)
    summary = np.array([found.aacc, found.macc, found.miou])
    np.testing.assert_allclose(summary, case["summary"].double().numpy(), atol=1e-6)


@parts("mmslide")
def test_mmseg_slide(case: Case):
    s = settings_of(case, "mmslide_")
    check_settings(s, "crop", "stride")
    conv, ramp = case["conv"], case["ramp"]

    def toy(crops: Tensor) -> Tensor:
        y, x = (torch.arange(n).float() for n in crops.shape[-2:])
        return torch.einsum("kc,bcyx->bkyx", conv, crops) + ramp.view(1, -1, 1, 1) * (y[:, None] / 8 + x / 16)

    for batch_size in (1, 4):
        out = slide_mmseg(toy, case["image"], tuple(s["crop"]), tuple(s["stride"]), batch_size)
        close(out, case["out"])


class LinearSegmenter(nn.Module):
    """The fixture encoder with a linear decoder: x 8 bilinear, no padding needed at multiples of the patch."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.encoder = fixture_model(Case(file, "slide").fixture(), norm_layer=partial(nn.LayerNorm, eps=1e-5))
        tensors = read(file)[0]
        self.weight, self.bias = (tensors[f"linear/decoder.head.{name}"] for name in ("weight", "bias"))

    def forward(self, images: Tensor) -> Tensor:
        size, patch = images.shape[-2:], self.encoder.patch_embed.patch_size
        x = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        maps = F.linear(x, self.weight, self.bias).transpose(1, 2).unflatten(2, [n // p for n, p in zip(size, patch)])
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)


@parts("slide")
def test_segmenter_windows(case: Case):
    s = settings_of(case)
    check_settings(s, "image_hw", "window", "stride", "ori_hw", "flip")
    image = case["image"]
    assert tuple(image.shape[-2:]) == tuple(s["image_hw"])
    model = LinearSegmenter(case.file).eval()
    with torch.no_grad():
        for batch_size in (1, 3):
            logits = slide_segmenter(model, image, s["window"], s["stride"], batch_size)
            probabilities = probabilities_at(logits, tuple(s["ori_hw"]), s["flip"])
            close(probabilities[0, :, ::5, ::5], case["probs_sub"])
            labels = probabilities.argmax(1)[0].to(torch.uint8)
            assert torch.equal(labels, case["labels"])
        if not s["flip"]:
            for chunk in (1, 4, 16):
                assert np.array_equal(labels_at(logits, tuple(s["ori_hw"]), chunk), case["labels"].numpy())
