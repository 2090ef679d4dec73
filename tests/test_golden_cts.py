"""CTS against the published implementation; its policy network was replaced by recorded logits there and here."""

from functools import partial

import torch
import torch.nn.functional as F
from goldens import Case, cases, check_settings, close, decode_reduced, micro_decoder

import tokenzoo
from tokenzoo.core.sharing import share_groups
from tokenzoo.core.tokens import Layout, Tokens


class Recorded(torch.nn.Module):
    """A policy network that always answers the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images, groups):
        assert self.logits.shape[-2:] == groups
        return self.logits


def code(token_map, prefix, wide, groups):
    """(scale, row, column) of every token after the prefix."""
    place = token_map.heads[:, prefix:] - prefix
    scale = torch.ones_like(place)
    scale[:, place.shape[1] - groups :] = 2
    return torch.stack([scale, place // wide, place % wide], dim=2)


def strip(patches, size):
    """Flat patches [B, N, C * P * P] side by side [B, C, P, N * P]."""
    batch, count, _ = patches.shape
    return patches.view(batch, count, -1, size, size).permute(0, 2, 3, 1, 4).flatten(3)


@cases("cts", lambda c: c.has("image"))
def test_geometry(case: Case):
    s = case.settings
    check_settings(s, "patch", "num_shared")
    image, size = case["image"], s["patch"]
    grid = (image.shape[2] // size, image.shape[3] // size)
    cut = lambda x: F.unfold(x, size, stride=size).transpose(1, 2)  # noqa: E731
    tokens = Tokens(cut(image), Layout(0, False, grid))
    score = case["policy_logits"].softmax(1)[:, 1].flatten(1)
    token_map = share_groups(tokens, score, s["num_shared"], cut(F.avg_pool2d(image, 2)))
    close(strip(token_map.apply(tokens.x), size), case["patches"], 1e-5)
    assert torch.equal(code(token_map, 0, grid[1], s["num_shared"]), case["code"].long())
    back = token_map.lift(case["tokens"].flatten(2).transpose(1, 2))
    close(back.transpose(1, 2).unflatten(2, grid), case["map"], 1e-6)


def micro(case: Case):
    s = case.settings
    check_settings(s, "num_shared", "num_not_shared", "decoder")
    model = case.model(norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    tokenzoo.patch_model(model, "cts", shared=s["num_shared"], score="policy")
    key = model.blocks[0].tokenzoo.steps[0].key
    setattr(model.blocks[0], key, Recorded(case["policy_logits"]))
    assert model.patch_embed.num_patches - 4 * s["num_shared"] == s["num_not_shared"]
    return model, s


@cases("cts", lambda c: c.has("features"))
def test_encoder(case: Case):
    model, s = micro(case)
    x = case.input(case["features"].shape[0])
    with torch.no_grad():
        tokens = model.forward_tokens(x, trace=True)
    close(tokens.x, case["features"])
    (step,) = tokens.trace
    wide, prefix = tokens.layout.grid[1], model.num_prefix_tokens
    assert torch.equal(code(step.map, prefix, wide, s["num_shared"]), case["code"].long())
    shared = step.map.assign[:, prefix:] >= prefix + s["num_not_shared"]
    shared = shared.view(-1, *tokens.layout.grid)[:, ::2, ::2]
    assert torch.equal(shared.long(), case["shared_mask"])


@cases("cts", lambda c: c.has("labels"))
def test_segmenter(case: Case):
    model, s = micro(case)
    maps, labels = decode_reduced(model, micro_decoder(s["decoder"]), case.input(case["labels"].shape[0]))
    close(maps, case["logits_lowres"])
    assert torch.equal(labels, case["labels"].long())
