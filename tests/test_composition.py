"""Any two methods together: counts, gradients, recipes that survive, and order where they meet."""

import json
from itertools import product

import pytest
import torch
import yaml
from cases import EVERY, KEEPS_LENGTH, build, given, images

import tokenzoo


def _recipe(first, second):
    """Both methods with their reducing options, at strengths that leave something for the other."""
    out = []
    for name in (first, second):
        rows = given(name)
        for options in rows if isinstance(rows, list) else [rows]:
            if type(options.get("r")) is int:
                options.update(r=1, clip=True)
            if options["method"] in ("ia_red2", "thresholds") and "evo" in (first, second):
                options.update(layers=(0,))  # evo refuses to halve the last patch
            if options["method"] != "cluster" or options not in out:  # one clustering is enough
                out.append(options)
    return out


OWN = {"catanet", "sparsifiner", "tap"}  # run attention themselves
INSIDE = {"ats", "evo", "gtp", "mctf", "mod", "sta", "tomesd", "vggt"}  # act in it, around it, or run it too


def _refusal(first, second):
    """What is said about a pair that cannot act together with these options, None for all others."""
    both = {first, second}
    if OWN & both:
        other = both - {first} if first in OWN else both - {second}
        if first == second or other & (INSIDE | OWN):
            return "chooses among what|replaces the attention that|looks at the attention that|names a block twice"
    if "cts" in both and {"cluster", "reconstruct"} & both:
        return "cluster before any other reduction"  # shared groups are no grid
    if "evo" in both and "reconstruct" in both:
        return "carries importance from block to block"
    if both <= {"evo", "mod", "tomesd", "vggt"} and "evo" in both:
        return "both merge around the branches of block 1"
    grid_is_gone = {"cluster", "cts", "reconstruct"} & both or first in ("sta", "tomesd", "vggt")
    if "tap" in both and {"cluster", "cts", "reconstruct"} & both:
        return "needs all 4 x 4 patches in their grid"
    if second == "sta" and grid_is_gone or first == "sta" and {"cluster", "cts", "reconstruct"} & both:
        return "needs all 4 x 4 patches in their grid"
    return None


def _move(model, name):
    """New tokens of untrained slimming are all alike, so that rounding would say which is the best of them."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key and parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)


def _grid_depends_on_images(first, second):
    """Whether a method that needs the whole grid comes after one that leaves what the images ask for."""
    needs = ("cluster", "reconstruct", "sta", "tap")
    return first == "ia_red2" and second in needs or second == "ia_red2" and first in ("sta", "tap")


@pytest.mark.parametrize("first,second", list(product(EVERY, EVERY)))
def test_two_methods(first, second, tmp_path):
    model = build("deit")
    x = images(model)
    if (refusal := _refusal(first, second)) is not None:
        with pytest.raises(ValueError, match=refusal):
            tokenzoo.patch_model(model, _recipe(first, second))
        return
    tokenzoo.patch_model(model, _recipe(first, second))
    if _grid_depends_on_images(first, second):
        with pytest.raises(ValueError, match="needs all 4 x 4 patches in their grid, but .* left of it"):
            model(x)
        return
    if "sit" in (first, second):
        _move(model, "_sit.")
    tokens = model.forward_tokens(x, trace=True)
    names = {step.method for step in tokens.trace}
    assert names == {first, second} - KEEPS_LENGTH or KEEPS_LENGTH & {first, second}
    report = tokenzoo.report(model)
    assert tokens.length <= report.tokens_out if report.data_dependent else tokens.length == report.tokens_out
    out = model(x)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0

    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(alone, out, atol=3e-5, rtol=1e-4)
        out = model(x)  # products round as they please where they prepare for gradients
        saved = tokenzoo.recipe(model)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(saved))
        for again in (json.loads(json.dumps(saved)), str(file)):
            other = build("deit")
            tokenzoo.patch_model(other, again)
            assert tokenzoo.recipe(other) == saved
            other.load_state_dict(model.state_dict())  # recipes hold no weights of learned modules
            assert torch.equal(other(x), out)


def test_others_fill_the_gaps():
    model = build("deit")
    tokenzoo.patch_model(model, [tokenzoo.EViT(layers=(1, 3)), tokenzoo.ToMe(layers="others", r=1)])
    rows = [row.methods for row in tokenzoo.report(model).rows if row.block is not None]
    assert rows == ["tome", "evit", "tome", "evit"]


@torch.no_grad()
def test_same_place_runs_in_list_order():
    """Two methods between attention and MLP of one block: the second sees what the first leaves."""
    x = images(build("deit"))
    outs = {}
    for order in (("topk", "tome"), ("tome", "topk")):
        model = build("deit")
        options = {"topk": {"layers": [1], "tokens": 9}, "tome": {"layers": [1], "r": 3}}
        tokenzoo.patch_model(model, [{"method": name, **options[name]} for name in order])
        trace = model.forward_tokens(x, trace=True).trace
        assert tuple(step.method for step in trace) == order
        outs[order] = [step.map.n_out for step in trace]
    assert outs[("topk", "tome")] == [10, 7]
    assert outs[("tome", "topk")] == [14, 10]


def test_sizes_say_how_many_patches_stand_behind_a_token():
    """EViT's fused token and ToMe's merged ones together: sizes add up to the patches that were not dropped."""
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, [tokenzoo.EViT(layers=(1,), keep_rate=0.5), tokenzoo.ToMe(layers=(2, 3), r=2)])
    tokens = model.forward_tokens(x, trace=True)
    torch.testing.assert_close(tokens.size.sum(1), torch.full((len(x), 1), 17.0))


def test_others_twice_share_the_same_blocks():
    model = build("deit")
    first, second = tokenzoo.ToMe(layers="others", r=1), tokenzoo.TopK(layers="others", tokens=(6, 4))
    tokenzoo.patch_model(model, [tokenzoo.EViT(layers=(0, 1)), first, second])
    rows = [row.methods for row in tokenzoo.report(model).rows if row.block is not None]
    assert rows[:2] == ["evit", "evit"] and rows[2:] == ["tome, topk"] * 2
