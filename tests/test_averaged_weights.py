"""An average of the weights is a copy of the model, which has to follow the options that change during training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from cases import build, images
from test_train_imagenet import main  # noqa: F401 (a fixture)
from timm.utils import ModelEmaV3
from training_data import draw, words

import tokenzoo
from tokenzoo.training import engine


def test_the_average_has_the_keep_rate_of_the_model(main, tmp_path, monkeypatch, capsys):  # noqa: F811
    """At every update of a run, also where nothing is evaluated."""
    rates, update = [], engine.Engine._update

    def watched(self, number):
        rates.append([tokenzoo.recipe(m).get("keep_rate", 0.7) for m in (self.step.model, self.ema.module)])
        return update(self, number)

    monkeypatch.setattr(engine.Engine, "_update", watched)
    data = draw(tmp_path / "data", 4, 5)
    more = ["--epochs", "2", "--method", "evit", "--shrink-epochs", "2", "--batch-size", "4", "--model-ema"]
    assert main(words(data, tmp_path / "run", *more, "--eval-every", "9")) == 0, capsys.readouterr().err
    assert len({own for own, _ in rates}) > 3 and all(own == averaged for own, averaged in rates)


@pytest.mark.parametrize("method,change", [("evit", {"keep_rate": 0.5}), ("tome", {"r": 1})])
@torch.no_grad()
def test_a_copy_follows_when_it_is_told(method, change):
    """What the README says about averages that users keep themselves."""
    model = tokenzoo.patch_model(build("deit"), method, **({"r": 2} if method == "tome" else {}))
    ema, x = ModelEmaV3(model), images(model)
    before = ema.module(x)
    tokenzoo.update_method(model, **change)
    assert torch.equal(ema.module(x), before)
    tokenzoo.update_method(ema.module, **change)
    assert torch.equal(ema.module(x), model(x)) and torch.equal(deepcopy(model)(x), model(x))
