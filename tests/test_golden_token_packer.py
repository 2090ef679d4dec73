"""TokenPacker against the authors' module with its weights."""

from __future__ import annotations

import pytest
import torch
from goldens import Case, cases, check_settings, close

from tokenzoo.vlm.learned import TokenPacker


@cases("vlm", lambda c: c.has("in/features_multi") and c.has("out/tokens"))
def test_tokens(case: Case):
    s = case.settings
    check_settings(s, "B", "grid", "scale_factor", "heads", "embed_dim", "llm_dim")
    module = TokenPacker(s["embed_dim"], s["llm_dim"], scale=s["scale_factor"], heads=s["heads"])
    module.load_state_dict(case.part("weights"))
    with torch.no_grad():
        close(module(case["in/features"], case["in/features_multi"]), case["out/tokens"], 1e-4)


def test_rows_see_their_window_alone():
    """Keys and values of a patch reach one row; so does its query, as s = 2 resizes without bilinear neighbours."""
    torch.manual_seed(0)
    module = TokenPacker(8, 12, layers=2, scale=2, heads=2)
    x, layers = torch.randn(2, 24, 8), torch.randn(2, 24, 16)
    with torch.no_grad():
        plain = module(x, layers, grid=(4, 6))
        assert plain.shape == (2, 6, 12)
        x[0, 8] += 1.0  # row 1, column 2: the second window
        layers[0, 8] += 1.0
        changed = (module(x, layers, grid=(4, 6)) - plain).abs().amax(-1) > 0
    assert changed.tolist() == [[False, True, False, False, False, False], [False] * 6]


def test_refusals():
    with pytest.raises(ValueError, match="heads that divide dim"):
        TokenPacker(10, 12, heads=4)
    module = TokenPacker(8, 12, layers=1, scale=2, heads=2)
    with pytest.raises(ValueError, match="are no grid of"):
        module(torch.randn(1, 12, 8), torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match="no whole windows"):
        module(torch.randn(1, 9, 8), torch.randn(1, 9, 8))
