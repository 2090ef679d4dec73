"""NaFlex models on batches of patches: padding is nothing, and images do not feel that they share a batch."""

import copy

import pytest
import torch
from cases import COMPANION, METHODS, build, given, images, serves

import tokenzoo

ROWS = ["naflex", "naflex_siglip", "naflex_rope", "naflex_mixed"]
PIXELS = [(32, 32), (16, 48), (40, 32)]  # 16, 12 and 20 patches
rows = pytest.mark.parametrize("name", ROWS)
# what looks at places on one grid
PLACED = {name for name in METHODS if tokenzoo.create_method(name).uses_positions}


def patches_of(model, image):
    """Patches of one image [N, P * P * C] row by row, and their coordinates."""
    high, wide = (side // 8 for side in image.shape[1:])
    x = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(high * wide, -1)
    index = torch.arange(high * wide)
    return x, torch.stack([index // wide, index % wide], 1)


def batch_of(model, pictures, length=None):
    """What timm's loader makes of images of several sizes."""
    made = [patches_of(model, image) for image in pictures]
    length = length or max(len(x) for x, _ in made)
    patches, coord = torch.zeros(len(made), length, 192), torch.zeros(len(made), length, 2, dtype=torch.int64)
    valid = torch.zeros(len(made), length, dtype=torch.bool)
    for i, (x, at) in enumerate(made):
        patches[i, : len(x)], coord[i, : len(x)], valid[i, : len(x)] = x, at, True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def pictures(sizes=PIXELS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def linear(name):
    """A row with a linear embedding, the only one that takes patches."""
    from cases import BACKBONES, shaken

    torch.manual_seed(0)
    return shaken(BACKBONES[name](embed_proj_type="linear"))


@rows
@torch.no_grad()
def test_nothing_removed_is_the_unpatched_model(name):
    model = linear(name)
    batch = batch_of(model, pictures())
    valid, first = batch["patch_valid"], model.num_prefix_tokens
    plain, features = model(batch), model.forward_features(**batch)
    try:
        taps = model.forward_intermediates(batch, output_fmt="NLC", intermediates_only=True)
    except AssertionError:  # older releases of timm do not take patches here
        taps = []
    for method in ("tome", "evit", "evo", "turbo"):
        with tokenzoo.patched(model, given(method, "zero")):
            torch.testing.assert_close(model(batch), plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(batch["patches"], batch["patch_coord"], valid), model(batch))
            found = model.forward_features(**batch)
            assert torch.equal(found["patch_valid"], valid)
            for part in (slice(first), slice(first, None)):
                real = valid if part.start is not None else torch.ones(3, first, dtype=torch.bool)
                got, wanted = found["patches"][:, part][real], features["patches"][:, part][real]
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.forward_head(**found), plain, atol=1e-5, rtol=1e-5)
            tapped = model.forward_intermediates(batch, output_fmt="NLC", intermediates_only=True)
            for got, wanted in zip(tapped, taps):
                torch.testing.assert_close(got[valid], wanted[valid], atol=1e-5, rtol=1e-5)
                assert (got[~valid] == 0).all()
    assert torch.equal(model(batch), plain)


@rows
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_images_do_not_feel_their_mates(name, method):
    """An image in a padded batch is what it is alone; methods that look at a grid are refused, not guessed."""
    model = linear(name)
    if not serves(method, model):
        return
    shown = pictures()
    batch = batch_of(model, shown)
    tokenzoo.patch_model(model, given(method, **({"r": 1} if method == "mctf" else {})))
    if method in PLACED | {"ats", "flowcut", "reconstruct"}:
        with pytest.raises(ValueError, match=f"{COMPANION.get(method, method)}.*grids of their own"):
            model(batch)
    else:
        out = model(batch)
        alone = torch.cat([model(batch_of(model, [image])) for image in shown])
        torch.testing.assert_close(out, alone, atol=2e-5, rtol=1e-4)
        longer = model(batch_of(model, shown, length=23))
        torch.testing.assert_close(longer, out, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.forward_head(**model.forward_features(**batch)), out, atol=2e-5, rtol=1e-4)
        tokens = model.forward_tokens(model._packed(batch, None, None, None)[0], trace=True)
        assert tokens.valid is not None and (tokens.x[~tokens.valid] == 0).all()
        taps = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
        assert torch.equal(taps["patch_valid"], batch["patch_valid"])
        assert all(tap.shape == (3, 20, 32) for tap in taps["image_intermediates"])
    same = pictures([(32, 32)] * 3)  # one grid, no padding: images after all
    torch.testing.assert_close(model(batch_of(model, same)), model(torch.stack(same)), atol=2e-5, rtol=1e-4)


@rows
@torch.no_grad()
def test_sizes_of_images_may_change(name):
    model = build(name)
    tokenzoo.patch_model(model, "tome", r=2)
    for size in ((32, 32), (48, 24), (16, 64)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        tokens = model.forward_tokens(x)
        first = model.num_prefix_tokens
        assert tokens.layout.grid == (size[0] // 8, size[1] // 8)
        assert tokens.length == first + size[0] * size[1] // 64 - 8
        taps = model.forward_intermediates(x, intermediates_only=True)
        assert all(tap.shape == (2, 32, size[0] // 8, size[1] // 8) for tap in taps)
        with tokenzoo.patched(copy.deepcopy(tokenzoo.unpatch_model(model)), "tome", r=0) as same:
            torch.testing.assert_close(same(x), model(x), atol=1e-5, rtol=1e-5)
        tokenzoo.patch_model(model, "tome", r=2)


@rows
def test_gradients_and_masks(name):
    model = linear(name)
    batch = batch_of(model, pictures())
    tokenzoo.patch_model(model, "topk", keep_rate=0.6)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(batch).square().mean().backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-5, msg=key)
    with torch.no_grad():
        count = model.num_prefix_tokens + 20
        open_mask = torch.ones(3, 1, 1, count, dtype=torch.bool)
        torch.testing.assert_close(model({**batch, "attn_mask": open_mask}), model(batch), atol=1e-5, rtol=1e-5)
        open_mask[..., -1] = False  # of the only image that is not padded
        hidden = model({**batch, "attn_mask": open_mask})
        torch.testing.assert_close(hidden[:2], model(batch)[:2], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(hidden[2], model(batch)[2], atol=1e-4)


def test_refusals():
    model = linear("naflex_rope")
    batch = batch_of(model, pictures())
    with pytest.raises(ValueError, match="cts embeds images at half the size, which NaFlexVit"):
        tokenzoo.patch_model(model, "cts")
    with tokenzoo.patched(model, "tome", r=1, merged_positions="mean"):
        with pytest.raises(ValueError, match="merged_positions='mean'.*grids of their own.*'destination'"):
            model(batch)
        assert model(images(model)).shape == (3, 7)
    with tokenzoo.patched(model, "tome", r=1):
        with pytest.raises(ValueError, match="output_fmt='NCHW' of a batch of patches"):
            model.forward_intermediates(batch)
        with pytest.raises(ValueError, match="padding in front of real patches"):
            model({**batch, "patch_valid": batch["patch_valid"].flip(1)})
    model.patch_drop = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="NaFlexVit.patch_drop"):
        tokenzoo.patch_model(model, "tome", r=1)
