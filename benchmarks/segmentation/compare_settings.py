"""Two settings of camvid_table.py, or of saliency_agreement.py, on the same images: what stays as unpatched, paired.

    python benchmarks/segmentation/compare_settings.py runs/tiny/images.jsonl "tome flops=0.6" "random flops=0.6"

Prints the mean difference in points, its standard error over images, and on how many images the first one is ahead:
for each head of the pixels answered as by the unpatched model, or of the cosine of features (1 is 100 points). More
settings follow as further pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def shares(lines: list[dict[str, Any]], name: str, head: str) -> np.ndarray:
    """Percent of a setting's answers that are the unpatched model's, or 100 times the cosine, one number per image."""
    found = [next(row[2] for row in line["rows"] if row[0] == name)[head] for line in lines]
    if head == "cosine":
        return 100 * np.array(found)
    return np.array([100 * values["same"] / sum(values["area"][2]) for values in found])


def compare(lines: list[dict[str, Any]], first: str, second: str, head: str) -> tuple[float, float, int]:
    """(mean difference in points, its standard error, images on which the first is ahead)."""
    ahead = shares(lines, first, head) - shares(lines, second, head)
    return float(ahead.mean()), float(ahead.std(ddof=1) / len(ahead) ** 0.5), int((ahead > 0).sum())


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    values = lines[0]["rows"][0][2]
    heads = ["cosine"] if "cosine" in values else list(values)
    for first, second in zip(sys.argv[2::2], sys.argv[3::2]):
        print(f"{first} against {second}, {len(lines)} images")
        for head in heads:
            mean, error, count = compare(lines, first, second, head)
            print(f"  {head}: {mean:+.1f} ± {error:.1f} points, ahead on {count}")


if __name__ == "__main__":
    main()
