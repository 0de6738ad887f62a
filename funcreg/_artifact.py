"""Several files that belong together, written so that a reader sees all of them or an error. No framework."""

import contextlib
import glob
import os
import secrets
import shutil
import time
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
        raise ValueError(f"{where}: path must end in {suffix}, got {str(path)!r}")
    if not file.parent.is_dir():
        remedy = "Path(path).expanduser() knows ~" if file.parts[0].startswith("~") else "make it first"
        raise FileNotFoundError(f"{where}: there is no folder {str(file.parent)!r}; {remedy}")
    _refuse_existing(where, [file, manifest_path(file)], overwrite)
    return file


@contextlib.contextmanager
def staged(where: str, path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `path`; what is written into it is moved there if all went well, and gone if not.

    The manifest goes last, and an old one first: between the two no reader takes new files for old ones. After an error
    the old files are back. A process that is killed leaves its folder, which a later export to this path removes, and
    the old files unless it was moving them just then, four renames.
    """
    _sweep(path)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
    try:
        (folder / _OLD).mkdir(parents=True)
        yield folder
        with _alone(path.parent):
            _move(where, folder, path, overwrite)
    except OSError as error:
        if error.errno is None:  # one of ours, which says all
            raise
        raise OSError(
            error.errno,
            f"{where}: {path.name} and its manifest could not be written into {str(path.parent)!r} ({error}), which "
            "must be writable and have room for them; the files there are as before",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_PART, _OLD = ".part", "old"


def _sweep(path: Path) -> None:
    """Remove what exports to this path have left that were killed more than a day ago."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: files of two exports must not be mixed. Windows and some disks have no such lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _move(where: str, folder: Path, path: Path, overwrite: bool) -> None:
    last = manifest_path(path)
    files = sorted(folder.iterdir(), key=lambda file: (file.name == last.name, file.name))
    goals = {path.with_name(file.name): file for file in files if file.name != _OLD}
    _refuse_existing(where, list(goals), overwrite)
    aside: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for goal in sorted(goals, key=lambda goal: goal != last):
            if os.path.lexists(goal):
                os.rename(goal, folder / _OLD / goal.name)
                aside[goal] = folder / _OLD / goal.name
        for goal, file in goals.items():
            os.replace(file, goal)
            placed.append(goal)
    except BaseException:
        for goal in placed:
            goal.unlink(missing_ok=True)
        for goal, old in reversed(aside.items()):
            os.rename(old, goal)
        raise


def _refuse_existing(where: str, files: list[Path], overwrite: bool) -> None:
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{where}: {str(file)!r} is a folder; name a file")
        if os.path.lexists(file) and not overwrite:  # a link to nothing, too
            raise FileExistsError(f"{where}: {file} is there already; pass overwrite=True to replace it")
