"""Files of a data set, in a folder or inside a zip archive that stays unopened on disk."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path, PurePosixPath


class Folder:
    """Files below a folder.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def is_dir(self, name: str) -> bool:
        """Whether there is such a folder."""
        return (self.root / name).is_dir()

    def names(self, below: str) -> list[str]:
        """All files below a folder, subfolders included, relative to the root, sorted."""
        start = self.root / below
        found = [Path(path, file) for path, _, files in os.walk(start, followlinks=True) for file in files]
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.root / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return (self.root / name).read_bytes()


LARGEST = 1 << 28  # bytes of a member


class Zip:
    """Files of a zip archive; safe to send to other processes, each of which opens the archive anew.

    Args:
        path: the archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._sizes = {info.filename: info.file_size for info in self._archive().infolist() if not info.is_dir()}
        outside = [name for name in self._sizes if ".." in PurePosixPath(name).parts or name[:1] in "/\\"]
        if outside:
            raise ValueError(f"{self.path} holds {outside[0]!r}, which leaves its own folder; do not trust it")

    def __str__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def _archive(self) -> zipfile.ZipFile:
        # a forked process must not share the file offset of its parent
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.path} is not a readable zip archive ({error}); fetch it again") from error
        return self._opened[1]

    def is_dir(self, name: str) -> bool:
        """Whether the archive holds files below a folder."""
        return any(file.startswith(f"{name}/") for file in self._sizes)

    def names(self, below: str) -> list[str]:
        """All files below a folder, subfolders included, sorted."""
        return sorted(file for file in self._sizes if file.startswith(f"{below}/"))

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._sizes

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            ValueError: more than 256 MiB, which no image has; an archive of a few bytes can claim any size.
        """
        if self._sizes[name] > LARGEST:
            raise ValueError(f"{self._sizes[name]} bytes unpacked; more than {LARGEST} are not read")
        return self._archive().read(name)


class Archives:
    """Several archives as one tree.

    Args:
        paths: zip archives.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.parts = [Zip(path) for path in paths]

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))

    def is_dir(self, name: str) -> bool:
        """Whether one of the archives holds files below a folder."""
        return any(part.is_dir(name) for part in self.parts)

    def names(self, below: str) -> list[str]:
        """All files below a folder, subfolders included, sorted."""
        return sorted(name for part in self.parts for name in part.names(below))

    def _of(self, name: str) -> Zip:
        part = next((part for part in self.parts if part.has(name)), None)
        if part is None:
            raise FileNotFoundError(f"{self} holds no {name}")
        return part

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self._of(name).size(name)

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return self._of(name).read(name)


Files = Folder | Archives
