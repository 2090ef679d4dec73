"""Pictures of token maps: the recorded one, composed maps against the trace, what is painted, and curves."""

import math
import re

import goldens
import numpy as np
import pytest
import torch
from cases import KEEPS_LENGTH, METHODS, build, given, images, serves
from PIL import Image

import tokenzoo
from tokenzoo.core.tokens import trace_assign
from tokenzoo.view.curves import spread
from tokenzoo.view.maps import draw_block, draw_token_maps, group_picture, plot_curves, token_maps
from tokenzoo.view.panels import DROPPED, FUSED, KEPT, MERGED, compose, paint, patch_kinds, pixel_labels, token_colors


def _recorded():
    """(file, number of the picture) of every recorded picture; notes what the test reads."""
    found = []
    for file in goldens.files("tome"):
        names = goldens.case_names(file)
        for name in names:
            match = re.fullmatch(r"image(\d+)", name)
            if match and file.startswith("tome/visualization"):
                number = match.group(1)
                used = ("colormap", f"image{number}", f"source{number}", f"out_image{number}")
                goldens.READ.update((file, key) for key in used)
                found.append(pytest.param(file, number, id=f"{file}/{name}", marks=pytest.mark.golden))
    return found


@pytest.mark.parametrize("file, number", _recorded())
def test_group_picture_equals_the_recorded_one(file, number):
    tensors = goldens.read(file)[0]
    image, source = tensors[f"image{number}"].numpy(), tensors[f"source{number}"]
    patches = source.shape[2] - 1  # behind the class token
    patch = round((image.shape[0] * image.shape[1] / patches) ** 0.5)
    grid = (image.shape[0] // patch, image.shape[1] // patch)
    assert grid[0] * grid[1] == patches
    painted = group_picture(image, source[0].argmax(0)[1:], grid, tensors["colormap"].numpy())
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted, tensors[f"out_image{number}"].numpy())
    # the recorded colours are the seeded ones
    np.testing.assert_array_equal(group_picture(image, source[0].argmax(0)[1:], grid), painted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["non_square", "registers", "gap", "dinov3"])
def test_maps_compose_to_the_trace(method, backbone):
    model = build(backbone)
    if not serves(method, model):
        pytest.skip(f"{method} needs a class token")
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    maps = token_maps(model, x)
    with torch.no_grad():
        tokens = max(reversed(list(model.walk(x, trace=True))), key=lambda t: len(t.trace))
    prefix, (high, wide) = tokens.layout.num_prefix, tokens.layout.grid
    assert maps.grid == (high, wide)
    if method in KEEPS_LENGTH - {"reconstruct"}:  # merged and unmerged inside of the branches: nothing is taken away
        assert not tokens.trace and maps.blocks and all(b.inside for b in maps.blocks)
        for entry, note in zip(maps.blocks, tokens.inside, strict=True):
            assert entry.block == note.block and torch.equal(entry.assign, note.map.assign[:, prefix:])
            assert entry.tokens_in.tolist() == [prefix + high * wide] * 3
            assert entry.tokens_out.tolist() == [note.map.n_out] * 3
        return
    assert [b.block for b in maps.blocks] == sorted({s.block for s in tokens.trace})
    total = trace_assign(tokens.trace, 3, prefix + high * wide, x.device)
    assert torch.equal(maps.blocks[-1].assign, total[:, prefix:])
    count = torch.full((3,), prefix + high * wide)
    for block in maps.blocks:
        assert torch.equal(block.tokens_in, count)
        count = block.tokens_out
        for i in range(3):
            # every remaining token stands for some patch, so counting what patches went into counts tokens (a centre
            # of a soft cluster may be the nearest of no patch)
            members = block.assign[i].unique()
            assert len(members[members >= 0]) + prefix == count[i] or "cluster" in block.method
            if "cluster" in block.method:
                continue
            # a token with an origin holds that patch
            heads = block.origin[i][members[members >= 0]] - prefix
            assert torch.equal(block.assign[i][heads[heads >= 0]], members[members >= 0][heads >= 0])


def test_counts_are_those_of_each_image():
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, "ats", layers=(1, 2))
    together = [b.tokens_out.tolist() for b in token_maps(model, x).blocks]
    alone = [[b.tokens_out.item() for b in token_maps(model, x[i : i + 1]).blocks] for i in range(3)]
    assert together == [list(counts) for counts in zip(*alone)]
    assert len(set(together[-1])) > 1, "the images were meant to keep different counts"


def test_fused_token_has_no_origin():
    model = build("deit")
    tokenzoo.patch_model(model, "evit", tokens=5, layers=(2,))
    (block,) = token_maps(model, images(model)).blocks
    assert block.origin[:, -1].tolist() == [-1] * 3 and (block.origin[:, :-1] >= 0).all()
    for i in range(3):
        kinds = patch_kinds(block.assign[i].numpy(), block.origin[i].numpy())
        assert (kinds == KEPT).sum() == 5 and (kinds == FUSED).sum() == 11


def test_methods_in_one_block_are_one_panel():
    model = build("deit")
    tokenzoo.patch_model(model, [{"method": "pool", "layers": [1]}, {"method": "tome", "r": 1, "layers": [1, 2]}])
    first, second = token_maps(model, images(model)).blocks
    assert (first.method, second.method) == ("pool + tome", "tome")
    assert first.tokens_in.tolist() == [17] * 3 and first.tokens_out.tolist() == [4] * 3 == second.tokens_in.tolist()


def test_unpatched_model_has_no_maps():
    model = build("deit")
    with pytest.raises(ValueError, match="VisionTransformer is not patched.*patch_model"):
        token_maps(model, images(model))


def test_group_picture_of_dropped_patches():
    image = np.zeros((8, 16, 3))
    image[..., 0] = 255.0  # red
    painted = group_picture(image, [0, -1], (1, 2), np.array([[0.0, 0.0, 1.0]]))
    assert painted[1:-1, 1:7].tolist() == [[[255, 0, 0]] * 6] * 6
    assert painted[0, :8].tolist() == [[0, 0, 255]] * 8 and painted[:, 7].tolist() == [[0, 0, 255]] * 8
    dropped = painted[:, 8:]
    assert (dropped == dropped[..., :1]).all(), "dropped patches are grey"
    assert len(np.unique(dropped)) == 2 and dropped.max() < 100, "dark, with a hatch"


def test_group_picture_refuses_what_does_not_fit():
    image = np.zeros((8, 16, 3))
    with pytest.raises(ValueError, match=r"shape \(3,\).*1 x 2 patches"):
        group_picture(image, [0, 1, 2], (1, 2))
    with pytest.raises(ValueError, match="8 x 16 pixels.*3 x 1 patches"):
        group_picture(image, [0, 1, 2], (3, 1))
    with pytest.raises(ValueError, match="2 rows.*token 7"):
        group_picture(image, [0, 7], (1, 2), np.zeros((2, 3)))


def test_kinds_are_told_apart():
    """Kept patches stay, merged ones become their mean, fused and dropped ones lose their colours."""
    rng = np.random.default_rng(0)
    grid, cell = (2, 3), 16
    pixels = rng.random((grid[0] * cell, grid[1] * cell, 3))
    assign, origin = np.array([1, 2, 2, 3, 3, -1]), np.array([0, 1, 2, -1])
    kinds = patch_kinds(assign, origin)
    assert kinds.tolist() == [KEPT, MERGED, MERGED, FUSED, FUSED, DROPPED]
    labels, kind = (pixel_labels(v, grid, pixels.shape[:2]) for v in (assign, kinds))
    colors = token_colors(assign, origin)
    out = paint(pixels, labels, kind, colors, 2)
    np.testing.assert_array_equal(out[kind == KEPT], pixels[kind == KEPT])
    merged = out[:cell, cell:]
    assert (
        (merged[0] == colors[2]).all() and (merged[:, :2] == colors[2]).all() and (merged[5, 15:17] != colors[2]).any()
    )
    assert merged[2:-2, 2:-2].std() < 0.25 * pixels[:cell, cell:].std()
    assert (out[cell, : 2 * cell] == 1).all(), "a fused token is outlined in white"
    dropped = out[kind == DROPPED]
    assert np.ptp(dropped, axis=1).max() < 1e-12 and dropped.max() < 0.6


@pytest.mark.parametrize("backbone, method", [("non_square", "tome"), ("registers", "evit"), ("gap", "topk")])
def test_drawing_has_a_panel_for_each_block(backbone, method):
    model = build(backbone)
    x = images(model)
    tokenzoo.patch_model(model, given(method))
    maps = token_maps(model, x)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    drawn = draw_token_maps(picture, maps, index=1, columns=2, side=64, title="title")
    high, wide = (math.ceil(64 / max(maps.grid)) * n for n in maps.grid)
    rows = -(-(1 + len(maps.blocks)) // 2)
    assert drawn.width > 2 * wide and drawn.height > rows * high
    # the first panel is the picture itself, the second differs from it
    canvas = np.asarray(drawn).astype(int)
    resized = np.asarray(picture.resize((wide, high), Image.Resampling.LANCZOS)).astype(int)
    top = next(y for y in range(drawn.height - high) if (canvas[y : y + high, 12 : 12 + wide] == resized).all())
    starts = [x for x in range(drawn.width - wide) if (canvas[top : top + high, x : x + wide] == resized).all()]
    assert starts == [12], "only the first panel is the bare picture"


def test_long_titles_and_legends_fit():
    panel = Image.new("RGB", (40, 40), "red")
    legend = [(Image.new("RGB", (18, 18)), "a long explanation of a kind of token")] * 4
    narrow = compose([(panel, "block 0", "2 -> 1")], legend, "", None)
    wide = compose([(panel, "block 0", "2 -> 1")] * 4, legend, "a title that is longer than one panel", None)
    assert narrow.height > wide.height - 40 and wide.width >= 4 * 40
    ink = np.asarray(narrow.convert("L"))
    assert (ink[:, -2:] == 255).all(), "nothing runs into the right border"


def _captured(monkeypatch, *args, **kwargs):
    """The axes of a figure that `plot_curves` would have saved."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append((self, path)))
    plot_curves(*args, **kwargs)
    ((figure, _),) = saved
    return figure.axes[0]


ROWS = [
    {"method": "unpatched", "gmacs": 4.6, "top1": 80.0, "top1_se": 0.5},
    {"method": "tome", "gmacs": 3.9, "top1": 79.0, "top1_se": 0.5},
    {"method": "tome", "gmacs": 2.7, "top1": 77.0, "top1_se": None},
    {"method": "evit", "gmacs": 3.0, "top1": 78.0, "top1_se": 0.25},
    {"method": "evit", "gmacs": 2.0, "top1": None, "top1_se": None},
]


def test_curves_show_every_method(monkeypatch):
    axes = _captured(monkeypatch, ROWS, "curve.png", xlabel="GMACs", title="a model")
    curves = {c.get_label(): c for c in axes.containers}
    assert set(curves) == {"tome", "evit", "unpatched"}
    assert curves["tome"].lines[0].get_xydata().tolist() == [[2.7, 77.0], [3.9, 79.0]], "sorted by x"
    assert curves["evit"].lines[0].get_xydata().tolist() == [[3.0, 78.0]], "rows without a value are left out"
    (bar,) = curves["evit"].lines[2][0].get_segments()
    assert bar[:, 1].tolist() == [77.75, 78.25]
    assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {80.0} for line in axes.lines)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("GMACs", "top1", "a model")


def test_curves_are_written(tmp_path):
    plot_curves(ROWS, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("L").getcolors()) > 2
    with pytest.raises(ValueError, match="'infer_samples_per_sec' and 'top1'"):
        plot_curves(ROWS, tmp_path / "none.png", x="infer_samples_per_sec")


def _rows(low: dict[str, float]) -> list[dict]:
    base = {"method": "unpatched", "gmacs": 4.6, "top1": 80.0}
    ends = [(name, *point) for name, end in low.items() for point in ((2.0, end), (4.0, 79.0))]
    return [base, *({"method": name, "gmacs": gmacs, "top1": top} for name, gmacs, top in ends)]


def test_an_outlier_gets_a_panel_of_its_own(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
    plot_curves(_rows({"a": 78.0, "b": 77.0, "c": 76.5, "d": 5.0}), tmp_path / "x.png", title="a model")
    plot_curves(_rows({"a": 78.0, "b": 77.0, "c": 76.5}), tmp_path / "x.png")
    plot_curves(_rows({f"m{i}": 70.0 + i for i in range(30)}), tmp_path / "x.png")
    assert [len(figure.axes) for figure in saved] == [2, 1, 2]
    left, right = saved[0].axes
    assert left.get_ylim()[0] > 70 and right.get_ylim()[0] < 5, "the outlier does not rule the other panel"
    names = [{text.get_text() for text in axes.texts} - {"unpatched"} for axes in saved[0].axes]
    assert names == [{"a", "b"}, {"c", "d"}] and saved[0].get_suptitle() == "a model"
    for axes in saved[2].axes:
        labels = sorted(text.xyann[1] for text in axes.texts if text.get_text() != "unpatched")
        apart = min(b - a for a, b in zip(labels, labels[1:])) * axes.get_window_extent().height / axes.figure.dpi * 72
        assert len(labels) == 15 and apart > 10 and labels[0] > 0 and labels[-1] < 1


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ([0, 5, 10], [0, 5, 10]),
        ([5, 5, 5], [4, 5, 6]),
        ([0, 0, 9], [0, 1, 9]),
        ([10, 10], [9, 10]),
        ([2, 2.5, 3.2], [1.5666667, 2.5666667, 3.5666667]),
        ([], []),
    ],
)
def test_names_are_spread_as_little_as_possible(wanted, expected):
    assert spread(wanted, 1, 0, 10) == pytest.approx(expected)


def test_chosen_blocks_are_drawn():
    model = build("deit")
    tokenzoo.patch_model(model, "tome", r=2)
    maps = token_maps(model, images(model))
    picture = Image.new("RGB", (32, 32), "red")
    whole, some = draw_token_maps(picture, maps), draw_token_maps(picture, maps, shown=[0, -1])
    assert some.width < whole.width and some.height == whole.height
    one = np.asarray(draw_block(picture, maps, 0, side=64))
    assert one.shape == (64, 64, 3)
    inside = np.asarray(draw_token_maps(picture, maps, side=64))
    places = [(y, x) for y in range(inside.shape[0] - 63) for x in range(inside.shape[1] - 63)]
    assert any((inside[y : y + 64, x : x + 64] == one).all() for y, x in places), "no panel is the block's image"


def test_names_stand_where_the_strong_runs_are(monkeypatch):
    slow = _captured(monkeypatch, _rows({"a": 78.0, "b": 77.0}), "x.png")
    fast = [{**row, "gmacs": 10 - row["gmacs"]} for row in _rows({"a": 78.0, "b": 77.0})]
    quick = _captured(monkeypatch, fast, "x.png")
    for axes, at, end in ((slow, 0.015, 2.0), (quick, 0.985, 8.0)):
        found = [text for text in axes.texts if text.get_text() != "unpatched"]
        assert [(text.xyann[0], text.xy[0]) for text in found] == [(at, end)] * 2
