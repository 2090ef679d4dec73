"""The site: every method and family has its page, and pages say what the registries do."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import tokenzoo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hook():
    """The hook of mkdocs, which writes the pages."""
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "scripts" / "docs"))
    try:
        yield importlib.import_module("hook")
    finally:
        sys.path.remove(str(ROOT / "scripts" / "docs"))


@pytest.fixture(scope="module")
def pages(hook) -> dict[str, str]:
    return hook.generated()


def test_every_method_has_its_page(pages):
    for name in tokenzoo.list_methods():
        text, cls = pages[f"methods/{name}.md"], tokenzoo.method_class(name)
        assert text.startswith(f"# {name}\n") and cls.source in text
        assert all(f"| `{field.name}` | `{field.default!r}` |" in text for field in dataclasses.fields(cls))
        assert "## Where it acts" in text and "## What it cannot do" in text
        assert all(file.as_posix().removeprefix(f"{ROOT.as_posix()}/") in text
                   for file in (ROOT / "configs" / name).glob("*.yaml"))  # fmt: skip
        assert f"](methods/{name}.md)" in pages["gallery.md"]


def test_every_option_is_described(pages):
    for name in tokenzoo.list_methods():
        table = pages[f"methods/{name}.md"].split("## Options")[1].split("\n## ")[0]
        assert not [line for line in table.splitlines() if line.endswith("|  |")], name


def test_every_family_has_its_page(pages, hook):
    for family in hook.all_families():
        text = pages[f"families/{family.name}.md"]
        assert family.summary in text and all(f".{cls.__qualname__}`" in text for cls in family.models)
        methods = text.split("## Methods")[1]
        assert ("methods/ssm_prune.md" in methods) == family.scans
        assert ("methods/evit.md" in methods) != family.scans
    assert len(list(hook.all_families())) >= len(tokenzoo.list_backbones())


def test_a_new_method_gets_its_page_by_itself(hook, monkeypatch):
    from tokenzoo.core import registry

    cls = tokenzoo.method_class("uniform")
    doc = "Keeps what it is told.\n\nSource: a test."
    own = type("Own", (cls,), {"name": "own", "__doc__": doc, "source": "a test"})
    monkeypatch.setitem(registry._METHODS, "own", own)
    page = hook.generated()["methods/own.md"]
    assert page.startswith("# own\n\nKeeps what it is told.") and "No row of" in page


def test_every_public_name_is_in_the_reference(pages):
    text = "\n".join(text for path, text in pages.items() if path.startswith("api/"))
    classes = {tokenzoo.method_class(name).__name__ for name in tokenzoo.list_methods()}
    for name in (name for name in tokenzoo.__all__ if not inspect.ismodule(getattr(tokenzoo, name))):
        assert (f"[`{name}`]" if name in classes else f".{name}\n") in text, name


def test_measured_rows_are_those_of_the_files(pages):
    assert "flops=0.6" in pages["methods/tome.md"] and "imagenette160_free.csv" in pages["methods/tome.md"]
    assert "bench_vim_small.csv" in pages["methods/ssm_prune.md"]
    file = (ROOT / "benchmarks" / "accuracy" / "imagenette160_free.csv").read_text(encoding="utf-8")
    (row,) = [line.split(",") for line in file.splitlines() if line.startswith("tome flops=0.6,")]
    assert f"| {row[0]} | {100 * float(row[2]):.1f} % | {row[3]} | {float(row[5]):+.2f} ± {row[6]} |" in (
        pages["methods/tome.md"]
    )


def test_links_lead_to_where_pages_are(hook):
    class Page:
        def __init__(self, path):
            self.file = type("File", (), {"src_uri": path})

    def moved(text, path):
        return hook.on_page_markdown(text, Page(path))

    assert moved("[a](docs/usage.md#x)", "index.md") == "[a](usage.md#x)"
    assert moved("[a](../benchmarks/README.md)", "measuring.md") == "[a](benchmarks/README.md)"
    assert moved("[a](../docs/measuring.md)", "benchmarks/README.md") == "[a](../measuring.md)"
    assert moved("[a](../../benchmarks/x.csv)", "methods/tome.md") == "[a](../benchmarks/x.csv)"
    assert moved("[a](https://b.c/d)", "usage.md") == "[a](https://b.c/d)"
    assert moved("```text\n[a](../x.md)\n```", "usage.md") == "```text\n[a](../x.md)\n```"


def test_the_gallery_draws_a_method_or_says_why_not(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    gallery = importlib.import_module("gallery")
    found = gallery.draw_all([gallery.demo_painter()], ["uniform", "reconstruct"], 0.6, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"uniform.png", "uniform_blocks.png"}
    assert found["uniform"].reason == "" and "nothing to rebuild" in found["reconstruct"].reason


def test_pages_ask_no_one_else_for_scripts(hook):
    class Page:
        file = type("File", (), {"src_uri": "methods/tome.md"})

    text = hook.on_post_page('<script src="https://unpkg.com/iframe-worker/shim"></script>', Page())
    assert text == '<script src="../worker.js"></script>' and (ROOT / "docs" / "worker.js").is_file()
