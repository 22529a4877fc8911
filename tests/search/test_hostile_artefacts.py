"""Bundles and indexes of a stranger: every checksum in them is right."""

import os
import shutil
import socket
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path

import faiss
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from resealed import change, reseal

from verbs import crosstill


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "theirs/bundle"))


@pytest.fixture
def index(index_folder, tmp_path) -> Path:
    return Path(shutil.copytree(index_folder, tmp_path / "index"))


def line(*arguments: object) -> str:
    """The one line with which a verb refuses a file."""
    lines = crosstill(*arguments, code=1).stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, lines
    return lines[-1]


def generation(index: Path) -> Path:
    return next(index.glob("g-*"))


@pytest.mark.parametrize("name", ["../../evil", "/etc/hostname", "more/evil", "other"])
def test_a_bundle_names_no_file_elsewhere(bundle, photos, tmp_path, name):
    mine = tmp_path / "mine/evil"
    mine.parent.mkdir()
    mine.write_text("mine")
    (tmp_path / "evil").write_text("theirs")
    (bundle / "more").mkdir()
    for place in ("more/evil", "other"):
        (bundle / place).write_text("theirs")
    change(bundle / "bundle.json", lambda record: record["files"].update({name: "0" * 64}))
    reseal(bundle)
    assert "bundle.json: files" in line("index", bundle, photos, "--out", tmp_path / "mine/index")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "text.onnx", "bundle.json"])
def test_a_link_in_a_bundle_is_not_followed(bundle, photos, tmp_path, name):
    secret = tmp_path / "secret"
    os.replace(bundle / name, secret)
    (bundle / name).symlink_to(secret)
    assert f"{name}: a link" in line("index", bundle, photos, "--out", tmp_path / "index")
    assert not list((tmp_path / "index").glob(f"**/{name}"))


def test_the_lock_of_an_index_is_no_way_out(index, tmp_path):
    mine = tmp_path / ".bashrc"
    mine.write_text("mine")
    (index / ".lock").unlink(missing_ok=True)
    (index / ".lock").symlink_to(mine)
    assert ".lock: a link" in line("index", "verify", index)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["photos.sqlite", "vectors.faiss", "vectors.npy", "vectors.json"])
def test_a_link_in_an_index_is_not_followed(index, tmp_path, name):
    path = generation(index) / name
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a link" in line("search", index, "a circle")


@pytest.mark.parametrize("name", ["work.sqlite", "work.sqlite-wal"])
def test_a_link_to_a_memory_is_not_followed(bundle, index, photos, tmp_path, name):
    mine = tmp_path / "mine"
    if (index / name).exists():
        os.replace(index / name, mine)
    else:
        mine.write_text("mine")
    (index / name).symlink_to(mine)
    before = mine.read_bytes()
    assert f"{name}: a link" in line("index", bundle, photos, "--out", index)
    assert f"{name}: a link" in crosstill("index", "verify", index, code=1).output
    assert mine.read_bytes() == before


PROGRAM = "CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM embeddings; END"
VIEW = "DROP TABLE unused; CREATE VIEW unused AS SELECT sha, 1 AS since_ns, 1 AS crc FROM files"


def with_crc(table: str, values: tuple) -> str:
    """SQL that puts a row with its checksum into a table of an index's memory."""
    crc = zlib.crc32(repr(values).encode())
    cells = [f"x'{v.hex()}'" if isinstance(v, bytes) else repr(v) for v in (*values, crc)]
    return f"INSERT OR REPLACE INTO {table} VALUES ({', '.join(cells)})"


MEMORIES = [
    PROGRAM,
    VIEW,
    "CREATE TABLE more (a)",
    with_crc("meta", ("sheets", 5)),
    with_crc("meta", ("sheets", "{")),
    with_crc("meta", ("sheets", "[" * 100_000)),
    with_crc("meta", ("root", b"x")),
    with_crc("files", ("text", 1, 1, 1, 1, 1, 1, 1, b"x" * 32, "", "")),
    with_crc("files", (b"a", "many", 1, 1, 1, 1, 1, 1, b"x" * 32, "", "")),
    with_crc("files", (b"a", 1, 1, 1, 1, 1, 1, 1, "text", "", "")),
    with_crc("files", (b"a", 1, 1, 1, 1, 1, 1, 1, b"x" * 32, b"x", "")),
    with_crc("unused", (b"x" * 32, "long ago")),
    f"INSERT INTO embeddings VALUES (x'{'00' * 32}', {zlib.crc32(b'abcd')}, x'61626364')",
    f"INSERT INTO embeddings VALUES (x'{'00' * 32}', {zlib.crc32(b'abcd')}, 'abcd')",
    "UPDATE embeddings SET sha = x'00' WHERE sha = (SELECT min(sha) FROM embeddings)",
]


@pytest.mark.parametrize("change", MEMORIES, ids=range(len(MEMORIES)))
def test_a_memory_of_other_tables_or_types_is_made_anew(bundle, index, photos, caplog, change):
    with closing(sqlite3.connect(index / "work.sqlite")) as db:
        db.executescript(change)
    found = crosstill("index", "verify", index, code=1)
    assert "work.sqlite: " in found.output
    crosstill("index", bundle, photos, "--out", index)
    assert "work.sqlite: " in caplog.text and "thrown away" in caplog.text
    crosstill("index", "verify", index)


@pytest.mark.parametrize("what", ["bundle", "g"])
def test_a_folder_of_an_index_is_no_link(index, tmp_path, what):
    path = next(index.glob(f"{what}-*"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a link" in line("search", index, "a circle")


def test_only_our_kinds_of_faiss_index_are_read(index, tmp_path):
    path = generation(index) / "vectors.faiss"
    flat = faiss.read_index(str(path))
    rows = flat.reconstruct_n(0, flat.ntotal)
    store = tmp_path / "lists"
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(flat.d), flat.d, 1, faiss.METRIC_INNER_PRODUCT)
    lists = faiss.OnDiskInvertedLists(1, ivf.code_size, str(store))
    ivf.replace_invlists(lists)
    ivf.train(rows)
    ivf.add(rows)
    faiss.write_index(ivf, str(path))
    before = store.read_bytes()
    reseal(index)
    assert "vectors.faiss: not a flat index" in line("search", index, "a circle")
    assert store.read_bytes() == before


@pytest.mark.parametrize("at", [4, 8, 37])
def test_sizes_in_a_faiss_file_are_checked(index, at):
    path = generation(index) / "vectors.faiss"
    data = bytearray(path.read_bytes())
    data[at + 3] ^= 0x40  # of the dimension, of the number of vectors, of the length of the values
    path.write_bytes(data)
    reseal(index)
    assert "vectors.faiss: not a flat index" in line("search", index, "a circle")


@pytest.mark.parametrize("verb", ["search", "verify"])
def test_a_milvus_token_goes_only_where_the_user_says(index, monkeypatch, verb):
    pytest.importorskip("pymilvus")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        place = {"uri": uri, "collection": "crosstill_0123456789abcdef"}
        change(index / "index.json", lambda record: record.update(kind="milvus", milvus=place))
        monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
        if verb == "search":
            said = crosstill("search", index, "a circle", code=2).stderr
        else:
            said = crosstill("index", "verify", index, code=1).stdout
        assert f"set MILVUS_URI={uri}" in said
        with pytest.raises(BlockingIOError):  # nobody has knocked
            server.accept()


@pytest.mark.parametrize(
    "milvus",
    [
        {"uri": "/etc", "collection": "crosstill_0123456789abcdef"},
        {"uri": "http://h:1", "collection": "users"},
        {"uri": "http://h:1"},
        "http://h:1",
    ],
)
def test_an_index_names_no_other_collection(index, milvus):
    change(index / "index.json", lambda record: record.update(kind="milvus", milvus=milvus))
    assert "index.json: milvus" in line("search", index, "a circle")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bundle", "../theirs"),
        ("bundle", "/etc"),
        ("bundle", 3),
        ("generation", "1/../../x"),
        ("generation", -1),
        ("dim", 10**12),
        ("files", {"../photos.sqlite": "0" * 64}),
        ("files", []),
        ("folder", None),
        ("identity", "x"),
        ("photos", "many"),
        ("quantiles", "x"),
    ],
)
def test_the_fields_of_a_pointer_have_types(index, field, value):
    change(index / "index.json", lambda record: record.update({field: value}))
    assert f"index.json: {field}" in line("search", index, "a circle")
    change(index / "index.json", lambda record: record.pop(field))
    if field != "quantiles":
        assert f"index.json: {field}" in line("search", index, "a circle")


@pytest.mark.parametrize("name", ["bundle.json", "index.json"])
def test_deep_json_is_refused(bundle, index, photos, tmp_path, name):
    deep = "[" * 200_000 + "]" * 200_000
    (bundle / "bundle.json").write_text(deep)
    (index / "index.json").write_text(deep)
    if name == "bundle.json":
        assert name in line("index", bundle, photos, "--out", tmp_path / "new")
    else:
        assert name in line("search", index, "a circle")


@pytest.mark.parametrize("kind", ["view", "trigger", "types"])
def test_a_catalogue_is_tables_and_nothing_else(index, kind):
    path = generation(index) / "photos.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, x'00' FROM n"
    )
    if kind == "view":
        db.execute("DROP TABLE photos")
        db.execute(f"CREATE VIEW photos (id, sha) AS {endless}")
    elif kind == "trigger":
        db.execute("CREATE TRIGGER t AFTER DELETE ON paths BEGIN DELETE FROM photos; END")
    else:
        db.execute("UPDATE paths SET caption = x'ff00'")
    db.close()
    reseal(index)
    assert "photos.sqlite: " in line("search", index, "a circle")


def test_a_graph_is_no_program_without_end(index):
    path = next(index.glob("bundle-*")) / "text.onnx"
    whole = onnx.load(path)

    def refused(node: onnx.NodeProto) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        model.graph.node.append(node)
        onnx.save(model, path)
        reseal(index)
        assert "text.onnx: not a graph as crosstill exports it" in line("search", index, "a circle")

    body = helper.make_graph([], "body", [], [])
    refused(helper.make_node("Loop", ["", ""], [], body=body))
    refused(helper.make_node("Scan", [], [], body=body, num_scan_inputs=0))
    refused(helper.make_node("Anything", [], [], domain="somebody.else"))
    out = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
    out.data_location = TensorProto.EXTERNAL
    out.external_data.add(key="location", value="../../secret")
    refused(helper.make_node("Constant", [], ["t"], value=out))


def test_an_archive_that_swells_is_refused(bundle, photos, tmp_path):
    rows, names = np.zeros((100_000_000, 1), np.float16), np.array([b"a"])
    np.savez_compressed(bundle / "calibration.npz", rows=rows, more=rows, images=names)
    reseal(bundle)
    assert "calibration.npz: not readable" in line("index", bundle, photos, "--out", tmp_path / "i")
