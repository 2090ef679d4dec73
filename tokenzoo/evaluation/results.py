"""Result files and tables: CSV or JSON with the environment, one row a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVAL_COLUMNS = (
    "model", "method", "method_kwargs", "top1", "top1_err", "top1_se", "top5", "top5_err", "top5_se", "param_count",
    "img_size", "crop_pct", "interpolation", "tokens_out", "attn_impl", "gmacs", "n_images", "n_skipped", "diff_top1",
    "diff_top1_se", "diff_top5", "diff_top5_se", "agreement", "precision",
)  # fmt: skip
BENCH_COLUMNS = (
    "model", "method", "method_kwargs", "infer_samples_per_sec", "infer_step_time", "infer_step_time_q1",
    "infer_step_time_q3", "infer_batch_size", "infer_img_size", "infer_gmacs", "param_count", "tokens_out", "attn_impl",
    "latency_b1_ms", "latency_b1_q1_ms", "latency_b1_q3_ms", "latency_speedup", "speedup", "speedup_q1", "speedup_q3",
    "gmac_ratio", "speedup_per_gmac_ratio", "peak_memory_mb", "rounds", "compiled", "precision", "clock",
)  # fmt: skip


def check_file(path: str | Path, suffixes: Sequence[str], flag: str) -> Path:
    """A file to write, refused before hours of work rather than after them.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {path} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist; create it first")
    return path


def write_results(
    path: str | Path, rows: Sequence[dict[str, Any]], columns: Sequence[str], environment: dict[str, Any]
) -> None:
    """Writes rows as .csv (the columns, then the environment in every row) or .json (everything, environment once).

    Args:
        path: file to write.
        rows: one dict a run.
        columns: columns of the CSV file, all of them keys of every row.
        environment: from `tokenzoo.evaluation.environment.environment`.

    Raises:
        ValueError: another suffix, or a folder that does not exist.
    """
    path = check_file(path, (".csv", ".json"), "--results-file")
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps({"environment": environment, "results": list(rows)}, indent=2) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *environment])
        writer.writerows([_cell(row[c]) for c in columns] + [_cell(v) for v in environment.values()] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return value


def result_line(rows: Sequence[dict[str, Any]]) -> str:
    """What timm's scripts print last, for programs that call them: "--result" and the rows as JSON on one line."""
    return "--result\n" + json.dumps(list(rows))


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Aligned text, the first column to the left, the others to the right."""
    cells = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number for a table, "-" for None."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
