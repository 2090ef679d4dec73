"""`tokenzoo vlm eval`: questions, metrics, paired differences, and what is refused."""

import csv
import json
import math
import shlex

import numpy as np
import pytest
from PIL import Image
from test_vlm_commands import released  # noqa: F401

from tokenzoo.cli import main
from tokenzoo.evaluation.vqa_data import open_images, read_questions
from tokenzoo.evaluation.vqa_metrics import exact, jackknife, mean, says_yes, vqa, yes_no, yesno


@pytest.fixture
def questions(tmp_path):
    """Four questions on three images, one of them about two."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    lines = [
        {"id": "a", "image": "0.png", "question": "Describe the image.", "answer": "yes", "category": "x"},
        {"image": "1.png", "question": "the image.", "answer": ["no"], "category": "x"},
        {"image": ["0.png", "2.png"], "question": "Describe", "answer": "no", "category": "y"},
        {"images": ["2.png"], "question": "the", "answers": ["yes"], "category": "y"},
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def test_questions_are_asked_of_every_run(questions, released, tmp_path, capsys):  # noqa: F811
    files = f"--results-file {tmp_path / 'r.csv'} --answers-file {tmp_path / 'a.jsonl'}"
    methods = "--method uniform keep=16 --method fastervlm keep=2 --method fastv removed=0.9 layers=1"
    words = (
        f"vlm eval --model {released} --device cpu --data {questions} --metric yesno -b 3 --max-new-tokens 3 {files}"
    )
    assert main(shlex.split(f"{words} {methods}")) == 0
    rows = json.loads(capsys.readouterr().out.split("--result\n")[1])
    assert [row["method"] for row in rows][:2] == ["unpatched", "uniform keep=16"]
    plain, same, few, dropped = rows
    # keeps all 16 rows of every image: the very same answers
    assert same["diff"] == 0 and same["diff_se"] == 0 and same["agreement"] == 100 and same["gmac_ratio"] == 1
    assert plain["diff"] is None and plain["rows_in"] == plain["rows_out"]
    assert plain["rows_in"] - few["rows_in"] == 14 * 5 / 4  # five images in four prompts
    assert dropped["rows_out"] < dropped["rows_in"] == plain["rows_in"] and few["gmac_ratio"] < 0.5
    with (tmp_path / "r.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and json.loads(table[2]["recipe"])["method"] == "fastervlm" and table[0]["torch"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and lines[0]["id"] == "a" and lines[1]["id"] == "2"
    for row in rows:
        own = [line["score"] for line in lines if line["method"] == row["method"]]
        assert row["score"] == pytest.approx(100 * np.mean(own))
    # a batch is each prompt alone
    assert main(shlex.split(f"{words.replace('-b 3', '-b 1').replace('a.jsonl', 'b.jsonl')} {methods}")) == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


LINE = '{"image": "0.png", "question": "q", "answer": "a"}'


@pytest.mark.parametrize(("text", "message"), [
    (f"{LINE}\n{{oops\n", "line 2 is not valid JSON"),
    (f"{LINE}\n[1]\n", "line 2 is no JSON object"),
    (LINE.replace("0.png", "9.png"), "line 1: image '9.png' does not exist"),
    (f"\n{LINE.replace('0.png', '../secret.png')}", "line 2: image '../secret.png' lies outside"),
    (LINE.replace("0.png", "/etc/hostname"), "lies outside"),
    (LINE.replace("0.png", "link.png"), "'link.png' lies outside"),
    (LINE.replace("0.png", "a\\u0000b"), "is no path"),
    (LINE.replace("0.png", "a" * 5000), "is no path"),
    (LINE.replace('"a"}', "3}"), '"answer" is 3'),
    (LINE.replace('"q"', "7"), "have to be text"),
    (LINE.replace('"image"', '"picture"'), '"image" is None'),
    ("[" * 100_000, "line 1 is n"),
    ("\n", "holds no questions"),
])  # fmt: skip
def test_bad_lines_are_named(questions, tmp_path, text, message):
    (tmp_path / "secret.png").write_bytes((questions / "0.png").read_bytes())
    (questions / "link.png").symlink_to(tmp_path / "secret.png")
    (questions / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_questions(questions)


def test_bytes_that_are_no_text_and_files_that_are_no_image(questions):
    (questions / "q.jsonl").write_bytes(LINE.encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        read_questions(questions)
    (questions / "q.jsonl").write_text(LINE)
    (questions / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 0.png of question 1 cannot be read \(not an image"):
        open_images(read_questions(questions)[0])
    (questions / "r.jsonl").write_text(LINE)
    with pytest.raises(ValueError, match="holds 2 files"):
        read_questions(questions)


@pytest.mark.parametrize(("flags", "message"), [
    ("--metric vqa", "question a: metric vqa compares with what ten people said"),
    ("--template hello", "has no {question}"),
    ("--batch-size 0", "give positive numbers"),
    ("--limit 0", "--limit 0 is not positive"),
    ("--method fastv kep=1", "kep"),
    ("--results-file r.txt", "does not end in"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(questions, released, flags, message, capsys):  # noqa: F811
    assert main(shlex.split(f"vlm eval --model {released} --device cpu --data {questions} {flags}")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tokenzoo vlm:") and message in said


def test_answers_are_compared_as_the_metrics_say():
    assert exact(" Red  Car. ", ["blue", "red car"]) == 1 and exact("red", ["red car"]) == 0
    assert vqa("two dogs!", ["2 dogs"] * 10) == 1 and vqa("The dog", ["dog"] * 10) == 1
    # three of ten: each of them leaves two others (2/3), each of the seven leaves three (1)
    assert vqa("dont", ["don't"] * 3 + ["do"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa("x", ["x"] + ["y"] * 9) == pytest.approx(9 / 30) and vqa("1,000", ["1000"] * 4) == 1
    assert says_yes("Yes, there is. No doubt") and not says_yes("There is not, really") and not says_yes("No.")
    assert says_yes("nothing of it")  # as its authors count: words, not parts of them
    assert yesno("no", ["No"]) == 1
    with pytest.raises(ValueError, match='"yes" or "no"'):
        yesno("yes", ["maybe"])


def test_figures_of_yes_and_no_and_their_errors():
    """Against counting by hand, category by category, and leaving every question out in turn."""
    rng = np.random.default_rng(0)
    said, right = rng.random(60) < 0.5, rng.random(60) < 0.5
    group = rng.integers(0, 3, 60)

    def slow(chosen):
        f1 = []
        for g in range(3):
            mine = [i for i in chosen if group[i] == g]
            true = sum(bool(said[i] and right[i]) for i in mine)
            p, r = true / sum(bool(said[i]) for i in mine), true / sum(bool(right[i]) for i in mine)
            f1.append(2 * p * r / (p + r))
        return 100 * sum(f1) / 3

    found = yes_no(said, right, [str(g) for g in group])
    assert found.f1 == pytest.approx(slow(range(60)))
    without = [slow([i for i in range(60) if i != left]) for left in range(60)]
    np.testing.assert_allclose(found.without, without)
    centre = sum(without) / 60
    assert jackknife(found.without) == pytest.approx(math.sqrt(59 / 60 * sum((w - centre) ** 2 for w in without)))
    values = np.array([0.0, 1.0, 1.0, -1.0])
    assert mean(values).se == pytest.approx(100 * values.std(ddof=1) / 2) and mean(values[:1]).se is None
    assert yes_no(np.zeros(3, bool), np.ones(3, bool), [""] * 3).f1 == 0
