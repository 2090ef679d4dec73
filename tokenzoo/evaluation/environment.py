"""What a figure depends on besides the code: versions, device, threads, commit, command line."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device | str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The record that goes with every measurement.

    Args:
        device: where the models run.
        argv: arguments after the program's name, None where no command was typed.
    """
    import timm

    import tokenzoo

    device = torch.device(device)
    commit, dirty = git_state(Path(tokenzoo.__file__).parent)
    return {
        "tokenzoo": tokenzoo.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "command": None if argv is None else command_line(argv),
    }


def device_name(device: torch.device) -> str:
    """Name of the accelerator or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def git_state(package: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout that a package lies in and whether the package differs from it.

    Args:
        package: folder of the package.

    Returns:
        (commit, dirty); (None, None) for an installed package, or where git is missing.
    """
    # an installed copy may lie inside some other project's checkout, which does not track it
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line(argv: Sequence[str]) -> str:
    """The command as typed, absolute paths cut down to their last part."""
    return shlex.join(["tokenzoo", *(re.sub(r"^([\w-]+=)?[/~](?:.*/)?(?=[^/])", r"\1", word) for word in argv)])
