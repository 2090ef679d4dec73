"""Defaults that a user meets without asking for them: right whatever the scale of a model's features."""

from __future__ import annotations

import pytest
import torch
from cases import build

import tokenzoo
from tokenzoo.core.selection import keep_best
from tokenzoo.core.spreading import cosine_temperature, share_out
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.ops.cells.kmeans import cluster, relative_temperature


def areas(scale: float = 1.0, noise: float = 0.3) -> torch.Tensor:
    """Features of an 8 x 8 map whose left and right halves show two things; every image at the same scale."""
    generator = torch.Generator().manual_seed(2)
    things = torch.randn(2, 2, 16, generator=generator)
    left = (torch.arange(8) < 3).repeat(8)  # no border of a 4 x 4 grid
    x = torch.where(left.view(1, -1, 1), things[:, :1], things[:, 1:])
    return scale * (x + noise * torch.randn(2, 64, 16, generator=generator))


# ---- cluster: the temperature goes with the features


def test_reference_distance_is_that_of_neighbours():
    x, seen = areas(), torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    for visible in (None, seen):
        found = relative_temperature(x, (8, 8), 10.0, visible)
        for image in range(2):
            apart = [
                (x[image, a] - x[image, b]).square().sum().item()
                for a in range(64) for b in (a + 1, a + 8)
                if b < 64 and (b == a + 8 or a % 8 < 7)
                and (visible is None or (visible[image, a] and visible[image, b]))
            ]  # fmt: skip
            assert found[image].item() == pytest.approx(10 * len(apart) / sum(apart), rel=1e-5)
    noisy = torch.where(seen.unsqueeze(2), x, torch.full_like(x, 50.0))  # what a mask hides decides nothing
    assert torch.equal(relative_temperature(noisy, (8, 8), 10.0, seen), relative_temperature(x, (8, 8), 10.0, seen))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_clusters_follow_the_features_at_every_scale(scale):
    """No centre is a blur of two things, and centres scale with the features."""
    x = areas(scale)
    made = tokenzoo.create_method("cluster", grid=4)
    assert made.temperature is None
    centers = cluster(x, (8, 8), (4, 4), temperature=relative_temperature(x, (8, 8), made.sharpness)).centers
    blurred = cluster(x, (8, 8), (4, 4), iterations=0).centers
    far, pooled = (torch.cdist(x, c).min(2).values.mean() for c in (centers, blurred))
    assert far < 1.1 * pooled  # at 0.02, whatever the scale, 1.8 times as far at the middle one
    plain = areas()
    own = cluster(plain, (8, 8), (4, 4), temperature=relative_temperature(plain, (8, 8), made.sharpness)).centers
    torch.testing.assert_close(centers / scale, own, atol=1e-4, rtol=1e-3)


def test_the_model_under_cluster_does_not_depend_on_the_scale_of_its_stream():
    """A pre-norm model whose residual stream is a hundred times as large gives the same answer, clustered too."""
    models = [build("deit").eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        blocks = models[1].blocks
        for part in (models[1].patch_embed.proj, *(b.attn.proj for b in blocks), *(b.mlp.fc2 for b in blocks)):
            part.weight.mul_(100)
            part.bias.mul_(100)
        for name in ("cls_token", "pos_embed"):
            getattr(models[1], name).mul_(100)
        for block in blocks:  # residual branches read norms, which forget the scale
            for norm in (block.norm1, block.norm2):
                norm.eps = norm.eps * 1e4
        models[1].norm.eps *= 1e4
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        plain = [model(x) for model in models]
        torch.testing.assert_close(*plain, atol=1e-4, rtol=1e-3)
        found = [tokenzoo.patch_model(model, "cluster", layers=0, scale=0.5)(x) for model in models]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_flat_images_and_single_patches_stay_finite():
    flat = torch.full((1, 16, 8), 3.0)
    for size in ((4, 4), (1, 16)):
        found = cluster(flat, size, (1, 4), temperature=relative_temperature(flat, size, 10.0))
        torch.testing.assert_close(found.centers, torch.full((1, 4, 8), 3.0))
    assert relative_temperature(flat[:, :1], (1, 1), 10.0).isfinite().all()


def test_absolute_temperature_stays_an_option():
    made = tokenzoo.create_method("cluster", temperature=0.02)
    assert made.to_dict() == {"method": "cluster", "temperature": 0.02}
    with pytest.raises(ValueError, match="sharpness=0 has to be positive"):
        tokenzoo.create_method("cluster", sharpness=0)


# ---- ats: heights and places are two things


def places(model: torch.nn.Module, x: torch.Tensor) -> list[tuple[int, int]]:
    """Patches that are really there and places, block by block."""
    with torch.no_grad():
        trace = model.forward_tokens(x, trace=True).trace
    return [
        (s.map.n_out * len(x) if s.map.valid is None else int(s.map.valid.sum()), s.map.n_out * len(x)) for s in trace
    ]


@pytest.mark.parametrize("share", [0.85, 0.7])
def test_ats_uses_what_a_budget_pays_for(share):
    model, x = build("deit").eval(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokenzoo.patch_model(model, "ats", flops=share)
    found = places(model, x)
    assert all(real == paid for real, paid in found)
    assert tokenzoo.expected_share(model, x) == pytest.approx(tokenzoo.report(model).ratio)
    left = [model.pos_embed.shape[1], *(paid // len(x) for _, paid in found)]
    gone = [a - b for a, b in zip(left, left[1:])]
    assert max(gone) < 0.7 * sum(gone)  # not everything in its first block


def test_ats_heights_and_places():
    model, x = build("deit").eval(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tokenzoo.patched(model, "ats", layers=(1,), max_tokens=12, heights=3, padded=True):
        ((real, paid),) = places(model, x)
        assert paid == 48 and real <= 4 * (1 + 3)  # as many as there are heights at most
    with tokenzoo.patched(model, "ats", layers=(1,), max_tokens=12, heights=3):
        assert places(model, x) == [(48, 48)]
    with tokenzoo.patched(model, "ats", layers=(1,), heights=3):  # the same picks, without a place too many
        ((real, paid),) = places(model, x)
        assert paid <= 4 * (1 + 3)


def test_ats_fills_with_real_patches_only():
    """An image that has fewer patches than there are places keeps those, and padding stays padding."""
    model, x = build("deit").eval(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = [{"method": "topk", "mass": 0.5, "layers": (0,)}, {"method": "ats", "layers": (2,), "max_tokens": 30}]
    with torch.no_grad(), tokenzoo.patched(model, recipe):
        tokens = model.forward_tokens(x, trace=True)
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)
    counts = [s.map.n_out if s.map.valid is None else s.map.valid.sum(1) for s in tokens.trace]
    first, second = (torch.as_tensor(count).expand(3) for count in counts)
    assert torch.equal(second, first.clamp(max=30))


# ---- soft_transform: keys of trained models are alike


@pytest.mark.parametrize("alike", [0.0, 15.0, 60.0])
def test_anchors_stay_mostly_what_they_were(alike):
    """Whether keys point anywhere, or nearly all the same way, as those of ViT-S/14 do: 0.98 by the cosine."""
    unit = _alike(alike)
    cosines = unit[0] @ unit[0].T
    low, high = {0.0: (-0.1, 0.1), 15.0: (0.7, 0.9), 60.0: (0.97, 0.99)}[alike]
    assert low < cosines.fill_diagonal_(0).sum() / 9900 < high
    tokens = Tokens(unit, Layout(0, False, (10, 10)))
    keep = keep_best(torch.arange(100.0).view(1, -1), tokens, lambda n: 60)
    made = tokenzoo.create_method("soft_transform")
    assert made.temperature is None
    temperature = cosine_temperature(unit, tokens, made.sharpness)
    own = share_out(unit, keep, tokens, temperature, False).matrix()[0].max(1).values
    assert own.mean() > 0.4


def test_reference_distance_is_that_of_all_pairs_that_are_seen():
    unit, seen = _alike(3.0, batch=2), torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) > 0.3
    for visible in (None, seen):
        found = cosine_temperature(unit, Tokens(unit, Layout(0, False, (10, 10)), visible=visible), 20.0)
        for image in range(2):
            own = unit[image] if visible is None else unit[image][visible[image]]
            assert found[image].item() == pytest.approx((1 - own @ own.T).mean().item() / 20, rel=1e-4)
    same = torch.ones_like(unit) / 8
    assert torch.isfinite(cosine_temperature(same, Tokens(same, Layout(0, False, (10, 10))), 20.0)).all()


def _alike(alike: float, batch: int = 1) -> torch.Tensor:
    x = torch.randn(batch, 100, 64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(x + alike * torch.nn.functional.normalize(torch.ones(64), dim=0), dim=-1)
