"""Semantic tokens (STViT-R) against the published implementation: blocks, both forms of a unit, the stage."""

from functools import partial

import torch
from goldens import Case, cases, check_settings, close
from torch import nn

from tokenzoo.layers import SemanticBlock
from tokenzoo.models.stvit.forms import Whole, Windowed
from tokenzoo.models.stvit.stage import SemanticStage, semantic_blocks
from tokenzoo.models.stvit.swin import PatchMerging
from tokenzoo.ops.cells.neighbourhoods import from_windows

NORM = partial(nn.LayerNorm, eps=1e-6)


def block_of(weights: dict[str, torch.Tensor], heads: int, shortcut: bool = True) -> SemanticBlock:
    """A block in the size of its weights."""
    dim, hidden = weights["norm1.weight"].shape[0], weights["mlp.fc1.weight"].shape[0]
    block = SemanticBlock(dim, heads, hidden / dim, shortcut=shortcut, norm_layer=NORM)
    block.load_state_dict(weights)
    return block.eval()


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in weights.items() if key.startswith(prefix + ".")}


def raster(s: torch.Tensor, grid: tuple[int, int], sample: int) -> torch.Tensor:
    """Semantic tokens in the order of windows as rows of the grid that they form."""
    return from_windows(s.unflatten(1, (-1, sample**2)), grid, sample).flatten(1, 2)


@torch.no_grad()
@cases("stvit_semantic", lambda c: c.has("out/s_from_concat"))
def test_block(case: Case):
    check_settings(case.settings, "heads")
    block = block_of(case.part("in/weights"), case.settings["heads"])
    s, x = case["in/s"], case["in/x"]
    close(block(s, torch.cat([s, x], 1)), case["out/s_from_concat"], 1e-5)
    close(block(x, s), case["out/x_recovered"], 1e-5)
    close(block(s, s), case["out/s_self"], 1e-5)


@torch.no_grad()
@cases("stvit_semantic", lambda c: "grid" in c.asks)
def test_generate(case: Case):
    s = case.settings
    check_settings(s, "heads", "sample_window_size", "window_size", "shortcut", "grid")
    grid = tuple(int(side) for side in s["grid"].split("x"))
    form = Whole(s["window_size"], s["sample_window_size"])
    block = block_of(case.part("in/weights"), s["heads"], s["shortcut"])
    x = case["in/x"].unflatten(1, grid)
    out = form.generate(block, x, form.places(grid, x))
    close(raster(out, (2 * form.sample,) * 2, form.sample), case["out/x"], 1e-5)


@torch.no_grad()
@cases("stvit_semantic", lambda c: c.has("out/before_downsample"))
def test_stage(case: Case):
    s = case.settings
    check_settings(s, "dim", "heads", "use_global", "depth", "window_size", "sample_window_size")
    form, dim = Whole(s["window_size"], s["sample_window_size"]), s["dim"]
    blocks = semantic_blocks(dim, [0.0] * s["depth"], form.window, False, num_heads=s["heads"], norm_layer=NORM)
    stage = SemanticStage(blocks, PatchMerging(dim, NORM), form, dim if s["use_global"] else 0).eval()
    stage.load_state_dict(case.part("in/weights"))
    counts = []
    for block in stage.blocks:
        block.register_forward_hook(lambda module, args, out: counts.append(out[0].numel() // dim))
    x = case["in/x"].unflatten(1, (2 * form.window,) * 2)
    found = stage.run_blocks(x)
    assert counts == case["out/token_counts"].tolist()
    close(found.flatten(1, 2), case["out/before_downsample"], 1e-5)
    close(stage(x).flatten(1, 2), case["out/x"], 1e-5)


@torch.no_grad()
@cases("stvit_semantic", lambda c: c.has("out/x_restore"))
def test_dense(case: Case):
    s = case.settings
    known = ("H", "W", "heads", "window_size", "window_sample_size", "k_window_size_1", "k_window_size_2")
    check_settings(s, *known, "restore_k_window_size", "pad_mask", "semantic_grid")
    reach = s["k_window_size_1"], s["k_window_size_2"], s["restore_k_window_size"]
    form = Windowed(s["window_size"], s["window_sample_size"], reach, "released" if s["pad_mask"] else None)
    x = case["in/x"].unflatten(1, (s["H"], s["W"]))
    places = form.places((s["H"], s["W"]), x)
    generate, refine, restore = (
        block_of(below(case.part("in/weights"), name), s["heads"]) for name in ("gen", "refine", "restore")
    )
    grid = tuple(s["semantic_grid"])
    first = form.generate(generate, x, places)
    close(raster(first, grid, form.sample), case["out/s_gen"], 2e-4)
    second = form.refine(refine, first, x, places, None)
    close(raster(second, grid, form.sample), case["out/s_refine"], 2e-4)
    close(form.restore(restore, x, second, places).flatten(1, 2), case["out/x_restore"], 2e-4)
