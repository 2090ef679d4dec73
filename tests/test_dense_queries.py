"""EoMT under reduction on both sides of its queries, and DToP's early exits."""

import pytest
import timm
import torch
from dense_models import TINY, dtop, shaken, traced
from torch import nn

import tokenzoo
from tokenzoo.dense import DToP, DToPHead, EoMT
from tokenzoo.dense.eomt import _with_queries


class Predict(nn.Module):
    """EoMT without its last product, which costs leave out."""

    def __init__(self, model: EoMT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.predict(images)


@pytest.mark.parametrize("recipe", [None, tokenzoo.ToMe(r=2), tokenzoo.EViT(keep_rate=0.6)])
def test_eomt_macs(recipe):
    """Encoder by the report, everything else by the model, against a trace of all but the last product."""
    model = EoMT(TINY(depth=4, reg_tokens=2), 7, num_q=5, num_blocks=2).eval()
    if recipe is not None:
        tokenzoo.patch_model(model, recipe)
    report, predict = tokenzoo.report(model, (32, 48)), Predict(model)
    counted = report.total - report.rows[-1].macs + model.head_macs(24, (4, 6))
    # fvcore's share of the reduction sees the queries, which the report does not know of
    assert counted == pytest.approx(sum(traced(predict, torch.randn(1, 3, 32, 48)).values()), rel=2e-3)


def test_eomt_refusals():
    with pytest.raises(ValueError, match="Eva is not a timm VisionTransformer"):
        EoMT(timm.create_model("eva02_tiny_patch14_224", num_classes=0), 5)
    with pytest.raises(ValueError, match="num_blocks=4, but the backbone has 3 blocks"):
        EoMT(TINY(), 5)
    model = EoMT(TINY(), 5, 4, 2).eval()
    with pytest.raises(ValueError, match="needs the patch grid"):
        model.head_macs(16)
    spans = [{"method": "cluster", "layers": 0, "scale": 0.5}, {"method": "reconstruct", "layers": 2}]
    with tokenzoo.patched(model, spans), pytest.raises(ValueError, match="reconstruct .*after the queries"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "recipe",
    [
        [{"method": "cluster", "layers": 0, "scale": 0.5}, {"method": "reconstruct", "layers": 0}],
        {"method": "algm", "layers": (0, 2)},
        {"method": "pool", "stride": 2, "layers": (1,)},
        [{"method": "tome", "r": 2, "layers": (0,)}, {"method": "pool", "stride": 2, "layers": (2,)}],
        {"method": "ats", "layers": (0, 2)},
    ],
    ids=["span", "algm", "pool", "tome_pool", "ats"],
)
@torch.no_grad()
def test_eomt_with_reduction_on_both_sides(recipe):
    model = shaken(EoMT(TINY(), 5, 4, 2))
    images = torch.randn(2, 3, 32, 48)
    plain = model(images)
    tokenzoo.patch_model(model, recipe)
    out = model(images)
    assert out.shape == plain.shape and not torch.allclose(out, plain, atol=1e-4)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), out, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_queries_are_further_prefix_tokens():
    backbone = tokenzoo.patch_model(TINY(), [tokenzoo.ToMe(r=3), tokenzoo.methods.pool.Pool(stride=1, layers=(2,))])
    *_, tokens = backbone.walk(torch.randn(2, 3, 32, 48), last=1, dense=True)
    queries = torch.randn(2, 4, 32)
    joined = _with_queries(tokens, queries)
    old, new = tokens.layout.num_prefix, joined.layout.num_prefix
    assert new == old + 4 and joined.num_patches == tokens.num_patches < 24 and joined.trace == ()
    assert torch.equal(joined.x[:, old:new], queries) and torch.equal(joined.x[:, new:], tokens.x[:, old:])
    assert torch.equal(joined.sizes()[:, new:], tokens.sizes()[:, old:]) and (joined.sizes()[:, :new] == 1).all()
    # patches are numbered from the end of the prefix, wherever that is
    places = tokens.positions[:, old:] - old
    assert torch.equal(joined.positions[:, new:] - new, places) and 0 <= places.min() and places.max() < 24


@torch.no_grad()
def test_dtop_finishes_what_is_sure():
    model, images = dtop(), torch.randn(3, 3, 32, 48)
    images[1] *= 5
    threshold = model.predict(images).stages[0].max(1).values.median().item()
    model.thresholds = [threshold]
    out = model.predict(images)
    done, (best, label) = out.done[0], out.stages[0].max(1)
    assert done.any() and not done.all() and len(set(done.sum(1).tolist())) > 1
    for image in range(3):
        for k in range(4):
            sure = ((best[image] > threshold) & (label[image] == k)).nonzero().flatten()
            stays = sure[best[image][sure].argsort(descending=True)[:2]]
            assert not done[image][stays].any() and done[image][sure].sum() == len(sure) - len(stays)
        assert not done[image][best[image] <= threshold].any()
    model.thresholds = [1.0]
    plain = model.predict(images)
    assert not plain.done[0].any()
    assert model(torch.randn(2, 3, 30, 45)).shape == (2, 4, 30, 45)
    x = model.backbone._pos_embed(model.backbone.patch_embed(images))[:, 1:]
    presence, masks = model.decode_head(model.backbone.blocks(x))
    torch.testing.assert_close(plain.masks, masks)
    torch.testing.assert_close(plain.scores, presence.unsqueeze(-1) * masks.sigmoid())


def test_dtop_refusals():
    heads = [DToPHead(32, 4, 16), DToPHead(32, 4, 16)]
    for taps in [(0, 1), (2, 0), (2,), (2, 2)]:
        with pytest.raises(ValueError, match="ascending up to 2"):
            DToP(TINY(), heads, taps)
    with pytest.raises(ValueError, match="2 thresholds for 1 auxiliary"):
        DToP(TINY(), heads, (0, 2), (0.5, 0.5))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        DToPHead(32, 4, 16, 3)
    with pytest.raises(ValueError, match="not an unpatched timm VisionTransformer"):
        DToP(tokenzoo.patch_model(TINY(), "tome", r=1), heads, (0, 2))
    model = DToP(TINY(), heads, (0, 2)).eval()
    tokenzoo.patch_model(model.backbone, "tome", r=1)
    with pytest.raises(ValueError, match="DToP reduces by itself"):
        model(torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_dtop_images_do_not_meet():
    torch.manual_seed(3)
    model = shaken(DToP(TINY(), [DToPHead(32, 4, 16, 2, depth=1) for _ in range(3)], (0, 1, 2), 0.3, 3), 4)
    images = torch.randn(4, 3, 32, 48) * torch.tensor([0.1, 1.0, 2.0, 4.0]).reshape(4, 1, 1, 1)
    first = model.predict(images).stages[0].max(1).values.median().item()
    model.thresholds = [first, 0.05]  # what had left early would be among the surest at the second head
    out = model.predict(images)
    assert len(set(out.done[0].sum(1).tolist())) > 1 and (out.done[1] & ~out.done[0]).any()
    for i in range(4):
        alone = model.predict(images[i : i + 1])
        torch.testing.assert_close(alone.scores[0], out.scores[i], atol=1e-5, rtol=1e-4)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone.done, out.done))
