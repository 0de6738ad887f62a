"""Several files that belong together, written so that a reader sees all of them or an error. No framework."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ._manifest import manifest_path


def target(where: str, path: str | os.PathLike[str], suffix: str, overwrite: bool) -> Path:
    """The path of a new file, checked before anything is computed.

    Raises:
        FileExistsError: it is there, or its manifest is, and `overwrite` is not set.
        FileNotFoundError: its folder is not there.
        ValueError: another ending.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path must be a string or a Path, got {type(path).__name__}")
    file = Path(path)
    if file.suffix != suffix:
        raise ValueError(f"{where}: path must end in {suffix}, got {str(file)!r}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{where}: there is no folder {str(file.parent)!r}; make it first")
    _refuse_existing(where, [file, manifest_path(file)], overwrite)
    return file


@contextlib.contextmanager
def staged(where: str, path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `path`; what is written into it is moved there if all went well, and gone if not.

    The manifest goes last, and an old one first: between the two no reader takes new files for old ones.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    placed: list[Path] = []
    try:
        yield folder
        last = manifest_path(path)
        files = sorted(folder.iterdir(), key=lambda file: (file.name == last.name, file.name))
        targets = [path.with_name(file.name) for file in files]
        _refuse_existing(where, targets, overwrite)
        last.unlink(missing_ok=True)
        for file, goal in zip(files, targets, strict=True):
            os.replace(file, goal)
            placed.append(goal)
    except BaseException:
        for goal in placed:
            goal.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(where: str, files: list[Path], overwrite: bool) -> None:
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{where}: {str(file)!r} is a folder; name a file")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{where}: {file} is there already; pass overwrite=True to replace it")
