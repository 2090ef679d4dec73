"""The demo's one-page report: tables and images in one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --soft: #5a6470; --line: #d5dae0; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181d; --text: #e4e8ec; --soft: #9aa5b1; --line: #333b45; --card: #1d232a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.3rem; margin: 2.2rem 0 0.6rem; }
p, li { max-width: 48rem; } a { color: inherit; }
nav a { margin-right: 1rem; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: 0.9rem; }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 6px;
  padding: 4px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--card); }
caption { text-align: left; padding: 0.4rem 0.7rem; color: var(--soft); }
tbody tr:hover { background: var(--card); }
details { border: 1px solid var(--line); border-radius: 6px; padding: 0.4rem 0.8rem; margin: 0.5rem 0; }
summary { cursor: pointer; font-weight: 600; }
""".strip()


def picture(path: Path, alt: str, caption: str = "") -> str:
    """A figure with its image inside; photographs as JPEG, which is a fifth of their size.

    Args:
        path: PNG.
        alt: what the image shows, for those who do not see it.
        caption: below it.
    """
    with Image.open(path) as image:
        width, height, colors = *image.size, image.convert("RGB").getcolors(1 << 15)
        kind, data = "png", path.read_bytes()
        if colors is None:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
            kind, data = "jpeg", buffer.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">{text}</figure>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls on narrow screens."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )  # fmt: skip
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def page(title: str, lead: Sequence[str], sections: Mapping[str, tuple[str, Sequence[str]]]) -> str:
    """The whole document.

    Args:
        title: of the page.
        lead: paragraphs below it, plain text.
        sections: heading and HTML parts, by the name that links use.
    """
    links = "\n".join(f'<a href="#{name}">{escape(heading)}</a>' for name, (heading, _) in sections.items())
    parts = "\n".join(
        f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(html) + "\n</section>"
        for name, (heading, html) in sections.items()
    )
    first = "\n".join(f"<p>{escape(text)}</p>" for text in lead)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{first}\n<nav>\n{links}\n</nav>\n{parts}\n</main>\n</body>\n</html>\n"
    )


def cells(row: Mapping[str, Any], score: str) -> list[str]:
    """The cells that both tables begin with: method, cost asked for, GMACs, tokens, score and its difference."""
    diff = row[f"diff_{score}"]
    return [
        row["method"],
        "" if row["flops"] is None else f"{row['flops']:.0%}",
        f"{row['gmacs']:.4f}",
        "" if row["tokens_out"] is None else f"{row['tokens_out']:.1f}",
        f"{row[score]:.2f}",
        "" if diff is None else f"{diff:+.2f} ± {row[f'diff_{score}_se']:.2f}",
    ]
