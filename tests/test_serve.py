"""The page's server: what it answers, what it refuses with a sentence, and that it stays up."""

import concurrent.futures
import io
import re
import socket
import struct
import tempfile
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
import timm
import torch
import uvicorn
import yaml
from fastapi.testclient import TestClient
from hf_cases import build as build_hf
from PIL import Image

import tokenzoo
from tokenzoo.cli import main
from tokenzoo.serve import Shelf, create_app
from tokenzoo.serve.demo import CLASSES, load_demo
from tokenzoo.serve.models import DEMO, Shown, shown
from tokenzoo.serve.samples import load_samples
from tokenzoo.serve.uploads import MOST_BYTES

LABELS = ("ant", "bee", "cat", "dog", "elk", "fox")


def tiny() -> Shown:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, embed_dim=48, depth=3, num_heads=3, num_classes=6)
    return shown(model.eval(), LABELS, "random weights")


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf({"tiny": tiny()})


@pytest.fixture
def client(shelf) -> TestClient:
    return TestClient(create_app(shelf, load_samples()))


def encoded(kind: str = "PNG", size=(120, 80), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png_claiming(wide: int, high: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def post(client, data: bytes, methods=(("tome", 0.6),), **query):
    pairs = [(key, value) for method, share in methods for key, value in (("method", method), ("share", str(share)))]
    return client.post("/api/run", params=[*pairs, *query.items()], content=data)


def test_page_and_what_it_needs(client):
    assert "An image loses tokens" in client.get("/").text
    assert all(client.get(name).status_code == 200 for name in ("/app.js", "/style.css"))
    about = client.get("/api/about").json()
    names = {method["name"] for method in about["methods"]}
    assert {"tome", "evit", "mctf"} <= names and "reconstruct" not in names
    assert about["models"] == ["tiny"] and about["samples"] == ["china", "flower"]
    assert client.get("/api/sample/china").content[:2] == b"\xff\xd8"
    assert client.get("/api/sample/..%2f..%2fpyproject.toml").status_code == 404
    assert client.get("/../pyproject.toml").status_code == 404


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_and_two_methods(kind, client, shelf):
    """Answers, costs and the token of every patch are those of the library; the model is unpatched again."""
    state = {key: value.clone() for key, value in shelf.get("tiny").model.state_dict().items()}
    answer = post(client, encoded(kind), [("tome", 0.6), ("evit", 0.8)]).json()
    assert not tokenzoo.is_patched(shelf.get("tiny").model)
    assert all(torch.equal(value, state[key]) for key, value in shelf.get("tiny").model.state_dict().items())
    assert answer["image"].startswith("data:image/png;base64,")
    assert [one["method"] for one in answer["after"]] == ["tome", "evit"]
    for one in (answer["before"], *answer["after"]):
        assert len(one["top"]) == 5 and {item["label"] for item in one["top"]} <= set(LABELS) and one["ms"] > 0
    for one in answer["after"]:
        with tokenzoo.patched(tiny().model, yaml.safe_load(one["recipe"])) as model:
            report = tokenzoo.report(model)
            assert one["gmacs"] == pytest.approx(report.total / 1e9) and one["ratio"] == pytest.approx(report.ratio)
            assert one["blocks"][-1]["tokens_out"] == report.rows[3].tokens_out
        assert one["grid"] == [6, 6] and all(len(block["assign"]) == 36 for block in one["blocks"])


def test_every_method_offered_answers_or_says_why(client):
    names = [method["name"] for method in client.get("/api/about").json()["methods"]]
    data, answered = encoded(), 0
    for name in names:
        response = post(client, data, [(name, 0.8)])
        assert response.status_code in (200, 422), (name, response.text)
        answered += response.status_code == 200
        assert response.status_code == 200 or name in response.json()["error"]
    assert answered >= 0.7 * len(names)


def test_a_tower_of_transformers(client, shelf):
    model = build_hf("vit").eval()
    side = model.config.image_size

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((side, side)), np.float32)).permute(2, 0, 1) / 255

    def restore(x: torch.Tensor) -> Image.Image:
        return Image.fromarray((255 * x.permute(1, 2, 0)).byte().numpy())

    there = Shelf({"hf": Shown(model, transform, restore)})
    answer = post(TestClient(create_app(there)), encoded(), [("tome", 0.8)])
    assert answer.status_code == 200 and answer.json()["after"][0]["blocks"]


BAD = {
    "nothing": (b"", 422, "No image"),
    "text": (b"GIF of a cat", 422, "not an image"),
    "cut off": (encoded("PNG")[:-200], 422, "damaged"),
    "cut JPEG": (encoded("JPEG")[:500], 422, "damaged"),
    "noise behind a header": (encoded("PNG")[:60] + bytes(range(256)) * 8, 422, "damaged"),
    "billions of pixels": (png_claiming(60_000, 60_000), 422, "not an image|pixels"),
    "many pixels": (png_claiming(8_000, 8_000), 422, "8000 x 8000 pixels"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 422, "not an image"),
    "a zip": (b"PK\x03\x04" + bytes(100), 422, "not an image"),
    "a pickle": (b"\x80\x04\x95" + bytes(50), 422, "not an image"),
    "too long": (bytes(MOST_BYTES + 1), 413, "too large: at most 8 MiB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_get_a_sentence(kind, client):
    data, status, sentence = BAD[kind]
    response = post(client, data)
    assert response.status_code == status and re.search(sentence, response.json()["error"])
    chunks = client.post("/api/run?method=tome&share=0.6", content=iter([data[:1000], data[1000:]]))  # no length said
    assert chunks.status_code == status


@pytest.mark.parametrize(
    ("methods", "query", "sentence"),
    [
        ((("nothing", 0.6),), {}, "no method called 'nothing'"),
        ((("tome", 7),), {}, "not a number from 0.05 to 1"),
        ((("tome", "nan"),), {}, "not a number"),
        ((("tome", 0.06),), {}, "tome cannot be shown: .*cannot be reached|tome cannot be shown"),
        ((), {}, "Give one or 2 methods"),
        ((("tome", 0.6),) * 3, {}, "Give one or 2 methods"),
        ((("tome", 0.6),), {"model": "vit_tinny"}, "not the name of a timm model"),
        ((("tome", 0.6),), {"model": "../../etc/passwd"}, "not the name of a timm model"),
    ],
)  # fmt: skip
def test_bad_requests_get_a_sentence(methods, query, sentence, client):
    response = post(client, encoded(), methods, **query)
    assert response.status_code == 422 and re.search(sentence, response.json()["error"])


def test_weights_that_cannot_be_had(client, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.create_model", offline)
    response = post(client, encoded(), model="vit_small_patch16_224")
    assert response.status_code == 422 and "vit_small_patch16_224 cannot be had" in response.json()["error"]


def test_foreign_names_of_this_computer_are_turned_away(client):
    assert client.get("/api/about", headers={"host": "evil.example"}).status_code == 400


def test_nothing_is_written(client, tmp_path, monkeypatch):
    """Large bodies and images of every size stay in memory."""

    def refuse(*args, **kwargs):
        raise AssertionError("a file was made")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    assert post(client, encoded("BMP", (1400, 1400))).status_code == 200


def test_two_hundred_uploads_at_once(shelf):
    """Good and bad ones mixed, through real sockets; every one is answered, and the server goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(shelf), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    good, bad = encoded("JPEG"), [data for data, _, _ in BAD.values()]
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as client:

            def send(i: int) -> httpx.Response:
                return post(client, good if i % 8 == 0 else bad[i % len(bad)])

            with concurrent.futures.ThreadPoolExecutor(200) as pool:
                answers = list(pool.map(send, range(200)))
            for i, answer in enumerate(answers):
                expected = 200 if i % 8 == 0 else list(BAD.values())[i % len(bad)][1]
                assert answer.status_code == expected and (expected == 200 or answer.json()["error"].endswith("."))
            assert client.get("/api/about").status_code == 200
    finally:
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive()


def test_the_demos_model_needs_no_network(client):
    """It knows its photographs, at the size that the page shows them at."""
    page = TestClient(create_app(Shelf({"demo": shown(load_demo(160), CLASSES, DEMO)}), load_samples()))
    for name in ("china", "flower"):
        answer = post(page, load_samples()[name]).json()
        assert answer["before"]["top"][0]["label"] == name and answer["after"][0]["grid"] == [20, 20]


def test_the_command_refuses_random_weights(capsys):
    assert main(["serve", "--model", "vit_tiny_patch16_224"]) == 2
    assert "random weights" in capsys.readouterr().err
