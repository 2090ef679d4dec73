"""DiffRate's search: the training form against a loop written from the equations, gradients, and what comes out."""

from __future__ import annotations

import pytest
import torch
import yaml
from cases import build, images
from torch import nn
from training_data import draw

import tokenzoo
from tokenzoo.apply.patch import put_on
from tokenzoo.cli import main
from tokenzoo.core.prices import Prices
from tokenzoo.cost.prices import prices_of
from tokenzoo.layers.rates import LearnedCount
from tokenzoo.tuning.rates import RateSearch, _kept, _share


def test_learned_count():
    count = LearnedCount(7, 2)
    assert count.kept_token_candidate.tolist() == [7.0, 5.0, 3.0, 1.0] and int(count.kept()) == 4
    torch.testing.assert_close(count.survival(), torch.tensor([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]))
    mask = count.mask(6)
    assert mask.round().tolist() == [1, 1, 1, 1, 0, 0, 1]
    (mask.sum()).backward()
    by_mask = count.selected_probability.grad.clone()
    count.selected_probability.grad = None
    count.kept().backward()  # the mean count is the sum of the probabilities
    torch.testing.assert_close(count.selected_probability.grad, by_mask)
    only = LearnedCount(3, 4)
    assert only.kept_token_candidate.tolist() == [3.0] and int(only.kept()) == 3


def searching(name: str = "deit", seed: int = 0) -> tuple[nn.Module, list[nn.ModuleDict]]:
    """A model under search whose counts differ from block to block."""
    model = build(name)
    put_on(model, RateSearch(patches=16, granularity=1))
    found = [block.tokenzoo_0_diffrate_search for block in model.blocks[1:]]
    generator = torch.Generator().manual_seed(seed)
    for index, module in enumerate(found):
        for place, key in enumerate(("prune_ddp", "merge_ddp")):
            logits = torch.randn(16, generator=generator) + torch.linspace(2.0 - 1.2 * (index + place / 2), 0, 16)
            module[key].selected_probability.data = logits
    for block in model.blocks:
        block.training = True
    return model, found


@torch.no_grad()
def by_loop(model: nn.Module, x: torch.Tensor, counts: list[tuple[int, int]]) -> torch.Tensor:
    """Logits of the masked training form, one image at a time, with tokens in the order they stand in."""
    out = []
    for image in x:
        h = model._pos_embed(model.patch_embed(image[None]))[0]
        n = len(h)
        alive, size = [True] * n, torch.ones(n)
        for block, (kept, stays) in zip(model.blocks, counts):
            qkv = block.attn.qkv(block.norm1(h)).unflatten(1, (3, block.attn.num_heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)
            logits = q @ k.transpose(1, 2) * block.attn.scale + size.log()
            hidden = ~torch.tensor(alive).expand(n, n) & ~torch.eye(n, dtype=torch.bool)
            probs = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            h = h + block.ls1(block.attn.proj((probs @ v).transpose(0, 1).flatten(1)))
            ranked = sorted((j for j in range(1, n) if alive[j]), key=lambda j: -float(probs[:, 0, j].sum()))
            heads, members = ranked[:stays], {j: [j] for j in ranked[:stays]}
            grown = size.clone()
            for j in ranked[stays:kept]:
                cosine = [float(h[j] @ h[i] / h[j].norm() / h[i].norm()) for i in heads]
                best = heads[cosine.index(max(cosine))]
                members[best].append(j)
                grown[best] += max(1.0, max(cosine) * float(size[j]))
            if stays < len(ranked):
                h = torch.stack([h[members[j]].mean(0) if j in members else h[j] for j in range(n)])
                size, alive = grown, [j == 0 or j in heads for j in range(n)]
            h = h + block.ls2(block.mlp(block.norm2(h)))
        out.append(h)
    return model.forward_head(model.norm(torch.stack(out)))


def test_training_form_is_that_of_the_equations():
    model, found = searching()
    x = images(model)
    kept = [(int(p), int(m)) for p, m in _kept([None, *found], prices_of(model))]
    assert kept[0] == (16, 16) and any(p > m for p, m in kept) and any(a[1] > b[0] for a, b in zip(kept, kept[1:]))
    torch.testing.assert_close(model(x), by_loop(model, x, kept), atol=1e-4, rtol=1e-4)


def test_every_rate_that_acts_gets_a_gradient():
    model, found = searching()
    model(images(model)).square().mean().backward()
    acts = [(int(p), int(m)) for p, m in _kept([None, *found], prices_of(model))]
    for module, before, (kept, stays) in zip(found, acts, acts[1:]):
        for key, acted in (("prune_ddp", kept < before[1]), ("merge_ddp", stays < kept)):
            grad = module[key].selected_probability.grad
            assert (grad is not None and bool(grad.abs().max() > 0)) == acted, key


def test_budget_pulls_where_the_smallest_count_is():
    """The gradient of the multiply-adds reaches a count only where it is the one that is in force."""
    model, found = searching()
    prices = prices_of(model)
    assert prices.unpatched == tokenzoo.report(model).unpatched
    kept = _kept([None, *found], prices)
    share = _share(kept, prices)
    n = [1 + int(m) for _, m in kept]
    block = prices.blocks[0]
    spent = [block.token * a + block.pair * a * a + block.mlp * b for a, b in zip([17, *n], n)]
    torch.testing.assert_close(share, torch.tensor((prices.rest + sum(spent)) / prices.unpatched))
    share.backward()
    left = 16
    for module, (pruned, merged) in zip(found, [(int(p), int(m)) for p, m in kept][1:]):
        for key, own, smallest in (("prune_ddp", int(module["prune_ddp"].kept()), left), ("merge_ddp", merged, pruned)):
            if own > smallest:
                grad = module[key].selected_probability.grad
                assert grad is None or grad.abs().max() == 0
        left = merged
    assert any(m["merge_ddp"].selected_probability.grad.abs().max() > 0 for m in found)


@pytest.mark.parametrize("name", ["deit", "gap"])
def test_finds_a_schedule_for_a_budget(name):
    model = build(name).train()
    x = images(model, 12)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    options = {"flops": 0.7, "batch_size": 6, "granularity": 1, "epochs": 1}
    found = tokenzoo.learn_rates(model, x, torch.arange(12) % 7, **options)
    assert list(model.state_dict()) == list(before) and not tokenzoo.is_patched(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and all(p.requires_grad for p in model.parameters())
    assert 0.6 < found.share <= 0.7 and found.recipe["method"] == "diffrate" and len(found.losses) == 1
    with tokenzoo.patched(model, found.recipe):
        assert tokenzoo.report(model).ratio == found.share
    if name == "deit":
        assert tokenzoo.learn_rates(model, x, torch.arange(12) % 7, **options) == found


def test_learns_towards_the_budget_and_the_task():
    """From half of the tokens everywhere, the share comes to the budget; what the task needs decides where."""
    model = build("deit")
    x = images(model, 12)
    batches = [(part, model(part).argmax(1).detach()) for part in x.split(6)]
    found = tokenzoo.learn_rates(model, batches, flops=0.7, granularity=1, epochs=4, lr=0.4, min_lr=0.1)
    assert abs(found.learned - 0.7) < 0.06 < abs(0.77 - 0.7)  # 0.77 is where it begins
    silent = tokenzoo.learn_rates(model, x, flops=0.7, granularity=1, epochs=1, batch_size=6)
    assert all(loss > 1e-5 for loss in silent.losses)  # agreement with the unpatched model


def test_the_command_writes_a_recipe(tmp_path, capsys):
    data = draw(tmp_path / "data", count=2, val=1)
    small = ["img_size=32", "patch_size=8", "depth=3", "embed_dim=32", "num_heads=2"]
    words = ["rates", "--model", "vit_tiny_patch16_224", "--model-kwargs", *small, "--num-classes", "7"]
    words += ["--data-dir", str(data), "--split", "train", "--flops", "0.75", "--epochs", "1", "--granularity", "1"]
    file = tmp_path / "rates.yaml"
    assert main([*words, "--no-labels", "--device", "cpu", "--workers", "0", "--output", str(file)]) == 0
    assert "fitted to 7" in capsys.readouterr().out
    recipe = yaml.safe_load(file.read_text())
    assert recipe["method"] == "diffrate" and len(recipe["prune"]) == 3 and recipe["prune"][0] == 17


@pytest.mark.parametrize("options,message", [
    ({"flops": 1.5}, "flops=1.5"), ({"flops": 0.1}, "out of reach"), ({"flops": 0.7, "epochs": 0}, "epochs=0"),
    ({"flops": 0.7, "labels": torch.zeros(3)}, "3,\\) labels for 4 images"),
    ({"flops": 0.7, "images": iter([])}, "no images in an epoch"),
])  # fmt: skip
def test_refusals(options, message):
    model = build("deit")
    options = {"images": images(model, 4), "epochs": 1} | options
    with pytest.raises(ValueError, match=message):
        tokenzoo.learn_rates(model, **options)
    assert not tokenzoo.is_patched(model)


def test_models_without_such_prices_are_refused():
    model = build("xcit")
    with pytest.raises(ValueError, match="a loss on multiply-adds needs blocks.*Xcit"):
        tokenzoo.learn_rates(model, images(model, 4), flops=0.7)
    with pytest.raises(ValueError, match="patched; call"):
        tokenzoo.learn_rates(tokenzoo.patch_model(build("deit"), "tome", r=1), images(build("deit"), 4), flops=0.7)


def test_prices_are_those_of_the_report():
    for name in ("deit", "gap", "distilled", "gated", "dinov3", "parallel_things"):
        model = build(name)
        prices = prices_of(model)
        assert isinstance(prices, Prices) and prices.unpatched == tokenzoo.report(model).total
        full = [torch.tensor(float(prices.patches))] * len(prices.blocks)
        assert float(prices.share(full, full)) == pytest.approx(1.0)
