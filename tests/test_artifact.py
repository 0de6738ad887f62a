"""Several files that are written together: all or none, and the old ones for as long as the new ones are not there."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import funcreg
from funcreg import _artifact

NAMES = ["f.pt", "f.pt.json", "f.pt.safetensors"]


def write(path, text, overwrite=True):
    with _artifact.staged("test", path, overwrite) as folder:
        for name in NAMES:
            (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() if path.is_file() else None for path in folder.iterdir()}


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "f.pt", "old")
    return tmp_path / "f.pt"


def test_new_files_take_the_place_of_old_ones(path):
    with pytest.raises(FileExistsError, match="test: .*f.pt is there already; pass overwrite=True to replace it"):
        write(path, "new", overwrite=False)
    assert contents(path.parent) == dict.fromkeys(NAMES, "old")
    write(path, "new")
    assert contents(path.parent) == dict.fromkeys(NAMES, "new")


@pytest.mark.parametrize("operation", ["rename", "replace"])
@pytest.mark.parametrize("successes", range(3))
def test_an_error_while_files_are_moved(path, monkeypatch, operation, successes):
    """Three are put aside, three are moved in; whichever fails, the old ones are back."""
    then, count = getattr(os, operation), iter(range(100))

    def failing(*args):
        if next(count) == successes:
            raise OSError(errno.ENOSPC, "No space left on device")
        then(*args)

    monkeypatch.setattr(_artifact.os, operation, failing)
    message = rf"test: f.pt and its manifest could not be written into '{path.parent}' .*No space left"
    with pytest.raises(OSError, match=message) as caught:
        write(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert contents(path.parent) == dict.fromkeys(NAMES, "old")


def test_a_folder_that_cannot_be_written(path, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        OSError, match=r"test: f.pt and its manifest .* \(.*Read-only.*\), which must be writable"
    ) as caught:
        write(path, "new")
    assert caught.value.errno == errno.EROFS
    assert contents(path.parent) == dict.fromkeys(NAMES, "old")


def test_links_and_folders_in_the_way(path):
    other = path.with_name("g.pt")
    other.symlink_to(path.with_name("nowhere"))
    with pytest.raises(FileExistsError, match="g.pt is there already"):  # though it is a link to nothing
        _artifact.target("test", other, ".pt", False)
    other.unlink()
    path.with_name("g.pt.json").mkdir()
    with pytest.raises(IsADirectoryError, match="'.*g.pt.json' is a folder; name a file"):
        _artifact.target("test", other, ".pt", True)


def test_a_home_folder_is_not_guessed():
    with pytest.raises(FileNotFoundError, match=r"there is no folder '~'; Path\(path\).expanduser\(\) knows ~"):
        _artifact.target("test", "~/f.pt", ".pt", False)
    with pytest.raises(ValueError, match="path must end in .pt, got ''"):
        _artifact.target("test", "", ".pt", False)


CHILD = """
import sys, time
from pathlib import Path
from funcreg import _artifact
with _artifact.staged("test", Path(sys.argv[1]), True) as folder:
    (folder / "f.pt").write_text("new")
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed(path):
    """It leaves the old files and a hidden folder, in nobody's way; a later export removes it when it is a day old."""
    environment = {**os.environ, "PYTHONPATH": str(Path(funcreg.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = (name for name in contents(path.parent) if name not in NAMES)
    assert left.startswith(".f.pt.") and contents(path.parent) == {**dict.fromkeys(NAMES, "old"), left: None}
    write(path, "newer")
    assert contents(path.parent) == {**dict.fromkeys(NAMES, "newer"), left: None}
    yesterday = time.time() - 25 * 3600
    os.utime(path.parent / left, (yesterday, yesterday))
    write(path, "newest")
    assert contents(path.parent) == dict.fromkeys(NAMES, "newest")


def test_files_of_two_writers_are_not_mixed(path, monkeypatch):
    then, failed = os.replace, []

    def slow(*args):
        time.sleep(random.random() / 50)
        then(*args)

    def work(i):
        try:
            write(path, str(i))
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(_artifact.os, "replace", slow)
    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(set(contents(path.parent).values())) == 1 and sorted(contents(path.parent)) == NAMES
