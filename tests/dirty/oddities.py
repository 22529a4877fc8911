"""A folder with every odd name and kind of file that a disk can hold."""

import os
import stat
from pathlib import Path

from mutants import encoded, picture

# photos under names that are odd and fine
FINE = {
    "bytes that are no UTF-8": os.fsdecode(b"bytes\xff\xfe.png"),
    "a new line": "line\nbreak.png",
    "255 bytes": "n" * 251 + ".png",
    "right to left": "\u202egnp.\u05e9\u05dc\u05d5\u05dd.png",
    "an escape": "red\x1b[31m.png",
}


def lay(folder: Path) -> dict[str, str]:
    """Fill a folder; what must be said of each odd file, by its name, "" for those that are read.

    A folder that may not be listed and a file that vanishes are up to the tests: root may all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    odd = {}
    for number, name in enumerate(FINE.values()):
        (folder / name).write_bytes(encoded(picture(number), "PNG"))
        odd[name] = ""
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dead.png").symlink_to("nothing.png")
    (folder / "deep").mkdir()
    (folder / "deep/back").symlink_to("..")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    _device(folder / "device.png")
    (folder / "empty.png").touch()
    return odd | {
        "loop.png": "unreadable",
        "dead.png": "missing",
        "pipe.png": "unreadable",
        "device.png": "unreadable",
        "empty.png": "empty",
    }


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        path.symlink_to("/dev/null")
