"""Files that are whole or not there."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(where: str, file: Path) -> Iterator[Path]:
    """A new file beside `file`, which takes its place when all is written; every writer has its own."""
    target = file.resolve()  # through a link, which stays one
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{where}: there is no folder {str(target.parent)!r}; make it first")
    part = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # follows no link, and the umask
    except OSError as error:
        raise OSError(error.errno, f"{where}: cannot write into {str(target.parent)!r} ({error.strerror})") from error
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # safetensors makes files for their owner only
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
