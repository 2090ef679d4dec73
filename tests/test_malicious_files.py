"""Files made to do harm: none runs code, grows without bound or leaves its folder, and each is refused by name."""

import json
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.core.safe_files import parse_json, parse_yaml, read_torch
from tokenzoo.dense import load_segmenter
from tokenzoo.dense.checkpoints import read_checkpoint
from tokenzoo.evaluation.segmentation.classes import read_classes
from tokenzoo.evaluation.segmentation.data import BrokenSample, open_dataset
from tokenzoo.training.checkpoints import Checkpoints


class Harm:
    """Unpickles by making a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return (Path.touch, (self.made,))


def bomb(levels: int = 12) -> str:
    """YAML of a few lines that stands for 9 ** levels values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def png_of(path: Path, side: int) -> None:
    """A PNG of some bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


YAML = {
    "runs code": lambda made: f"method: !!python/object/apply:os.mkdir ['{made}']",
    "billions of values": lambda made: bomb() + "\nmethod: tome",
    "deep": lambda made: "method: " + "[" * 2_000,
    "holds itself": lambda made: "method: &m [*m]",
    "long": lambda made: "method: tome\n# " + "x" * (1 << 21),
    "keys without a hash": lambda made: "? [1, 2]\n: 3",
    "bytes that are no text": lambda made: "method: \x00\x01",
}


@pytest.mark.parametrize("kind", YAML)
def test_recipes_and_configurations(kind, tmp_path, capsys):
    """As a recipe file, as the configuration of a training, and beside an official checkpoint."""
    made = tmp_path / "made"
    path = tmp_path / "harm.yaml"
    path.write_text(YAML[kind](made))
    began = time.process_time()
    with pytest.raises(ValueError, match="harm.yaml"):
        tokenzoo.patch_model(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), str(path))
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "harm.yaml" in capsys.readouterr().err
    (tmp_path / "variant.yml").write_text(YAML[kind](made))
    with pytest.raises(ValueError, match="variant.yml"):
        tokenzoo.dense.load_official_segmenter(tmp_path / "checkpoint.pth")
    assert not made.exists() and time.process_time() - began < 20


def test_values_of_the_command_line(capsys):
    words = ["eval", "--model", "vit_tiny_patch16_224", "--data-dir", "nowhere"]
    assert main([*words, "--method-kwargs", "r=!!python/name:os.system"]) == 2
    error = capsys.readouterr().err
    assert "--method-kwargs" in error and "os.system" in error


def test_aliases_are_fine_where_they_stand_for_little():
    assert parse_yaml("a: &a [1, 2]\nb: *a", "text") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\x00", ""])
def test_json(text, tmp_path):
    with pytest.raises(ValueError, match="^classes .*(valid JSON|nested too deeply)"):
        parse_json(text, "classes")
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match="classes.json"):
        read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize("kind", ["pickle", "torch", "noise", "empty"])
def test_weights(kind, tmp_path, capsys):
    made, path = tmp_path / "made", tmp_path / "harm.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"weight": Harm(made)}))
    elif kind == "torch":
        torch.save({"model": {"weight": Harm(made)}}, path)
    else:
        path.write_bytes(b"\x80\x05 no pickle" if kind == "noise" else b"")
    for read in (read_checkpoint, read_torch):
        with pytest.raises(ValueError, match="harm.pth"):
            read(path)
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=1", "--num-classes", "2"]
    assert main(["bench", *model, "--checkpoint", str(path)]) == 2
    assert "harm.pth" in capsys.readouterr().err
    training = ["train", *model, "--initial-checkpoint", str(path), "--data-dir", str(tmp_path)]
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / label / "a.png")
    assert main([*training, "--output", str(tmp_path / "out"), "--batch-size", "1", "--workers", "0"]) == 2
    assert "harm.pth" in capsys.readouterr().err
    save = tmp_path / "run"
    save.mkdir()
    (save / "checkpoint-00001-0000000.pt").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="checkpoint-00001|torn"):
        Checkpoints(save).load()
    assert not made.exists()


ABOUT = ["", "[]", '{"encoder": 3}', "[" * 100_000, '{"encoder": {"name": "os", "kwargs": {}}}']


@pytest.mark.parametrize("about", ABOUT, ids=range(len(ABOUT)))
def test_segmenters(about, tmp_path):
    """Safetensors cannot hold code; what they say of the model is checked before it is built."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1)}, path, {"format": "tokenzoo.segmenter.1", "model": about})
    with pytest.raises(ValueError):
        load_segmenter(path)


@pytest.mark.parametrize("command", ["show", "eval", "tune"])
def test_images_of_billions_of_pixels(command, tmp_path, capsys):
    png_of(tmp_path / "images" / "a" / "bomb.png", 60_000)
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=1"]
    if command == "show":
        words = ["show", "--images", str(tmp_path / "images" / "a"), "--output", str(tmp_path / "out")]
        words += ["--method", "tome", "r=1"]
    elif command == "eval":
        words = ["eval", "--data-dir", str(tmp_path / "images"), "--batch-size", "1", "--workers", "0"]
    else:
        words = ["tune", "--data-dir", str(tmp_path / "images"), "--flops", "0.6", "--workers", "0"]
        words += ["--output", str(tmp_path / "out")]
    began = time.process_time()
    assert main([*words, *model]) == 2
    assert "bomb.png" in capsys.readouterr().err and time.process_time() - began < 20


def archive(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "images/../../evil.png"])
def test_members_that_leave_their_archive(name, tmp_path):
    path = archive(tmp_path / "ADEChallengeData2016.zip", {name: b"", "images/validation/a.jpg": b""})
    with pytest.raises(ValueError, match="leaves its own folder"):
        open_dataset(path, "ade20k", "val")


def test_members_that_claim_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenzoo.evaluation.segmentation.files.LARGEST", 1 << 20)
    base = "ADEChallengeData2016"
    image, mask = tmp_path / "a.jpg", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    Image.new("L", (8, 8)).save(mask)
    data = {f"{base}/images/validation/a.jpg": bytes(2 << 20)}
    data[f"{base}/annotations/validation/a.png"] = mask.read_bytes()
    path = archive(tmp_path / f"{base}.zip", data)
    with pytest.raises(BrokenSample, match="a.jpg cannot be read .*bytes unpacked"):
        open_dataset(path, "ade20k", "val")[0]


def test_importing_stays_small():
    """No code for evaluation, plots or other libraries' models before it is asked for; `tune` is."""
    code = (
        "import sys, json, tokenzoo; before = sorted(sys.modules); assert 'tune' in dir(tokenzoo); tokenzoo.tune; "
        "print(json.dumps([before, 'tokenzoo.tuning.advise' in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, tuned = json.loads(out.stdout.splitlines()[-1])
    unwanted = ("tokenzoo.evaluation", "tokenzoo.tuning", "transformers", "open_clip", "matplotlib")
    assert not [name for name in before if name.startswith(unwanted)] and tuned
