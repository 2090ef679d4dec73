"""Stores the weights of a run in half precision: `python scripts/half_precision.py RUN/model.safetensors FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    save_file({name: value.half().contiguous() for name, value in load_file(source).items()}, target)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
