"""Methods that read counts on the host: no padding mask where all images keep equal numbers."""

import pytest
import torch
from cases import build, images

import tokenzoo
from tokenzoo.core.selection import settled_rows
from tokenzoo.core.tokens import Layout, Tokens


@pytest.mark.parametrize(
    ("counts", "valid", "expected"),
    [((2, 2), None, None), ((1, 2), None, [2, 3]), ((2, 2), (4, 5), [3, 3])],
)
def test_settled_rows(counts, valid, expected):
    """One prefix token in front; where there was padding, the mask stays."""
    valid = None if valid is None else torch.arange(5) < torch.tensor(valid)[:, None]
    tokens = Tokens(torch.zeros(2, 5, 3), Layout(1, True, (2, 2)), valid=valid)
    length, rows = settled_rows(torch.tensor(counts)[:, None], tokens)
    assert length == max(counts)
    assert rows is None if expected is None else rows.sum(1).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("method", ["ats", "flowcut"])
def test_one_image_has_no_padding(method):
    """And its answer is what it is in a batch."""
    model = build("deit").eval()
    x = images(model)
    tokenzoo.patch_model(model, method)
    alone = model.forward_tokens(x[:1])
    assert alone.valid is None
    torch.testing.assert_close(model(x[:1]), model(x)[:1], atol=1e-5, rtol=1e-4)
