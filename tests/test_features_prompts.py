"""`forward_head(forward_features(x))` is `model(x)` with prompts too: every method and head, `protect` of them kept."""

import pytest
import torch
from cases import METHODS, given, images, serves
from test_features import HEADS, RECIPES, agrees, make
from test_sequences import PROMPTS, with_prompts

import tokenzoo
from tokenzoo.models import SViT

SEVERAL = ("tome_by_mass", "cluster_prop", "mctf_topk", "ats_mctf")


def prompted(name):
    model = make(name)
    if isinstance(model, SViT):
        pytest.skip("blocks see windows: there is no place for prompts, protect=n is refused")
    if not hasattr(model, "norm_pre"):
        pytest.skip("nothing stands in front of block 0 that a hook could add prompts to")
    return with_prompts(model)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_head_reads_features_with_prompts(name):
    """Reduced features and those of dense=True; what removes nothing pools as the model with its hook alone."""
    model = prompted(name)
    x = images(model)
    plain = model(x)
    for number, key in enumerate((*METHODS, *SEVERAL)):
        recipe = RECIPES[key]
        parts = recipe if isinstance(recipe, list) else [recipe]
        if not all(serves(part["method"], model) for part in parts):
            continue
        with tokenzoo.patched(model, recipe, protect=PROMPTS):
            features, _ = agrees(model, x, number % 3 == 0)
            assert features.shape[1] > model.num_prefix_tokens + PROMPTS
        if number % 6 == 1:
            with tokenzoo.patched(model, recipe, protect=PROMPTS, dense=True):
                agrees(model, x)
        if key in METHODS and key != "ats" and number % 3 == 2:  # ats has no strength zero
            with tokenzoo.patched(model, given(key, "zero"), protect=PROMPTS):
                agrees(model, x)
                torch.testing.assert_close(model(x), plain, atol=2e-5, rtol=1e-4)
