"""`tokenzoo vlm` and what `tokenzoo list` says of vision-language models."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from vlm_cases import IMAGE, build, prompts

import tokenzoo
from tokenzoo.cli import build_parser, main
from tokenzoo.cli.vlm_command import ACTIONS
from tokenzoo.cli.vlm_common import recipes_of
from tokenzoo.view.rows import draw_rows, parts_of
from tokenzoo.vlm.cache import CACHE
from tokenzoo.vlm.telling import dropped_rows

TEMPLATE = "{% for m in messages %}{% for c in m['content'] %}{{ ' <image> ' if c['type'] == 'image' else c['text'] }}"
TEMPLATE += "{% endfor %}{% endfor %}"


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def released(tmp_path):
    """A folder as `from_pretrained` reads it: weights, tokenizer, processor."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "Describe": 4, "the": 5, "image.": 6, "<image>": 250}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 32, "width": 32}
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor = transformers.LlavaProcessor(
        pixels, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    build("llava").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("action", ACTIONS)
def test_help_has_an_example_that_parses(action, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["vlm", action, "--help"])
    assert stop.value.code == 0 and "example:" in capsys.readouterr().out
    module = __import__(f"tokenzoo.cli.vlm_{action}", fromlist=["EXAMPLE"])
    args = build_parser().parse_args(shlex.split(module.EXAMPLE)[1:])
    assert args.action == action and recipes_of(args)


def test_bench_measures_what_it_says(tmp_path, capsys):
    flags = "--device cpu --threads 1 --rounds 2 --steps 2 --prompt 'a b c'"
    methods = "--method uniform keep=16 --method fastv layers=2 --method uniform prefill=0.5 text=4"
    out = tmp_path / "speed.json"
    assert main(shlex.split(f"vlm bench --random tiny {flags} {methods} --results-file {out}")) == 0
    said = capsys.readouterr().out
    rows = json.loads(said.split("--result\n")[1])
    labels = ["unpatched", "uniform keep=16", "fastv layers=2", "uniform prefill=0.5 text=4"]
    assert [row["method"] for row in rows] == labels
    assert [(row["rows_in"], row["rows_out"]) for row in rows[:3]] == [(68, 68), (20, 20), (68, 36)]
    # keys and values of four layers, 64 channels, four bytes
    assert [row["cache_bytes"] for row in rows[:2]] == [2 * 4 * 64 * 4 * n for n in (68, 20)]
    assert rows[0]["gmac_ratio"] == 1 and 0.4 < rows[3]["gmac_ratio"] <= 0.5
    # never less than the hidden rows of one MLP of the tower, nor more for fewer rows
    peaks = [row["prefill_peak_bytes"] for row in rows]
    assert peaks[1] <= peaks[0] and min(peaks) > 65 * 128 * 4
    assert all(0 < row["lm_ms"] < row["prefill_ms"] and row["decode_ms"] > 0 for row in rows)
    assert "cpu time" in said and len(json.loads(out.read_text())["results"]) == 4


def test_released_models_are_benched_and_shown(released, image, tmp_path, capsys):
    model = f"--model {released} --device cpu --method fastervlm keep=4"
    assert main(shlex.split(f"vlm bench {model} --rounds 1 --steps 1 --image {image}")) == 0
    rows = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert [row["rows_in"] for row in rows] == [19, 7]
    assert main(shlex.split(f"vlm show {model} --images {image} --output {tmp_path / 'seen.png'}")) == 0
    assert "random" not in capsys.readouterr().out and Image.open(tmp_path / "seen.png").width > 600


def test_show_draws_every_image(image, tmp_path, capsys):
    assert main(shlex.split(f"vlm show --random tiny --device cpu --method pool keep=16 --images {image.parent} "
                            f"--output {tmp_path / 'out'}")) == 0  # fmt: skip
    assert "weights are random" in capsys.readouterr().out and (tmp_path / "out" / "a.png").is_file()


def test_cuts_between_layers_are_told_and_drawn(image, tmp_path):
    """Rows left behind each cut are those whose cache entries layers hold; a panel each."""
    model = build("llava")
    recipe = [tokenzoo.UniformRows(keep=12), tokenzoo.PyramidDrop(layers=(1, 3), shares=(0.5, 0.25))]
    tokenzoo.patch_model(model, recipe)
    inputs = prompts("llava", model, counts=(2,))
    cuts = dropped_rows(model, **inputs)
    seen = torch.stack([told.keep for told in tokenzoo.visual_rows(model, **inputs)])
    assert [layer for layer, _ in cuts] == [1, 3]
    first, second = (torch.stack(left) for _, left in cuts)
    assert [int(t.sum()) for t in (seen, first, second)] == [24, 12, 6]
    assert not bool((first & ~seen).any() or (second & ~first).any())
    # with the dropped rows taken away by hand, the order of what entered gives the rows of the last layer's cache
    kept = model(**inputs, use_cache=True)[CACHE].kept
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    entered = kept.index[0]
    for layer, left in cuts:
        held = entered[kept.layers[layer].cols[0]]
        assert torch.equal(held[torch.isin(held, visual)], visual[torch.cat(left)])
    out = tmp_path / "cuts.png"
    assert main(shlex.split(f"vlm show --random tiny --device cpu --method pyramiddrop --images {image} -o {out}")) == 0
    one = tmp_path / "one.png"
    assert main(shlex.split(f"vlm show --random tiny --device cpu --method pool keep=9 --images {image} -o {one}")) == 0
    assert Image.open(out).width > 2 * Image.open(one).width  # the image, seen, and three cuts


@pytest.mark.parametrize(("words", "message"), [
    ("bench --random tiny --method nothing", "is unknown"),
    ("bench --random tiny --method uniform kep=4", "did you mean 'keep'"),
    ("bench --random tiny --rounds 0", "positive"),
    ("show --random tiny --images {0} --output o.png", "draws one recipe"),
    ("show --random tiny --images {0} --output o.png --method tower:tome r=2", "selector first"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(words, message, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("vlm " + words.format(image))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_patches_that_go_are_dark_and_others_stay():
    model = build("llava")
    tokenzoo.patch_model(model, "uniform", keep=8)
    told = tokenzoo.visual_rows(model, **prompts("llava", model, counts=(1,)))[0]
    (part,) = parts_of(told.place)
    assert part.grid == (4, 4) and part.rows.tolist() == list(range(16))
    white = Image.new("RGB", (32, 32), "white")
    light = [
        int((np.asarray(draw_rows([white], [part], assign, side=320)).min(-1) > 250).sum())
        for assign in (torch.arange(16), told.assign)
    ]
    assert 8 * 70 * 70 <= light[0] - light[1] <= 8 * 82 * 82 + 4000  # half of the patches, and a line of the legend


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "smolvlm", "gemma3"])
def test_rows_of_crops_and_packed_images_have_cells(name):
    """Every row that stands somewhere has one cell of its own, crop by crop."""
    model = build(name)
    tokenzoo.patch_model(model, "uniform", keep=6)
    for told in tokenzoo.visual_rows(model, **prompts(name, model, counts=(2,))):
        parts = parts_of(told.place)
        rows = np.concatenate([part.rows[part.rows >= 0] for part in parts])
        there = torch.isfinite(told.place).all(1).nonzero().flatten()
        assert sorted(rows.tolist()) == there.tolist()


def test_rows_between_patches_are_refused():
    place = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 2.4], [0.0, 0.0, 2.2], [0.0, 1.0, 0.0]])
    place[3, 2] = 2.4
    with pytest.raises(ValueError, match="between the patches"):
        parts_of(place)


def test_list_names_selectors_and_droppers(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    for kind, known in (("selectors", tokenzoo.vlm.list_selectors()), ("droppers", tokenzoo.vlm.list_droppers())):
        assert [each["name"] for each in listed[kind]] == known and f"{kind} of vision-language models" in said
    assert main(["list", "fastv"]) == 0 and "removed = 0.5" in capsys.readouterr().out
    assert main(["list", "random"]) == 0
    both = capsys.readouterr().out
    assert "of the same name" in both and "keep_total" in both


def test_commands_import_no_transformers():
    code = "import sys; from tokenzoo.cli import build_parser; build_parser(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
