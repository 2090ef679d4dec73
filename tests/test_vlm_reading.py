"""What selectors read of a tower: made by its own layers where it can be, and never of modules that were replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vlm_cases import build, inner_of, pixels, prompts

import tokenzoo
from tokenzoo.vlm import visual_rows
from tokenzoo.vlm.functional import cdpruner, divprune
from tokenzoo.vlm.functional.deciding import Cosines, likeness


class Turned(nn.Module):
    """Stands in the place of a linear layer, as an adapter does."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x):
        return -self.plain(x)


def layer_of(model: nn.Module, index: int) -> nn.Module:
    return inner_of(model).vision_tower.encoder.layers[index]


def kept(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [each.keep for each in visual_rows(model, **batch)]


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "vtc_cls"])
def test_queries_and_keys_are_made_once(name):
    model = build("llava")
    batch, calls = prompts("llava", model, counts=(1,)), []
    attn = layer_of(model, 2).self_attn
    tokenzoo.patch_model(model, name, keep=6)
    hooks = [getattr(attn, each).register_forward_pre_hook(lambda *_: calls.append(0)) for each in ("q_proj", "k_proj")]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("way", ["adapter", "hook"])
def test_what_comes_behind_the_patch_is_read_too(way):
    """An adapter, or a hook that changes what a layer gives, counts whether it comes before the patch or behind it."""

    def change(model):
        attn = layer_of(model, 2).self_attn
        if way == "adapter":
            attn.k_proj = Turned(attn.k_proj)
        else:
            attn.k_proj.register_forward_hook(lambda module, args, out: -out)

    found = []
    for before in (True, False, None):
        model = build("llava", double=True)
        batch = prompts("llava", model, counts=(1,))
        if before:
            change(model)
        tokenzoo.patch_model(model, "fastervlm", keep=6)
        if before is False:
            change(model)
        found.append(torch.cat(kept(model, batch)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_unpatching_leaves_no_hook():
    model = build("llava")
    tokenzoo.unpatch_model(tokenzoo.patch_model(model, "vtc_cls", keep=6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert pixels(prompts("llava", model, counts=(1,)))


@pytest.mark.parametrize("n", [7, 256, 577])
def test_half_of_a_symmetric_product_is_all_of_it(n):
    units = torch.randn(2, n, 24, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    want = units @ units.transpose(1, 2)
    assert (likeness(units) - want).abs().max() <= 1e-12
    alike = Cosines(units)
    off = alike._all.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf")).amax(-1)
    before = alike._all.clone()
    assert torch.equal(alike.nearest(), off) and torch.equal(alike._all, before)


def test_greedy_choices_of_a_batch_are_those_of_each():
    x = torch.randn(3, 70, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(3, 70, generator=torch.Generator().manual_seed(2))
    for choose in (lambda a, b: divprune(a, 12), lambda a, b: cdpruner(a, b, 12)):
        whole = choose(x, weight)
        each = torch.cat([choose(x[i : i + 1], weight[i : i + 1]) for i in range(3)])
        assert torch.equal(whole, each) and all(len(set(row)) == 12 for row in whole.tolist())
