"""Videos beside images: what selectors are asked, which rows are left, and prompts of a batch as each alone."""

from __future__ import annotations

import pytest
import torch
import vlm_reference as reference
from vlm_cases import VIDEO, Loudest, build, inner_of, lm_of

import tokenzoo

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
families = pytest.mark.parametrize("name", [*QWEN, "llava_onevision"])


def clip(name, model, frames=4, seed=3):
    """One prompt with a video of so many frames of 16 rows (4 in LLaVA-OneVision, and one new line behind all)."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if name == "llava_onevision":
        given = {"pixel_values_videos": torch.randn(1, frames, 3, 32, 32, generator=g).to(dtype)}
        parts = [frames * 4 + 1]
    else:
        pixels = torch.randn(frames * 8 * 8, 3 * 2 * 4 * 4, generator=g).to(dtype)
        given = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, 8, 8]])}
        parts = [16] * frames if name == "qwen3_vl" else [16 * frames]  # words stand between frames there
    ids = [10, 11, 12]
    for n in parts:
        ids += [248, *[VIDEO] * n, 249]
    ids = torch.tensor([[*ids, 13, 14, 15]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
    if name in QWEN:
        batch["mm_token_type_ids"] = (ids == VIDEO).long() * 2
    return batch


def video_rows(model, batch):
    names = ("pixel_values_videos", "video_grid_thw")
    with torch.no_grad():
        out = inner_of(model).get_video_features(**{k: v for k, v in batch.items() if k in names})
    return list(out.pooler_output)


@families
def test_a_selection_is_the_language_model_on_fewer_rows(name):
    model = build(name, double=True)
    batch = clip(name, model)
    (rows,) = video_rows(model, batch)
    free = torch.ones(len(rows), dtype=torch.bool)
    if name == "llava_onevision":
        free[-1] = False  # the new line behind a video always stays
    kept = ~free
    index = free.nonzero().flatten()
    kept[index[rows[index].norm(dim=-1).topk(7).indices]] = True
    gone = torch.full((batch["input_ids"].shape[1],), len(lm_of(model).layers))
    gone[(batch["input_ids"][0] == VIDEO).nonzero().flatten()[~kept]] = 0
    want = reference.logits(model, batch, gone)
    tokenzoo.patch_model(model, Loudest(keep=7))
    with torch.no_grad():
        found = model(**batch).logits[0]
    assert found.shape == want.shape and (found - want).abs().max() <= 1e-6
    (told,) = tokenzoo.visual_rows(model, **batch)
    assert told.modality == "video" and torch.equal(told.keep, kept)


@families
def test_frames_share_the_budget_of_their_video(name):
    """A selector that looks at crops is asked for every frame."""
    model = build(name)
    batch = clip(name, model)
    tokenzoo.patch_model(model, "uniform", keep=8)
    (told,) = tokenzoo.visual_rows(model, **batch)
    frame = told.place[:, 0]
    assert [int(told.keep[frame == f].sum()) for f in range(4)] == [2, 2, 2, 2]


@families
@pytest.mark.parametrize("method", ["selector", "both"])
def test_steps_are_those_without_a_cache(name, method):
    model = build(name, double=True)
    batch = clip(name, model)
    dropper = [tokenzoo.FastV(layers=3)] if method == "both" else []
    tokenzoo.patch_model(model, [Loudest(keep=12), *dropper])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(**batch, **options)
        if not dropper:
            assert torch.equal(model.generate(**batch, **options, use_cache=False), cached)
            assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), cached)
        assert cached.shape[1] == batch["input_ids"].shape[1] + 4
