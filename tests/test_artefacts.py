"""Arrays that a stranger may have written."""

import io

import numpy as np
import pytest

from crosstill import artefacts
from crosstill.errors import CorruptError

HEADERS = {
    "no end": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), ",
    "a wrong bracket": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)), }",
    "a null byte": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, \0), }",
    "a strange letter": "{'descr': '<f4', 'fortran_order': F°, 'shape': (2, 3), }".encode(
        "latin-1"
    ),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_unreadable_header_is_damage(header, tmp_path):
    """numpy takes a header apart as Python does, and lets through what Python's parts raise."""
    body = header.ljust(117) + b"\n"
    path = tmp_path / "rows.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + bytes(24))
    with pytest.raises(CorruptError, match=r"rows\.npy: not readable"):
        artefacts.array(path, "f", 2)


def test_an_entry_before_the_start_of_its_archive_is_damage(tmp_path):
    file = io.BytesIO()
    np.savez(file, rows=np.zeros((2, 3)))
    data = bytearray(file.getvalue())
    end = data.rindex(b"PK\x05\x06")
    # the directory's place, said to be later than it is, moves every entry before the start
    data[end + 16 : end + 20] = (10**6).to_bytes(4, "little")
    (tmp_path / "rows.npz").write_bytes(data)
    with pytest.raises(CorruptError, match=r"rows\.npz: not readable"):
        artefacts.archive(tmp_path / "rows.npz", {"rows": ("f", 2)})
