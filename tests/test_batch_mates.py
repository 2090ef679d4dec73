"""What a method makes of an image does not depend on the other images of its batch."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS, build, given, images, serves

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.algm import ALGM, Stage

# name -> recipe whose token counts the image decides, several steps each
BY_IMAGE = {
    "algm, many pair steps": {"method": "algm", "threshold": 0.1, "layers": (0, 1, 2, 3)},
    "algm, pairs behind hardly any window": {"method": "algm", "threshold": 0.9, "layers": (0, 1, 2, 3)},
    "algm, log sizes": {"method": "algm", "threshold": 0.1, "layers": (0, 1, 2, 3), "prop_attn": True},
    "algm, then algm": [
        {"method": "algm", "threshold": 0.6, "layers": (0, 1)}, {"method": "algm", "threshold": 0.3, "layers": (2, 3)},
    ],
    "algm twice, windows only": [
        {"method": "algm", "threshold": 0.6, "layers": (0,)}, {"method": "algm", "threshold": 0.3, "layers": (2,)},
    ],
    "ats": {"method": "ats", "layers": (1, 2, 3)},
    "ats, then algm": [{"method": "ats", "layers": (1,)}, {"method": "algm", "threshold": 0.1, "layers": (2, 3)}],
    "algm, then ats": [{"method": "algm", "threshold": 0.1, "layers": (0, 1)}, {"method": "ats", "layers": (2, 3)}],
    # steps of algm in which some images merge nothing, behind reductions that leave no grid
    "tome, then pairs": [
        {"method": "tome", "r": [2]}, {"method": "algm", "threshold": 2.0, "layers": (1, 2, 3)},
    ],
    "tome, then algm": [
        {"method": "tome", "r": [2]}, {"method": "algm", "threshold": 0.9, "layers": (1, 2)},
    ],
    "evit, then algm": [
        {"method": "evit", "keep_rate": 0.8, "layers": (0,)}, {"method": "algm", "threshold": 0.9, "layers": (1, 2, 3)},
    ],
    "cluster, then algm": [  # without iterations, which make centres of flat images equal up to rounding
        {"method": "cluster", "layers": (0,), "grid": (4, 3), "iterations": 0},
        {"method": "algm", "threshold": 0.9, "layers": (1, 2, 3)},
    ],
    "ats, then hardly any window": [
        {"method": "ats", "layers": (0,)}, {"method": "algm", "threshold": 0.9, "layers": (1, 2, 3)},
    ],
}  # fmt: skip


def mixed(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Images with much and with little to merge: flat ones, smooth ones, flat ones with one other patch, noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = images(model, 6, seed)
    flat = torch.randn(6, 3, 1, 1, generator=generator) + 0.02 * noise
    spot = flat.clone()
    spot[:, :, :8, :8] = noise[:, :, :8, :8]
    smooth = torch.nn.functional.interpolate(noise[:, :, ::16, ::16], noise.shape[-2:], mode="bilinear")
    return torch.cat([noise[:2], flat[2:3], spot[3:5], smooth[5:]])


@pytest.mark.parametrize("backbone", ["deit", "gap", "registers"])
@pytest.mark.parametrize("name", BY_IMAGE)
@torch.no_grad()
def test_lengths_of_their_own(name: str, backbone: str):
    recipe = BY_IMAGE[name]
    if "ats" in name and backbone == "gap":
        pytest.skip("ATS needs a class token")
    model = build(backbone)
    with torch.no_grad():
        model.pos_embed.mul_(0.1)  # so that alike patches stay alike
    lengths = set()
    for seed in range(6):
        x = mixed(model, seed)
        with tokenzoo.patched(model, recipe):
            together = model(x)
            tokens = model.forward_tokens(x)
            for index in range(len(x)):
                alone = model(x[index : index + 1])
                torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=1e-4)
                own = model.forward_tokens(x[index : index + 1])
                count = own.length if own.valid is None else int(own.valid.sum())
                real = tokens.length if tokens.valid is None else int(tokens.valid[index].sum())
                assert count == real
                lengths.add(count)
                # the same tokens in the same order
                assert torch.equal(tokens.original_positions()[index, :count], own.original_positions()[0, :count])
                assert torch.equal(tokens.sizes()[index, :count], own.sizes()[0, :count])
                torch.testing.assert_close(tokens.x[index, :count], own.x[0, :count], atol=2e-5, rtol=1e-4)
    assert len(lengths) > 1  # else nothing was tried


@pytest.mark.parametrize("backbone", ["deit", "gap", "dinov3"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])  # which draws for a batch
@torch.no_grad()
def test_every_method(method: str, backbone: str):
    model = build(backbone)
    if not serves(method, model):
        pytest.skip("refused by name")
    x = mixed(model, 7)
    with tokenzoo.patched(model, given(method)):
        together = model(x)
        for index in (0, 3, 5):
            torch.testing.assert_close(model(x[index : index + 1]), together[index : index + 1], atol=2e-5, rtol=1e-4)


ALL_IN_PLACE = ("cluster", "reconstruct", "sta", "cts")  # methods that serve no sequence that was reduced
SERVED_AFTER = [method for method in METHODS if method not in ("random", "algm", *ALL_IN_PLACE)]


@pytest.mark.parametrize("backbone", ["deit", "gap", "dinov3"])
@pytest.mark.parametrize("method", SERVED_AFTER)
@torch.no_grad()
def test_every_method_after_images_lost_tokens_of_their_own(method: str, backbone: str):
    """An image that has lost nothing keeps its grid, one that has lost some its own counts."""
    model = build(backbone)
    if not serves(method, model):
        pytest.skip("refused by name")
    with torch.no_grad():
        if getattr(model, "pos_embed", None) is not None:
            model.pos_embed.mul_(0.1)
    first = {"method": "algm", "threshold": 0.9, "layers": (0,)}
    second = {"layers": (2,), **given(method), **({"clip": True} if method == "mctf" else {})}
    x, lost = mixed(model, 7), set()
    with tokenzoo.patched(model, [first, second]):
        together = model(x)
        for index in range(len(x)):
            alone = model.forward_tokens(x[index : index + 1], trace=True)
            lost.add(next((step.map.n_out for step in alone.trace if step.block == 0), 0))
            torch.testing.assert_close(model(x[index : index + 1]), together[index : index + 1], atol=2e-5, rtol=1e-4)
    assert 0 in lost and len(lost) > 1  # some images whole, some not


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_empty_pair_step_takes_the_new_order(prefix: int):
    """No pair stands out: the tokens are those of before, even ones in front; so a batch mate's merges change nothing.

    As published (`turbo_matching` hands out [even, odd] whatever merges).
    """
    generator = torch.Generator().manual_seed(prefix)
    layout = Layout(prefix, prefix > 0, (4, 4), track_size=True)
    same = torch.ones(1, 16 + prefix, 6)
    pair = torch.randn(1, 16 + prefix, 6, generator=generator)
    # one token of the even ones is unlike all others: the rest lies below mean + deviation, none stands out
    same[0, prefix + prefix % 2 + 4] = torch.tensor([1.0, -1, 1, -1, 1, -1])
    same = same + 0.02 * torch.randn(same.shape, generator=generator)
    step = Step(ALGM(), 0, Stage(False, None))
    alone = Tokens(same, layout)
    alone_map = step.method.map(alone, None, step)
    both = Tokens(torch.cat([same, pair]), layout)
    both_map = step.method.map(both, None, step)
    assert alone_map is not None and alone_map.n_out == 16 + prefix
    left, right = alone.reduce(alone_map), both.reduce(both_map)
    assert right.valid is not None and not right.valid[1].all()  # the mate merged
    torch.testing.assert_close(right.x[:1], left.x)
    again = Step(ALGM(), 1, Stage(False, None))  # the next pair step sees the same neighbours
    left_again, right_again = (t.reduce(again.method.map(t, None, again)) for t in (left, right))
    count = left_again.length if left_again.valid is None else int(left_again.valid.sum())
    torch.testing.assert_close(right_again.x[:1, :count], left_again.x[:, :count])
    assert int(right_again.valid[0].sum()) == count
    assert torch.equal(left.sizes(), torch.ones(1, 16 + prefix, 1))
    first, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    assert torch.equal(left.x[:, -len(range(odd, 16 + prefix, 2)) :], same[:, odd::2])
    assert torch.equal(left.x[:, :prefix], same[:, :prefix])
    if prefix:
        assert torch.equal(left.x[:, prefix : prefix + len(range(first, 16 + prefix, 2))], same[:, first::2])
