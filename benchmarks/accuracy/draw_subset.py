"""A seeded part of a data set, as many images of every class, as folders of links that every command takes.

    python benchmarks/accuracy/draw_subset.py --source tin100 --output tin100_part --train 25 --val 10 --val-skip 20

SOURCE and OUTPUT hold train/ and val/ with a folder per class. Images of a class are put in a seeded order; the first
ones are taken, or those behind the first `skip`, so that settings can be chosen on images that no table is made of.
With `--labels FILE`, a JSON file of class folders and their class numbers, OUTPUT/classes.txt names the folder of every
class for `--class-map`; classes without a folder get names of their own.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

SUFFIXES = (".jpg", ".jpeg", ".png")


def natural(path: Path) -> list[int | str]:
    """Names in the order of their numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def draw(source: Path, output: Path, count: int, skip: int, seed: int) -> int:
    """Links some images of every class of one split; how many there are.

    Raises:
        SystemExit: a class with fewer images, or no class.
    """
    folders = sorted((p for p in source.iterdir() if p.is_dir()), key=natural)
    if not folders:
        raise SystemExit(f"{source} holds no folders of classes")
    generator = torch.Generator().manual_seed(seed)
    for folder in folders:
        images = sorted((p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES), key=natural)
        order = torch.randperm(len(images), generator=generator).tolist()
        if skip + count > len(images):
            raise SystemExit(f"{folder} holds {len(images)} images; {skip} + {count} were asked for")
        target = output / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for index in order[skip : skip + count]:
            link = target / images[index].name
            if not link.exists():
                link.symlink_to(images[index].resolve())
    return len(folders) * count


def write_classes(labels: Path, path: Path) -> None:
    """The folder of every class, a line each."""
    numbers = {number: name for name, number in json.loads(labels.read_text()).items()}
    # whoever reads the map asks the model how many classes there are, so the last ones may be missing
    path.write_text("".join(f"{numbers.get(i, f'unused_{i:03d}')}\n" for i in range(max(numbers) + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--labels", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    for split in ("train", "val"):
        parser.add_argument(f"--{split}", type=int, default=0, help="images per class")
        parser.add_argument(f"--{split}-skip", type=int, default=0, help="images per class to leave to others")
    args = parser.parse_args()
    for split in ("train", "val"):
        count = getattr(args, split)
        if count:
            skip = getattr(args, f"{split}_skip")
            print(f"{split}: {draw(args.source / split, args.output / split, count, skip, args.seed)} images")
    if args.labels is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_classes(args.labels, args.output / "classes.txt")


if __name__ == "__main__":
    main()
