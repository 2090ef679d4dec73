"""What images cost where counts follow them: by formula against tracing, and as a budget."""

from __future__ import annotations

import pytest
import torch
from cases import build

import tokenzoo
from tokenzoo.adapters.inspect import describe
from tokenzoo.apply.patch import patched
from tokenzoo.tuning import tune
from tokenzoo.tuning.budget import Budget, Fitter
from tokenzoo.tuning.candidates import BY_IMAGE, Candidate, Part, seeds


def images(count: int = 6, size: int = 32) -> torch.Tensor:
    """From flat ones to noise, so that counts differ."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4))
    return noise * torch.linspace(0.1, 2, count).view(-1, 1, 1, 1)


RECIPES = {
    "ats": {"method": "ats", "heights": 9},
    "algm": {"method": "algm", "threshold": 0.2, "layers": (0, 2)},
    "topk by mass": {"method": "topk", "mass": 0.7},
    "two of them": [{"method": "ats", "layers": (0,), "heights": 12}, {"method": "evit", "mass": 0.6, "layers": (2,)}],
    "fixed": {"method": "tome", "r": 2},
}


@pytest.mark.parametrize("name", RECIPES)
def test_formula_is_what_tracing_counts(name):
    model, x = build("deit").eval(), images()
    plain = tokenzoo.report(model).total
    with tokenzoo.patched(model, RECIPES[name]):
        found = tokenzoo.expected_share(model, x, batch_size=4)  # padded to the longest of a batch, which counts not
        each = [tokenzoo.expected_share(model, image[None]) for image in x]
        traced = [tokenzoo.count_macs(model, image=image[None]).total / plain for image in (x[0], x[-1])]
    assert found == pytest.approx(sum(each) / len(each), rel=1e-9)
    # ALGM's formula charges the most that comparing pairs can cost
    assert [each[0], each[-1]] == pytest.approx(traced, rel=0.02 if name == "algm" else 0.005)
    assert name == "fixed" or len(set(each)) > 1


@pytest.mark.parametrize("method", ["ats", "topk"])
def test_a_budget_that_is_held_on_average(method):
    model, x = build("deit").eval(), images(12)
    tokenzoo.patch_model(model, method, flops=0.75, images=x)
    assert tokenzoo.report(model).data_dependent
    assert tokenzoo.expected_share(model, x) == pytest.approx(0.75, abs=0.03)
    held = tokenzoo.recipe(model)
    tokenzoo.patch_model(tokenzoo.unpatch_model(model), held)  # the recipe stands without the images
    assert tokenzoo.recipe(model) == held


def test_refusals():
    model, x = build("deit").eval(), images(2)
    with pytest.raises(ValueError, match="tome has no form whose counts follow them; leave images out"):
        tokenzoo.patch_model(model, "tome", flops=0.7, images=x)
    with pytest.raises(ValueError, match="give both, or leave images out"):
        tokenzoo.patch_model(model, "ats", images=x)
    with pytest.raises(ValueError, match="flops=1.5"):
        tokenzoo.patch_model(model, "ats", flops=1.5, images=x)
    with pytest.raises(ValueError, match="flops=0.01 cannot be reached: at full strength these images cost"):
        tokenzoo.patch_model(model, "ats", flops=0.01, images=x)
    with pytest.raises(ValueError, match="not patched"):
        tokenzoo.expected_share(model, x)
    assert not tokenzoo.is_patched(model)
    restoring = [{"method": "cluster", "scale": 0.5, "layers": 0}, {"method": "topk", "mass": 0.5, "layers": (1,)}]
    with tokenzoo.patched(model, [*restoring, {"method": "reconstruct", "layers": 2}]):
        with pytest.raises(ValueError, match="given tokens back .*fixed budget"):
            tokenzoo.expected_share(model, x)
    with tokenzoo.patched(model, "ats"), pytest.raises(ValueError, match="at least one"):
        tokenzoo.expected_share(model, x[:0])


def test_tune_tries_it():
    """Below the budget on the images of the search; without images it is named."""
    model, x = build("deit").eval(), images(8)
    assert BY_IMAGE in {c.schedule for c in seeds("ats", describe(model))}
    assert BY_IMAGE not in {c.schedule for c in seeds("tome", describe(model))}
    candidate = Candidate((Part("ats"),), BY_IMAGE)
    fitted = Fitter(model, (32, 32), images=x).fit(candidate, Budget("flops", 0.8))
    assert 0.7 < fitted.share <= 0.8
    with patched(model, fitted.recipe):
        assert tokenzoo.expected_share(model, x) == pytest.approx(fitted.share)
    with pytest.raises(ValueError, match="measured on images"):
        Fitter(model, (32, 32)).fit(candidate, Budget("flops", 0.8))
    found = tune(model, images(16), flops=0.8, methods=["ats"], refine=0, progress=False)
    assert found.tried >= 2 and all(row.share <= 0.8 for row in found.rows if row.budget == "flops=0.8")
