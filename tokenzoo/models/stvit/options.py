"""Which options of STViT-R there is a model for."""

from __future__ import annotations

from .masks import MASKS

FORMS = ("classification", "dense")
SEMANTIC = 2  # the stage with semantic tokens


def check_options(
    form: str, depths: tuple[int, ...], num_heads: tuple[int, ...], window: int, sample: int, use_global: bool,
    reach: tuple[int, int, int], mask: str | None,
) -> None:  # fmt: skip
    """Refuses options that there is no model for."""
    if form not in FORMS:
        raise ValueError(f"STViTR: form={form!r} is unknown; choose 'classification' or 'dense'")
    if len(depths) <= SEMANTIC or len(num_heads) != len(depths):
        raise ValueError(
            f"STViTR: depths={depths} and num_heads={num_heads} do not name three stages or more; give one of each"
        )
    least = 4 if form == "classification" else 1  # patches of neighbouring windows begin window - 3 tokens apart
    if window < least or not 1 <= sample <= window:
        raise ValueError(
            f"STViTR: window_size={window} with sample_window_size={sample} is no window in form {form!r}; give a "
            f"window of at least {least} and a sample of 1 to the window"
        )
    if mask not in MASKS:
        raise ValueError(f"STViTR: pad_mask={mask!r} is unknown; choose one of {MASKS}")
    if len(reach) != 3 or reach[0] < window or reach[1] < window or reach[2] < sample:
        raise ValueError(
            f"STViTR: reach={reach} is less than a window of {window} image tokens or {sample} semantic ones a side; "
            "give three sides, such as (14, 21, 27)"
        )
    if form == "dense" and use_global:
        raise ValueError("STViTR: use_global=True needs a fixed number of tokens; leave it or form='dense' out")
