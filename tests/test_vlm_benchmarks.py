"""The scripts of benchmarks/vlm in small."""

import csv
import importlib
import json
from pathlib import Path

import pytest
from PIL import Image
from test_vlm_commands import released  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "vlm"))
    return importlib.import_module


@pytest.fixture
def data(tmp_path):
    """Files as their authors write them."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "COCO_1.jpg")
    for kind in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": i, "image": "COCO_1.jpg", "text": "the", "label": a} for i, a in ((1, "yes"), (2, "no"))
        ]
        (tmp_path / f"coco_pope_{kind}.json").write_text("\n".join(map(json.dumps, lines)))
    asked = {"data": [{"question_id": 7, "image_id": "COCO_1", "question": "the", "answers": ["red"] * 10}]}
    (tmp_path / "val.json").write_text(json.dumps(asked))
    (tmp_path / "ocr.jsonl").write_text(json.dumps({"question_id": "COCO_1", "image": "COCO_1.jpg", "text": "the"}))
    return tmp_path


def test_a_dry_run_of_published_rows(script, released, data, capsys):  # noqa: F811
    module = script("published_row")
    common = ["--model", str(released), "--images", str(data / "images"), "--rows", "4"]
    rest = ["--rest", "--device", "cpu", "--max-new-tokens", "2"]
    out = ["--results-file", str(data / "r.json")]
    module.ROWS, module.LAYERS = 16, 16
    try:
        words = ["--questions", str(data), *common, "--published", "unpatched=85.9"]
        assert module.main(["pope", *words, *out, *rest]) == 0
        said = capsys.readouterr().out
        assert "published 85.9" in said and "visionzip 4" in said
        rows = json.loads((data / "r.json").read_text())["results"]
        assert len(rows) == 3 and rows[0]["n_questions"] == 6 and rows[0]["f1"] is not None
        words = ["--questions", str(data / "val.json"), "--prompts", str(data / "ocr.jsonl")]
        assert module.main(["textvqa", *words, *common, *out, *rest]) == 0
        assert "published -" in capsys.readouterr().out
    finally:
        module.ROWS, module.LAYERS = 576, 32
    assert abs(module.removed(192) - 0.7111) < 1e-3


@pytest.mark.parametrize(("words", "message"), [
    ("pope --model {0}/none --questions {0} --images {0}/images", "holds no weights"),
    ("pope --model {1} --questions {0}/images --images {0}/images", "coco_pope_random.json does not exist"),
    ("textvqa --model {1} --questions {0}/val.json --images {0}/images", "needs --prompts"),
    ("pope --model {1} --questions {0} --images {0}/images --published unpatched", "is not NAME=FIGURE"),
])  # fmt: skip
def test_what_is_missing_is_named(script, released, data, words, message, capsys):  # noqa: F811
    argv = [*words.format(data, released).split(), "--results-file", str(data / "r.json")]
    assert script("published_row").main(argv) == 2
    assert message in capsys.readouterr().err


def test_goals_in_small(script, tmp_path):
    path = tmp_path / "g.csv"
    words = ["--size", "tiny", "--rounds", "2", "--steps", "2", "--selectors", "uniform", "--results-file", str(path)]
    script("goals").main(words)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["goal"] for row in rows] == [
        "prefill", "cache", "prefill", "prefill", "cache", *["decode"] * 3, "selector",
    ]  # fmt: skip
    assert all(row["met"] == "True" and float(row["value"]) == 1 for row in rows if row["goal"] == "cache")
    assert all(float(row["value"]) > 0 and row["torch"] for row in rows)
