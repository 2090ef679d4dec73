"""Hook of mkdocs: adds what docs/ does not hold (README, notes, files they link to, generated pages), mends links.

Pages keep the links that they have in the repository; here these are led to where the page is on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from family_pages import all_families, family_page  # noqa: E402
from method_pages import GALLERY, gallery_page, method_page  # noqa: E402
from reference_pages import reference_pages  # noqa: E402

import tokenzoo  # noqa: E402

NOTES = ("benchmarks/**/*.md", "examples/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/")


def repository_path(path: str) -> str:
    """The other way round, for pages; generated ones are as if they were in docs/."""
    if path == "index.md":
        return "README.md"
    return path if (ROOT / path).is_file() else f"docs/{path}"


def generated() -> dict[str, str]:
    """Page of the site -> markdown, for all that is written from the registries."""
    pages = {f"methods/{name}.md": method_page(name) for name in tokenzoo.list_methods()}
    pages |= {f"families/{family.name}.md": family_page(family) for family in all_families()}
    return {**pages, **reference_pages(), "gallery.md": gallery_page()}


def notes() -> list[str]:
    """Pages of the repository outside docs/."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in NOTES for path in ROOT.glob(pattern))


def linked(page: str, text: str) -> set[str]:
    """Files of the repository outside docs/ that a page links to."""
    targets = (target for target, _ in _LINK.findall(text) if "://" not in target)
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) for target in targets}
    return {path for path in found if not path.startswith(("docs/", "..")) and (ROOT / path).is_file()}


def on_config(config: Any) -> Any:
    """Puts the generated pages where mkdocs.yml says METHODS, FAMILIES, REFERENCE and MEASURED."""
    lists = {
        "METHODS": [f"methods/{name}.md" for name in tokenzoo.list_methods()],
        "FAMILIES": [f"families/{family.name}.md" for family in all_families()],
        "REFERENCE": list(reference_pages()),
        "MEASURED": [path for path in notes() if path.startswith("benchmarks/")],
        "MODELS": [path for path in notes() if path.startswith("examples/")],
    }

    def filled(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [{key: [x for e in value for x in filled(e)] if isinstance(value, list) else value
                     for key, value in entry.items()}]  # fmt: skip
        return lists.get(entry, [entry])

    config.nav = [x for entry in config.nav for x in filled(entry)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds pages and files."""
    pages = generated()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    texts = {repository_path(path): text for path, text in pages.items()}
    texts |= {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    texts |= {path: (ROOT / path).read_text(encoding="utf-8") for path in notes()}
    outside = set(notes()).union(*(linked(page, text) for page, text in texts.items()))
    for path in sorted(outside):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for path in sorted(GALLERY.glob("*.png")):
        files.append(File.generated(config, f"methods/{path.name}", abs_src_path=str(path)))
    for file in files:
        if file.src_uri.endswith("_train.md"):
            file.inclusion = InclusionLevel.EXCLUDED
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as on the site, markdown as Python-Markdown reads it."""
    here = page.file.src_uri
    origin = repository_path(here)

    def moved(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        return f"]({os.path.relpath(site_path(path), posixpath.dirname(here) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [readable(_LINK.sub(moved, part)) for part in parts[::2]]
    text = "".join(parts)
    if here in ("methods.md", "backbones.md"):  # every row leads to its page
        names = tokenzoo.list_methods() if here == "methods.md" else [family.name for family in all_families()]
        row = rf"^\| `({'|'.join(names)})` \|"
        folder = "methods" if here == "methods.md" else "families"
        text = re.sub(row, rf"| [`\1`]({folder}/\1.md) |", text, flags=re.MULTILINE)
    return text


def readable(text: str) -> str:
    """GitHub's markdown as Python-Markdown wants it: no comments around tables, lists indented by four."""
    text = re.sub(r"^<!--.*?-->$", "", text, flags=re.MULTILINE)
    return re.sub(r"^   (?=[^ ])", "    ", text, flags=re.MULTILINE)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Nothing is fetched from elsewhere: what lets the search run without a server comes from the site itself."""
    here = os.path.relpath("worker.js", posixpath.dirname(page.file.src_uri) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", here)
