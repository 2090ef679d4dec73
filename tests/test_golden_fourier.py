"""Fourier-VLM's transform against the published implementation."""

import math

import pytest
import torch
from goldens import Case, cases, check_settings, close

from tokenzoo.core.filtering import filtered
from tokenzoo.core.tokens import Layout, Tokens


@cases("vlm", lambda c: c.has("out/tokens_fp32") and c.has("in/features"))
def test_transform(case: Case):
    s, x = case.settings, case["in/features"]
    check_settings(s, "B", "H", "W", "C", "h", "w", "norm")
    if s["norm"] not in ("ortho", None):
        pytest.fail(f"norm={s['norm']!r} is no transform that is known here")
    grid, cells = (s["H"], s["W"]), (s["h"], s["w"])
    token_map = filtered(Tokens(x, Layout(0, False, grid)), cells, lambda n: math.prod(cells), rescale=False)
    # without a norm, the two transforms differ by the ratio of their lengths
    gain = 1.0 if s["norm"] else math.sqrt(math.prod(grid) / math.prod(cells))
    close(token_map.apply(x) * gain, case["out/tokens_fp32"])
    half = token_map.apply(x.half()).float() * gain  # the published code rounds its input and output to half precision
    torch.testing.assert_close(half, case["out/tokens_half"], atol=2e-2, rtol=2e-2)
