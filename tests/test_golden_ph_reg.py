"""Views, the way back, the denoised target and the losses against the published implementation."""

from __future__ import annotations

import torch
from goldens import Case, cases, check_settings, close, read, settings
from torch import Tensor

from tokenzoo.ops.views import Views, farthest
from tokenzoo.training.viewing import self_distillation


def whole(case: Case) -> tuple[dict[str, Tensor], Views]:
    """All tensors of a file, whose parts are named without a case in front, and its views."""
    tensors, meta = read(case.file)
    s = settings(meta["case"])
    check_settings(s, "B", "counts", "grid", "dim", "patch", "shift_frac")
    assert tensors["offsets"].shape == (s["B"], s["counts"], 2)
    most = round(s["shift_frac"] * s["grid"])
    assert tensors["offsets"].abs().max() <= most and (tensors["offsets"][:, 0] == 0).all()
    return tensors, Views(tensors["offsets"], tensors["flip"].bool(), (s["grid"], s["grid"]))


@cases("ph_reg", lambda c: c.has("all_offsets"))
def test_farthest_points(case: Case):
    chosen = case["selected"]
    found = farthest(case["all_offsets"].unsqueeze(0), len(chosen), chosen[:1])[0]
    assert torch.equal(found, chosen)


@cases("ph_reg", lambda c: c.name in ("image", "shifted", "offsets", "flip"))
def test_views(case: Case):
    tensors, views = whole(case)
    for view in range(views.count):
        close(views.images(tensors["image"], view), tensors["shifted"][:, view], 1e-6)


@cases("ph_reg", lambda c: c.name == "patch_index")
def test_places(case: Case):
    tensors, views = whole(case)
    assert torch.equal(views.sources().permute(0, 1, 4, 2, 3), tensors["patch_index"])


@cases("ph_reg", lambda c: c.name in ("teacher_feats", "target"))
def test_target(case: Case):
    tensors, views = whole(case)
    said = tensors["teacher_feats"].unflatten(0, (-1, views.count)).unbind(1)
    close(views.average(list(said)), tensors["target"], 1e-5)


@cases("ph_reg", lambda c: c.name in ("loss", "student_feats"))
def test_losses(case: Case):
    tensors, _ = whole(case)
    student = tensors["student_feats"].clone().requires_grad_()
    found = self_distillation(student, tensors["target"])
    for name, value in found.items():
        close(value.reshape(1), tensors[f"loss/{name}"], 1e-5)
    sum(found.values()).backward()
    assert student.grad.abs().amax(2).min() > 0  # every patch
