"""Videos beside images: what selectors are asked, which rows are left, and prompts of a batch as each alone."""

from __future__ import annotations

import pytest
import torch
import vlm_reference as reference
from figures import difference
from vlm_cases import END, IMAGE, RECIPES, START, VIDEO, Loudest, build, counted, inner_of, lm_of

import tokenzoo
from tokenzoo.vlm.cache import CACHE

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


# frames of the video of each prompt, and whether an image stands in front of it
MIXED = ((4, True), (2, False), (0, True), (0, False))


def mixed(name, model, which=MIXED, side="left", seed=3):
    """A batch of prompts with images, videos, both and neither, padded; and each prompt alone."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    lines, images, videos, alone = [], [], [], []
    for number, (frames, image) in enumerate(which):
        ids, own = torch.randint(10, 240, (3 + number,), generator=g).tolist(), {}
        if image and name == "llava_onevision":
            images.append((torch.randn(1, 3, 3, 32, 32, generator=g).to(dtype), torch.tensor([[30, 62]])))
            own |= {"pixel_values": images[-1][0], "image_sizes": images[-1][1]}
            with torch.no_grad():
                rows = len(inner_of(model).get_image_features(**own).pooler_output[0])
            ids += [START, *[IMAGE] * rows, END]
        elif image:
            images.append((torch.randn(64, 3 * 2 * 4 * 4, generator=g).to(dtype), torch.tensor([[1, 8, 8]])))
            own |= {"pixel_values": images[-1][0], "image_grid_thw": images[-1][1]}
            ids += [START, *[IMAGE] * 16, END]
        if frames:
            one = clip(name, model, frames, seed=seed + number)
            own |= {key: value for key, value in one.items() if "video" in key}
            videos.append(own)
            ids += one["input_ids"][0, 3:-3].tolist()
        ids += torch.randint(10, 240, (4,), generator=g).tolist()
        lines.append(ids)
        alone.append(worded(name, [ids], side) | own)
    batch = worded(name, lines, side)
    grid = "image_sizes" if name == "llava_onevision" else "image_grid_thw"
    if images:
        batch |= {"pixel_values": torch.cat([p for p, _ in images]), grid: torch.cat([s for _, s in images])}
    if videos:
        names = [key for key in videos[0] if "video" in key]
        if name == "llava_onevision":  # its videos of a batch have as many frames
            assert len({each[names[0]].shape for each in videos}) == 1
        batch |= {key: torch.cat([each[key] for each in videos]) for key in names}
    return batch, alone


def worded(name, lines, side):
    """Ids, masks and, in Qwen-VL, kinds of tokens of some prompts."""
    longest = max(map(len, lines))
    pads = [[0] * (longest - len(line)) for line in lines]
    ids = torch.tensor([pad + line if side == "left" else line + pad for pad, line in zip(pads, lines)])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name in QWEN:
        batch["mm_token_type_ids"] = (ids == IMAGE).long() + (ids == VIDEO).long() * 2
    return counted(name, batch)


def frames_of(name):
    return ((2, True), (2, False), (0, True), (0, False)) if name == "llava_onevision" else MIXED


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipe", ["selector", "dropper", "both"])
def test_prompts_with_images_and_videos_are_each_alone(name, side, recipe, figure):
    model = build(name, double=True)
    batch, alone = mixed(name, model, frames_of(name), side)
    tokenzoo.patch_model(model, RECIPES[recipe]())
    with torch.no_grad():
        found = model(**batch).logits
        for row, one in zip(found, alone):
            want = model(**one).logits[0]
            n = len(want)
            got = row[-n:] if side == "left" else row[:n]
            figure("batch = each alone, videos, float64", name, recipe, difference(got, want))
            assert (n < one["input_ids"].shape[1]) == any("pixel" in key for key in one)


@families
def test_visual_rows_of_images_and_videos(name):
    """Images in front of videos, each with its own budget, as each prompt tells alone."""
    model = build(name)
    batch, alone = mixed(name, model, frames_of(name))
    tokenzoo.patch_model(model, Loudest(keep=6))
    told = tokenzoo.visual_rows(model, **batch)
    apart = [each for one in alone if any("pixel" in key for key in one) for each in tokenzoo.visual_rows(model, **one)]
    apart.sort(key=lambda each: each.modality)
    assert [each.modality for each in told] == ["image", "image", "video", "video"]
    for a, b in zip(told, apart):
        free = torch.isfinite(a.place[:, 0])
        assert torch.equal(a.keep, b.keep) and int(a.keep[free].sum()) == 6 and bool(a.keep[~free].all())
    with torch.no_grad():
        out = model(**batch, use_cache=True)
    left = batch["attention_mask"].sum(1) - torch.stack([
        torch.stack([(~each.keep).sum() for each in own]).sum() if own else torch.tensor(0)
        for own in ([told[0], told[2]], [told[3]], [told[1]], [])
    ])  # fmt: skip
    index, valid = out[CACHE].rows()
    real = batch["attention_mask"].bool().gather(1, index)
    assert torch.equal((real if valid is None else real & valid).sum(1), left)


@pytest.mark.parametrize("name", QWEN)
def test_the_report_counts_what_a_prompt_with_an_image_and_a_video_holds(name):
    model = build(name)
    batch, _ = mixed(name, model, ((4, True),))
    words = int((batch["input_ids"] < IMAGE).sum())
    tokenzoo.patch_model(model, RECIPES["both"]())
    told = tokenzoo.report(model, text=words, images=[16, 64])
    with torch.no_grad():
        held = [layer.keys.shape[2] for layer in model(**batch, use_cache=True)[CACHE].layers]
    assert held == [row.rows_out for row in told.layers] and held[0] == words + 18 > held[-1]
