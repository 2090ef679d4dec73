"""The commands on models that scan: they draw, measure, evaluate, export and segment as on any other model."""

import csv
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from scan_cases import SCAN_METHODS, given

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.cli.segment_predict import _clusters
from tokenzoo.core.lift import lift
from tokenzoo.dense import create_segmenter, load_segmenter, save_segmenter
from tokenzoo.dense.features import encode
from tokenzoo.evaluation.segmentation.costs import dense_macs
from tokenzoo.evaluation.segmentation.inference import Inference, Predictor
from tokenzoo.ops.scan_order import from_scan
from tokenzoo.view.maps import draw_token_maps, token_maps

SMALL = "img_size=32 patch_size=8 depth=3 embed_dim=24 d_state=4"
MODELS = {
    "vim_tiny": f"--model vim_tiny --num-classes 4 --device cpu --model-kwargs {SMALL}",
    "vim_tiny_patch16_stride8_224": f"--model vim_tiny_patch16_stride8_224 --num-classes 4 --device cpu --model-kwargs "
    f"{SMALL} stride=4",
    "plain_mamba_l1": f"--model plain_mamba_l1 --num-classes 4 --device cpu --model-kwargs {SMALL}",
}
models = pytest.mark.parametrize("name", MODELS)
families = pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1"])
ENCODER = {"patch_size": 8, "depth": 3, "embed_dim": 24, "d_state": 4}
# encoder -> options on top; everything that differs on the way to a token head
ENCODERS = {
    "vim_tiny": {},
    "vim_tiny first": {"cls_position": "first"},
    "vim_tiny both": {"cls_position": "both"},
    "vim_tiny none": {"cls_position": "none"},
    "vim_tiny stride": {"stride": 4},
    "plain_mamba_l1": {},
    "plain_mamba_l2": {},
}


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def words(name, *more):
    return [*shlex.split(MODELS[name]), *more]


def method_words(method):
    """--method of a row of the table."""
    recipe = given(method, "static")
    assert isinstance(recipe, dict), "a row with a companion needs a recipe file"
    options = [f"{key}={json.dumps(value)}" for key, value in recipe.items() if key != "method"]
    return ["--method", method, *options]


@pytest.fixture
def pictures(tmp_path):
    """Two folders of three pictures."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / label / f"{number}.png")
    return tmp_path / "in"


# ---- show


@models
@pytest.mark.parametrize("method", SCAN_METHODS)
def test_show(pictures, tmp_path, name, method):
    out = tmp_path / "map.png"
    more = [*method_words(method), "--images", str(pictures / "a" / "0.png"), "--output", str(out)]
    assert main(["show", *words(name, *more)]) == 0
    with Image.open(out) as drawn:
        assert np.asarray(drawn.convert("L")).std() > 5


@families
@pytest.mark.parametrize("method", SCAN_METHODS)
@torch.no_grad()
def test_pictures_show_where_every_patch_went(name, method):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(32, 48), **ENCODER).eval()
    tokenzoo.patch_model(model, given(method))
    x = torch.randn(2, 3, 32, 48)
    maps = token_maps(model, x)
    assert (
        maps.grid == (4, 6) and maps.blocks and maps.blocks[0].tokens_in.tolist() == [model.num_prefix_tokens + 24] * 2
    )
    tokens = model.forward_tokens(x)
    last = maps.blocks[-1]
    assert torch.equal(last.origin, tokens.positions) and last.assign.shape == (2, 24)
    assert last.tokens_out.tolist() == [tokens.length] * 2
    # a patch that heads a token stands for itself, and nothing goes into the class token
    prefix = model.num_prefix_tokens
    for image in range(2):
        heads = last.origin[image, prefix:] - prefix
        assert torch.equal(last.assign[image, heads], torch.arange(prefix, tokens.length))
        kept = last.assign[image] >= 0
        assert (last.assign[image, kept] >= prefix).all()
    assert draw_token_maps(Image.new("RGB", (48, 32)), maps).width > 100


def test_show_grey_pictures(pictures, tmp_path):
    more = [
        "in_chans=1",
        "--method",
        "uniform",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--images",
        str(pictures / "a" / "0.png"),
    ]
    for name in ("vim_tiny", "plain_mamba_l1"):
        assert main(["show", *words(name, *more), "--output", str(tmp_path / f"{name}.png")]) == 0
        assert (tmp_path / f"{name}.png").is_file()


# ---- bench, eval, export


@models
def test_bench(name, tmp_path, capsys):
    methods = [word for method in SCAN_METHODS for word in method_words(method)]
    file = tmp_path / "speed.csv"
    more = ["--batch-size", "2", "--num-bench-iter", "2", "--num-warm-iter", "1", "--threads", "1", *methods]
    assert main(["bench", *words(name, *more), "--results-file", str(file), "--plot", str(tmp_path / "speed.png")]) == 0
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == ["unpatched", *SCAN_METHODS]
    full, *reduced = rows
    for row in reduced:
        assert float(row["infer_gmacs"]) <= float(full["infer_gmacs"])  # four digits of little
        assert float(row["tokens_out"]) < float(full["tokens_out"]) and row["attn_impl"] == "none"
    out = capsys.readouterr().out
    assert "speed-up" in out and "GMACs count all directions of the scan; with one" in out
    assert (tmp_path / "speed.png").is_file()


@families
def test_bench_compiled_and_in_bfloat16(name, tmp_path, capsys):
    torch._dynamo.reset()
    more = ["depth=1", "--batch-size", "2", "--num-bench-iter", "1", "--num-warm-iter", "1", "--method", "tome", "r=2"]
    assert main(["bench", *words(name, *more), "--torchcompile", "eager", "--no-latency", "--threads", "1"]) == 0
    assert "torch.compile eager" in capsys.readouterr().out
    assert main(["bench", *words(name, *more), "--dtype", "bfloat16", "--threads", "1"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    torch._dynamo.reset()


@families
def test_bench_solves_a_budget(name, tmp_path):
    file = tmp_path / "speed.json"
    # PlainMamba's stem, which no method touches, is most of so small a model
    share, width = (0.7, "embed_dim=192") if name == "vim_tiny" else (0.9, "embed_dim=192")
    more = [width, "--method", "uniform", f"flops={share}", "layers=[0]", "--batch-size", "2", "--num-bench-iter", "1"]
    assert main(["bench", *words(name, *more), "--no-latency", "--results-file", str(file)]) == 0
    full, reduced = json.loads(file.read_text())["results"]
    assert reduced["infer_gmacs"] / full["infer_gmacs"] == pytest.approx(share, abs=0.04)


@families
def test_eval(pictures, tmp_path, capsys, name):
    methods = [word for method in SCAN_METHODS for word in method_words(method)]
    file = tmp_path / "accuracy.csv"
    more = ["--data-dir", str(pictures), "--workers", "0", "--batch-size", "3", *methods, "--method", "tome", "r=0"]
    assert main(["eval", *words(name, *more), "--results-file", str(file)]) == 0
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == ["unpatched", *SCAN_METHODS, "tome"]
    full, *reduced, zero = rows
    assert (zero["top1"], zero["gmacs"], zero["tokens_out"]) == (full["top1"], full["gmacs"], full["tokens_out"])
    assert all(float(row["tokens_out"]) < float(full["tokens_out"]) for row in reduced)
    out = capsys.readouterr().out
    assert "top-1" in out and "GMACs count all directions of the scan; with one" in out


@families
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_export(tmp_path, capsys, name, method):
    path = tmp_path / "model.pt2"
    more = [
        "depth=1",
        "img_size=16",
        "--method",
        method,
        "layers=[0]",
        *(["r=2"] if method == "tome" else []),
        "--output",
        str(path),
    ]
    status = main(["export", *words(name, *more)])
    if method == "evit":
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1 and not path.exists()
        assert "tokenzoo export: evit looks at attention or changes it" in error and "use one of" in error
        return
    assert status == 0 and "any batch size" in capsys.readouterr().out
    assert torch.export.load(path).module()(torch.zeros(3, 3, 16, 16)).shape == (3, 4)


# ---- dense models


def segmenter(name, head="linear", **more):
    torch.manual_seed(0)
    options = {**ENCODER, **ENCODERS[name]}
    model = create_segmenter(name.split()[0], 4, head, options, img_size=(24, 32), classes=list("abcd"), **more)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for parameter in model.decoder.parameters():
            parameter.mul_(20 if parameter.dim() == 2 else 1)
    return model.eval()


encoders = pytest.mark.parametrize("name", ENCODERS)


@encoders
@torch.no_grad()
def test_patch_features_are_those_of_the_model(name):
    """Without the class tokens, wherever these are, in raster order; patched and unpatched."""
    model = segmenter(name).encoder
    x = torch.randn(2, 3, 32, 40)
    maps = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
    expected = maps.flatten(2).transpose(1, 2)
    encoded = encode(model, x)
    torch.testing.assert_close(encoded.features(), expected, atol=1e-5, rtol=1e-5)
    assert encoded.num_prefix == model.num_prefix_tokens and encoded.grid == maps.shape[-2:]
    with tokenzoo.patched(model, "tome", r=0):
        torch.testing.assert_close(encode(model, x).features(), expected, atol=1e-5, rtol=1e-5)


@encoders
@pytest.mark.parametrize("method", SCAN_METHODS)
@torch.no_grad()
def test_segmentation_models(name, method):
    """Any image size; zero reduction changes nothing; class maps of a linear head are those of the lifted features."""
    model = segmenter(name)
    x = torch.randn(2, 3, 27, 45)
    plain = model(x)
    assert plain.shape == (2, 4, 27, 45)
    with tokenzoo.patched(model, given(method, "zero")):
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    with tokenzoo.patched(model, given(method)):
        reduced = model(x)
        assert reduced.shape == plain.shape and not torch.allclose(reduced, plain, atol=1e-4)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), reduced, atol=1e-4, rtol=1e-4)
        padded = torch.nn.functional.pad(x, (0, 3, 0, 5))
        tokens = model.encoder.forward_tokens(padded, dense=True)
        features = lift(tokens.x, tokens.trace, "stash", model.encoder.norm)[:, model.encoder.num_prefix_tokens :]
        maps = model.decoder(features).transpose(1, 2).unflatten(2, tokens.layout.grid)
        torch.testing.assert_close(model.class_maps(padded), maps, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), plain)


@families
@torch.no_grad()
def test_the_mask_transformer_follows_a_scan_too(name):
    model = segmenter(name, "mask", head_kwargs={"num_heads": 2, "depth": 1})
    x = torch.randn(1, 3, 24, 32)
    plain = model(x)
    with tokenzoo.patched(model, "tome", r=2):
        assert model(x).shape == plain.shape == (1, 4, 24, 32)


@encoders
@torch.no_grad()
def test_stored_models_are_built_again(name, tmp_path):
    model = segmenter(name)
    tokenzoo.patch_model(model, "uniform", keep_rate=0.5)
    save_segmenter(model, tmp_path / "model.safetensors", half=False)
    tokenzoo.unpatch_model(model)
    x = torch.randn(1, 3, 40, 32)
    assert torch.equal(load_segmenter(tmp_path / "model.safetensors")(x), model(x))


def test_models_of_one_size_are_refused_still():
    with pytest.raises(ValueError, match="'resnet18' takes images of one size only"):
        create_segmenter("resnet18", 4)
    with pytest.raises(ValueError, match="it is not a plain ViT that a token head can follow"):
        create_segmenter("swin_tiny_patch4_window7_224", 4)


@encoders
@torch.no_grad()
def test_costs_of_a_crop(name):
    model = segmenter(name)
    crops = torch.randn(1, 3, 27, 45)
    plain = dense_macs(model, crops)
    grid = model.encoder.patch_embed.dynamic_feat_size((32, 48))
    count = grid[0] * grid[1]
    assert plain.encoder == tokenzoo.report(model.encoder, (32, 48)).total and plain.attn_impl == "none"
    assert plain.tokens_out == count + model.encoder.num_prefix_tokens and plain.decoder == count * 24 * 4
    tokenzoo.patch_model(model, "uniform", keep_rate=0.5, layers=(0,))
    reduced = dense_macs(model, crops)
    assert (
        reduced.encoder < plain.encoder and reduced.decoder == plain.decoder and reduced.tokens_out < plain.tokens_out
    )


# ---- segment


@pytest.fixture
def masked(tmp_path):
    """Pictures with masks."""
    rng = np.random.default_rng(1)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(4):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{number}.png")
        values = rng.integers(0, 4, (30, 40), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "data" / "masks" / f"{number}.png")
    return tmp_path / "data"


@families
def test_segment_train_eval_predict(masked, tmp_path, capsys, name):
    """One after the other on the same files, patched and unpatched."""
    run = tmp_path / "run"
    train = ["--data", str(masked), "--num-classes", "4", "--encoder", name, "--output", str(run), "--crop", "24", "32"]
    train += ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "2", "--device", "cpu", "--encoder-kwargs"]
    train += ["img_size=[24,32]", *(f"{key}={value}" for key, value in ENCODER.items()), "--method", "tome", "r=1"]
    assert main(["segment", "train", *train]) == 0
    checkpoint = ["--checkpoint", str(run / "model.safetensors"), "--device", "cpu"]
    assert main(["segment", "train", *train, "--resume"]) == 0  # there is nothing left to do
    file = tmp_path / "scores.csv"
    methods = [word for method in SCAN_METHODS for word in method_words(method)]
    more = ["--data-dir", str(masked), *methods, "--num-bench-iter", "1", "--resamples", "10", "--resize", "0"]
    assert main(["segment", "eval", *checkpoint, *more, "--results-file", str(file)]) == 0
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == ["unpatched", *SCAN_METHODS]
    assert all(float(row["tokens_out"]) < float(rows[0]["tokens_out"]) for row in rows[1:])
    assert "GMACs count all directions of the scan; with one" in capsys.readouterr().out
    out = tmp_path / "out"
    more = ["--input", str(masked / "images"), "--output", str(out), "--method", "tome", "r=2", "--compare"]
    assert main(["segment", "predict", *checkpoint, *more]) == 0
    assert "wrote 4 class maps" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir())[:3] == ["0.compare.png", "0.index.png", "0.overlay.png"]
    index = np.asarray(Image.open(out / "0.index.png"))
    model = tokenzoo.patch_model(load_segmenter(run / "model.safetensors"), "tome", r=2)
    picture = np.array(Image.open(masked / "images" / "0.png"))
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        expected = model((torch.from_numpy(picture).permute(2, 0, 1)[None] - mean) / std).argmax(1)[0].numpy()
    assert (index == expected).mean() > 0.99


@encoders
def test_clusters_are_drawn_over_the_whole_picture(name):
    """Where patches overlap, the picture is not a whole number of tokens."""
    model = segmenter(name)
    tokenzoo.patch_model(model, "tome", r=3)
    predict = Predictor(model, model.mean, model.std, Inference(), "cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8))
    drawn = _clusters(predict, picture)
    assert drawn.size == picture.size and np.asarray(drawn).std() > 5


@encoders
@torch.no_grad()
def test_features_keep_their_places(name):
    """A patch of its own kind is found at its place, whatever was removed elsewhere."""
    model = segmenter(name).encoder
    x = torch.randn(1, 3, 32, 40)
    plain = encode(model, x)
    high, wide = plain.grid
    rows = tokenzoo.apply.patch.describe(model, plain.grid).layout.scan_rows
    sequence = model.forward_features(x)
    assert torch.equal(from_scan(sequence, rows)[:, len(rows) :], plain.features())
    assert plain.features().shape[1] == high * wide == sequence.shape[1] - len(rows)
