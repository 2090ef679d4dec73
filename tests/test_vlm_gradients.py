"""Training of patched vision-language models: loss and gradients are those of embeddings made shorter by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm_reference as reference
from figures import difference
from torch.nn.functional import cross_entropy
from vlm_cases import IMAGE, RECIPES, SERVED, alone, build, counted, lm_of, loudest, oracle_of, prompts

import tokenzoo
from tokenzoo.vlm.passing import CUTS, during

COUNTS = (1, 2)
KEEP = {"selector": 6, "both": 9, "tower": 9}
recipes = pytest.mark.parametrize(("name", "recipe"), SERVED)


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """The loss of transformers, which takes logits for float32, in their own precision."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def training(name: str, recipe: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A model in float64, prompts of one and two images, and labels: words behind the first four."""
    model = build(name, double=True).train()
    model.loss_function = plain_loss
    batch = counted(name, prompts(name, model))
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
    labels[batch["attention_mask"].cumsum(1) <= 4] = -100  # a first word would be told from padding
    return model, batch, labels


@pytest.fixture(autouse=True)
def gemma_in_its_own_precision(monkeypatch):
    """Whatever the model's precision, Gemma's norms sum gradients of their weights over all rows in float32, and Gemma
    2 attends eagerly, with softmax rows in float32: both give 1e-9 between a batch and each prompt alone.
    """
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr("torch.nn.functional.softmax", lambda x, dim=None, **options: softmax(x, dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    for name in ("gemma.modeling_gemma.Gemma", "gemma2.modeling_gemma2.Gemma2", "gemma3.modeling_gemma3.Gemma3"):
        monkeypatch.setattr(f"transformers.models.{name}RMSNorm.forward", forward)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that got one."""
    model.zero_grad()
    loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def kept_rows(model: Any, one: dict[str, torch.Tensor], recipe: str) -> torch.Tensor:
    """Layer from which on a row is gone, of what the selector alone takes out, from an unpatched model."""
    if recipe not in KEEP:
        return torch.full(one["input_ids"][0].shape, len(lm_of(model).layers))
    kept = torch.cat([loudest(model, rows, KEEP[recipe]) for rows in reference.features(model, one)])
    return reference.at_entry(model, one, kept)


@recipes
def test_loss_and_gradients_are_those_of_shorter_embeddings(name, recipe, figure):
    """What a dropper drops is told by the model; how it decides, other tests hold."""
    model, batch, labels = training(name, recipe)
    ones, real = alone(name, batch, COUNTS), batch["attention_mask"].bool()
    owned = [own[mask] for own, mask in zip(labels, real)]
    with oracle_of(model, recipe):
        gone = [kept_rows(model, one, recipe) for one in ones]
    tokenzoo.patch_model(model, RECIPES[recipe]())
    for rows, one, own in zip(gone, ones, owned):
        entered = (rows > 0).nonzero().flatten()
        with torch.no_grad(), during(CUTS, []) as cuts:
            model(**one, labels=own[None])
        for layer, order, out in cuts:
            rows[entered[order[0][out[0]]]] = layer
    loss = model(**batch, labels=labels).loss
    found = gradients(model, loss)
    tokenzoo.unpatch_model(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with oracle_of(model, recipe):
        for rows, one, own in zip(gone, ones, owned):
            left = own[rows == len(lm_of(model).layers)]
            logits = reference.shortened(model, one | {"labels": own[None]}, rows)
            total = total + cross_entropy(logits[:-1], left[1:], reduction="sum", ignore_index=-100)
            count += int((left[1:] != -100).sum())
        want = gradients(model, total / count)
    figure("loss = oracle", name, recipe, difference(loss.detach(), (total / count).detach()))
    for key in found.keys() | want.keys():
        zeros = torch.zeros_like(dict(model.named_parameters())[key])
        figure("gradients = oracle, float64", name, recipe, difference(found.get(key, zeros), want.get(key, zeros)))
    projecting = [g for key, g in want.items() if any(p in key for p in ("projector", "merger", "connector"))]
    assert any(g.abs().sum() > 0 for g in projecting)


@recipes
def test_checkpointed_gradients_are_the_same(name, recipe, figure):
    model, batch, labels = training(name, recipe)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    plain = gradients(model, model(**batch, labels=labels).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, model(**batch, labels=labels).loss)
    assert plain.keys() == again.keys() and any(g.abs().sum() > 0 for g in plain.values())
    for key, grad in plain.items():
        figure("checkpointed gradients", name, recipe, difference(again[key], grad))


def test_padding_that_was_put_in_is_not_learned():
    """Images are labels too here, as where ids are copied: rows put in behind a shorter prompt come from images."""
    model = build("llava", double=True)
    model.loss_function = plain_loss
    batch = prompts("llava", model, side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    total, count = 0.0, 0
    for one in alone("llava", batch, COUNTS):
        rows = kept_rows(model, one, "selector")
        left = one["input_ids"][0][rows > 0]
        total += float(cross_entropy(reference.logits(model, one, rows)[:-1], left[1:], reduction="sum"))
        count += len(left) - 1
    tokenzoo.patch_model(model, RECIPES["selector"]())
    with torch.no_grad():
        assert abs(float(model(**batch, labels=labels).loss) - total / count) <= 1e-6
