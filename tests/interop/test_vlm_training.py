"""Patched vision-language models under what users train and place them with: PEFT, Trainer, accelerate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from vlm_cases import IMAGE, Loudest, build, prompts  # noqa: E402

import tokenzoo  # noqa: E402

transformers = pytest.importorskip("transformers")
NAMES = ["llava", "qwen2_5_vl"]


def recipe():
    return [Loudest(keep=6), tokenzoo.FastV(layers=3)]


def labelled(name, model):
    batch = prompts(name, model)
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
    return batch | {"labels": batch["input_ids"].masked_fill(hidden, -100)}


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_adapters(name):
    """Losses are those of merged weights, all adapters of the language model get gradients, and those alone."""
    peft = pytest.importorskip("peft")
    model = build(name, double=True)
    batch = labelled(name, model)
    tokenzoo.patch_model(model, recipe())
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    loss = adapted(**batch).loss
    loss.backward()
    grads = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert grads and all("lora_" in key and g is not None and g.abs().sum() > 0 for key, g in grads.items())
    merged = adapted.merge_and_unload()
    assert tokenzoo.is_patched(merged)
    assert (merged(**batch).loss - loss).abs() <= 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_trainer(name, tmp_path):
    """The weights behind it are those of a step by hand."""
    pytest.importorskip("accelerate")
    model, twin = build(name), build(name)
    batch = labelled(name, model)
    for each in (model, twin):
        tokenzoo.patch_model(each, recipe())
        each.train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, optim="sgd", learning_rate=0.1,
        max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=[0, 1], data_collator=lambda rows: dict(batch)
    )
    trainer.train()
    twin(**batch).loss.backward()
    moved = 0
    for key, p in twin.named_parameters():
        want = before[key] if p.grad is None else before[key] - 0.1 * p.grad
        assert (model.get_parameter(key) - want).abs().max() <= 1e-5, key
        moved += p.grad is not None and bool(p.grad.any())
    assert moved > 20


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_host(name):
    """accelerate's offload, put on before or behind patching: the same logits, and unpatching leaves it as it is."""
    accelerate = pytest.importorskip("accelerate")
    model = build(name)
    batch = prompts(name, model)
    with torch.no_grad():
        plain = model(**batch).logits
        tokenzoo.patch_model(model, recipe())
        want = model(**batch).logits
        tokenzoo.unpatch_model(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        tokenzoo.patch_model(model, recipe())
        assert torch.equal(model(**batch).logits, want)
        tokenzoo.unpatch_model(model)
        assert torch.equal(model(**batch).logits, plain)
        other = build(name)
        tokenzoo.patch_model(other, recipe())
        accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
        assert torch.equal(other(**batch).logits, want)
