import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from crosstill import files
from crosstill.errors import (
    ConfigError,
    CorruptError,
    DataError,
    DiskFullError,
    LockedError,
    MismatchError,
    RunError,
)
from crosstill.search import codes, faiss_stores, milvus_vectors, vector_index
from crosstill.search.memory_vectors import MemoryVectors
from crosstill.search.milvus_vectors import MilvusVectors
from crosstill.search.vector_index import VectorIndex, estimate_bytes, kind_for, open_vectors

DIM = 48
EXACT = 1e-6  # how far scores and vectors may be off


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Unit vectors around forty centres."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((40, dim))
    noise = random.standard_normal((count, dim))
    return unit(centres[random.integers(40, size=count)] + 0.7 * noise)


def best(vectors: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int):
    """What any index should find: by score, and by lower id where scores are equal."""
    scores = queries @ vectors.T
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


class Kept:
    """An index of one kind, where it is saved, and how to open it again."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.place = folder / "vectors.db" if kind == "milvus" else folder
        self.open: list[VectorIndex] = []

    def fresh(self, dim: int = DIM) -> VectorIndex:
        if self.kind == "milvus":
            pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
            index: VectorIndex = MilvusVectors(str(self.place), "photos", dim)
        else:
            index = MemoryVectors(dim, self.kind)
        self.open.append(index)
        return index

    def again(self, index: VectorIndex) -> VectorIndex:
        index.save(self.folder)
        index.close()
        self.open.append(open_vectors(self.place, index.dim, collection="photos"))
        return self.open[-1]


@pytest.fixture(params=[*vector_index.KINDS, "milvus"])
def kept(request, tmp_path):
    found = Kept(request.param, tmp_path)
    yield found
    for index in found.open:
        index.close()


# -- the contract -----------------------------------------------------------------------------


def test_an_empty_index_finds_nothing(kept):
    index = kept.fresh()
    scores, ids = index.search(clustered(3), 4)
    assert len(index) == 0 and len(index.ids()) == 0
    assert (scores == -np.inf).all() and scores.shape == (3, 4) and scores.dtype == np.float32
    assert (ids == -1).all() and ids.shape == (3, 4) and ids.dtype == np.int64
    assert index.vectors(np.empty(0, np.int64)).shape == (0, DIM)
    index.remove(np.array([1, 2]))
    index.add(np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    assert len(kept.again(index)) == 0


def test_scores_and_order_are_those_of_numpy(kept):
    vectors, ids = clustered(300), np.random.default_rng(1).permutation(1000)[:300]
    queries = clustered(25, seed=2)
    index = kept.fresh()
    index.add(ids, vectors)
    assert len(index) == 300 and (index.ids() == np.sort(ids)).all()
    wanted, right = best(vectors, ids, queries, 10)
    scores, found = index.search(queries, 10)
    np.testing.assert_allclose(scores, wanted, atol=EXACT)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (found == right).all()
    np.testing.assert_allclose(index.vectors(ids[:50]), vectors[:50], atol=EXACT)
    assert index.vectors(ids[:1]).dtype == np.float32


def test_more_asked_than_there_is(kept):
    vectors, ids = clustered(5), np.array([7, 3, 9, 1, 5])
    index = kept.fresh()
    index.add(ids, vectors)
    scores, found = index.search(vectors[:2], 50)
    assert scores.shape == found.shape == (2, 50)
    assert [sorted(row[:5]) for row in found.tolist()] == [[1, 3, 5, 7, 9]] * 2
    assert (found[:, 5:] == -1).all() and (scores[:, 5:] == -np.inf).all()
    assert found[:, 0].tolist() == [7, 3]


def test_an_id_that_is_there_is_replaced(kept):
    vectors, other = clustered(60), clustered(60, seed=5)
    ids = np.arange(60)
    index = kept.fresh()
    index.add(ids, vectors)
    index.add(ids[10:13], other[10:13])
    assert len(index) == 60
    wanted = np.concatenate([vectors[:10], other[10:13], vectors[13:]])
    np.testing.assert_allclose(index.vectors(ids), wanted, atol=EXACT)
    assert index.search(other[10:13], 1)[1][:, 0].tolist() == [10, 11, 12]
    twice = np.array([4, 4])
    index.add(twice, other[[20, 4]])  # the last one counts
    np.testing.assert_allclose(index.vectors(twice[:1]), other[4:5], atol=EXACT)
    assert len(index) == 60


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_removed_rows_are_not_found(kept, share):
    vectors, ids = clustered(200), np.arange(1000, 1200)
    gone = np.random.default_rng(3).permutation(ids)[: int(200 * share)]
    index = kept.fresh()
    index.add(ids, vectors)
    index.remove(np.append(gone, [5, 99999]))  # two of them unknown
    index.remove(gone)
    left = np.setdiff1d(ids, gone)
    assert len(index) == len(left) and (index.ids() == left).all()
    found = index.search(vectors[:40], 200)[1]
    assert (np.sort(found[:, : len(left)], axis=1) == left).all()
    assert (found[:, len(left) :] == -1).all()
    with pytest.raises(KeyError):
        index.vectors(gone[:1])
    index.add(gone[:2], vectors[gone[:2] - 1000])  # and back again
    assert index.search(vectors[gone[:2] - 1000], 1)[1][:, 0].tolist() == gone[:2].tolist()


def test_everything_removed_and_filled_again(kept):
    vectors, ids = clustered(30), np.arange(30)
    index = kept.fresh()
    index.add(ids, vectors)
    index.remove(ids)
    assert len(index) == 0 and (index.search(vectors[:1], 3)[1] == -1).all()
    index.add(ids, vectors)
    assert (index.search(vectors, 1)[1][:, 0] == ids).all()


def test_saved_and_opened_again(kept):
    vectors, ids = clustered(120), np.arange(120) * 3
    index = kept.fresh()
    index.add(ids, vectors)
    index.remove(ids[:20])
    before = index.search(vectors[:30], 12)
    again = kept.again(index)
    assert len(again) == 100 and again.dim == DIM
    scores, found = again.search(vectors[:30], 12)
    np.testing.assert_allclose(scores, before[0], atol=1e-6)
    assert (found == before[1]).all()
    again.add(ids[:20], vectors[:20])
    again.remove(ids[100:])
    third = kept.again(again)
    assert (third.ids() == ids[:100]).all()
    assert (third.search(vectors[:100], 1)[1][:, 0] == ids[:100]).all()


def test_equal_scores_come_by_lower_id(kept):
    """Forty equal vectors at the cut, added in any order, removed and replaced."""
    vectors = np.repeat(clustered(3), [40, 1, 1], axis=0)
    ids = np.random.default_rng(4).permutation(len(vectors))
    index = kept.fresh()
    for part in np.array_split(np.arange(len(vectors)), 5):
        index.add(ids[part], vectors[part])
    equal = np.sort(ids[:40])
    assert index.search(vectors[:1], 6)[1][0].tolist() == equal[:6].tolist()
    index.remove(equal[:2])
    index.add(equal[2:4], vectors[:2])
    assert index.search(vectors[:1], 6)[1][0].tolist() == equal[2:8].tolist()


def test_rows_that_cannot_be_are_refused(kept):
    vectors, ids = clustered(6), np.arange(6)
    index = kept.fresh()
    index.add(ids, vectors)
    broken = vectors.copy()
    broken[2, 1] = np.nan
    refused = {
        "float64": (ids, vectors.astype(np.float64)),
        "list where float32": (ids, vectors.tolist()),
        "shape (48,)": (ids[:1], vectors[0]),
        "row 2 is not finite": (ids, broken),
        "5 ids for 6 vectors": (ids[:5], vectors),
        "ids: float64": (ids.astype(np.float64), vectors),
        "outside 0": (ids - 1, vectors),
        "shape (6, 1)": (ids[:, None], vectors),
    }
    for words, (keys, values) in refused.items():
        with pytest.raises(DataError) as error:
            index.add(keys, values)
        assert words in str(error.value) and "\n" not in str(error.value)
    for values in (clustered(6, 47), clustered(6, 49)):
        with pytest.raises(MismatchError, match=f"of {DIM}"):
            index.add(ids, values)
        with pytest.raises(MismatchError, match=f"of {DIM}"):
            index.search(values, 1)
    for values in (broken, vectors.astype(np.float16), np.full((1, DIM), np.inf, np.float32)):
        with pytest.raises(DataError):
            index.search(values, 1)
    for k in (0, -1):
        with pytest.raises(ConfigError, match="k = "):
            index.search(vectors, k)
    assert len(index) == 6 and (index.search(vectors, 1)[1][:, 0] == ids).all()
    assert index.search(vectors[:0], 3)[0].shape == (0, 3)


def test_an_index_of_another_dimension_is_not_opened(kept):
    index = kept.fresh()
    index.add(np.arange(3), clustered(3))
    index.save(kept.folder)
    index.close()
    with pytest.raises(MismatchError, match="48 dimensions"):
        open_vectors(kept.place, 64, collection="photos")


def test_searches_in_many_threads_agree(kept):
    vectors = clustered(400)
    index = kept.fresh()
    index.add(np.arange(400), vectors)
    alone = [index.search(vectors[i : i + 2], 5) for i in range(16)]
    found: dict[int, tuple] = {}

    def work(number: int) -> None:
        found[number] = index.search(vectors[number : number + 2], 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[i][1] == alone[i][1]).all() for i in range(16))


# -- FAISS ------------------------------------------------------------------------------------


def test_the_graph_finds_nearly_all_neighbours():
    vectors, queries = clustered(2000, 128), clustered(200, 128, seed=8)
    index = MemoryVectors(128, "hnsw")
    for start in range(0, 2000, 250):  # codes get their range from the first part
        index.add(np.arange(start, start + 250), vectors[start : start + 250])
    right = best(vectors, np.arange(2000), queries, 10)[1]
    found = index.search(queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, right, strict=True)])
    assert recall >= 0.999


@pytest.mark.parametrize("kind", ["codes", "hnsw"])
def test_codes_span_later_vectors_though_the_first_was_alone(kind):
    vectors = clustered(500)
    index = MemoryVectors(DIM, kind)
    index.add(np.array([0]), vectors[:1])
    index.add(np.arange(1, 500), vectors[1:])
    np.testing.assert_allclose(index._store.vectors(np.arange(500)), vectors, atol=0.02)


def test_a_graph_built_anew_keeps_its_codes(caplog):
    vectors = clustered(300)
    index = MemoryVectors(DIM, "hnsw")
    index.add(np.arange(300), vectors)
    before = index._store.vectors(np.arange(150, 300))
    with caplog.at_level(logging.INFO):
        index.remove(np.arange(0, 58))
        assert not caplog.messages and index._store._index.ntotal == 300
        index.remove(np.arange(58, 150))
    assert "anew" in caplog.text and index._store._index.ntotal == 150
    np.testing.assert_allclose(index._store.vectors(np.arange(150)), before, atol=1e-6)
    assert (index.vectors(np.arange(150, 300)) == vectors[150:]).all()
    assert (index.search(vectors[150:], 1)[1][:, 0] == np.arange(150, 300)).all()


@pytest.mark.parametrize("kind", ["flat", "codes"])
def test_a_saved_index_without_a_graph_holds_no_removed_rows(tmp_path, kind):
    index = MemoryVectors(DIM, kind)
    index.add(np.arange(100), clustered(100))
    index.remove(np.arange(10))
    assert len(index._ids) == 100
    assert sorted(index.save(tmp_path)) == sorted(p.name for p in tmp_path.iterdir())
    again = MemoryVectors.load(tmp_path)
    assert len(index._ids) == len(again._ids) == 90
    assert (again.vectors(np.arange(10, 100)) == clustered(100)[10:]).all()


def test_codes_find_what_all_rows_would():
    """Vectors of many near neighbours, which the codes alone put in another order."""
    vectors, queries = clustered(20_000, 128), clustered(100, 128, seed=8)
    index = MemoryVectors(128, "codes", threads=2)
    index.add(np.arange(20_000), vectors)
    scores, right = best(vectors, np.arange(20_000), queries, 10)
    found = index.search(queries, 10)
    assert (found[1] == right).all()
    np.testing.assert_allclose(found[0], scores, atol=EXACT)
    by_code = index._store.search(queries, 10)[1]
    assert (by_code != right).any()


def test_the_product_is_what_onnx_makes():
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    of = onnx.TensorProto
    shapes = {"codes": (of.UINT8, "ND"), "queries": (of.INT8, "DQ"), "scores": (of.INT32, "NQ")}
    values = [
        onnx.helper.make_tensor_value_info(name, kind, list(shape))
        for name, (kind, shape) in shapes.items()
    ]
    node = onnx.helper.make_node("MatMulInteger", ["codes", "queries"], ["scores"])
    graph = onnx.helper.make_graph([node], "scan", values[:2], values[2:])
    opset = [onnx.helper.make_opsetid("", 10)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=5)
    assert model.SerializeToString() == codes.PRODUCT


def test_products_of_codes_are_exact_at_their_extremes():
    """Where processors add pairs of products in 16 bits, larger numbers would overflow."""
    index = MemoryVectors(DIM, "codes")
    vectors = np.repeat(np.array([[1.0], [-1.0]], np.float32), DIM, axis=1) / DIM**0.5
    index.add(np.arange(2), vectors)
    scores, places = index._store.search(vectors, 2)
    step = np.rint(vectors[0, 0] / index._store.scale)
    offset = codes.ZERO * codes.QUERY_FINEST * DIM
    wanted = DIM * codes.QUERY_FINEST * step
    assert places.tolist() == [[0, 1], [1, 0]]
    assert scores[0].tolist() == [offset + wanted, offset - wanted]


def test_a_graph_without_rows_goes_on(tmp_path):
    """As graphs were saved before they had rows."""
    vectors = clustered(300)
    index = MemoryVectors(DIM, "hnsw")
    index._rows = None
    index.add(np.arange(300), vectors)
    index.save(tmp_path)
    again = MemoryVectors.load(tmp_path)
    assert (again.search(vectors, 1)[1][:, 0] == np.arange(300)).all()
    again.add(np.array([300]), clustered(1, seed=5))
    again.remove(np.arange(100))
    np.testing.assert_allclose(again.vectors(np.arange(100, 300)), vectors[100:], atol=0.02)
    assert "rows.npy" not in again.save(tmp_path)


FILES = {
    "flat": ["vectors.json", "vectors.faiss", "vectors.npy"],
    "codes": ["vectors.json", "codes.npy", "vectors.npy", "rows.npy"],
    "hnsw": ["vectors.json", "vectors.faiss", "vectors.npy", "rows.npy"],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in FILES.items() for n in names])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing"])
def test_damaged_files_are_named(tmp_path, kind, name, damage):
    index = MemoryVectors(DIM, kind)
    index.add(np.arange(50), clustered(50))
    assert index.save(tmp_path) == FILES[kind]
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    damaged = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data}
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    with pytest.raises(CorruptError) as error:
        MemoryVectors.load(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_faiss_cannot_read_is_named(tmp_path, monkeypatch):
    """Files whose checksums are right: FAISS of another version wrote them, or a hand did."""
    index = MemoryVectors(DIM)
    index.add(np.arange(5), clustered(5))
    index.save(tmp_path)
    monkeypatch.setattr("crosstill.files.check_digest", lambda *_: None)
    whole = (tmp_path / "vectors.faiss").read_bytes()
    for data in (b"IxZZ" + whole[4:], whole[:-10], whole[:20], b""):
        (tmp_path / "vectors.faiss").write_bytes(data)
        with pytest.raises(CorruptError, match=r"vectors\.faiss: not a flat index"):
            MemoryVectors.load(tmp_path)
    (tmp_path / "vectors.faiss").write_bytes(whole)
    np.save(tmp_path / "vectors.npy", np.arange(4))
    with pytest.raises(CorruptError, match=r"vectors\.faiss: not a flat index of 4 vectors"):
        MemoryVectors.load(tmp_path)


@pytest.mark.parametrize("name", ["codes.npy", "rows.npy"])
def test_arrays_of_another_form_are_named(tmp_path, monkeypatch, name):
    """Files whose checksums are right."""
    index = MemoryVectors(DIM, "codes")
    index.add(np.arange(50), clustered(50))
    index.save(tmp_path)
    monkeypatch.setattr("crosstill.files.check_digest", lambda *_: None)
    whole = np.load(tmp_path / name)
    for array in (whole[:-1], whole[:, 1:], whole[None], whole.astype(np.int16), whole[:0]):
        np.save(tmp_path / name, array)
        with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
            MemoryVectors.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"scale": None}, {"scale": 0.0}, {"scale": -1.0}, {"scale": float("inf")}, {"kind": "hnsw"}],
)
def test_records_that_cannot_be_are_refused(tmp_path, changes):
    index = MemoryVectors(DIM, "codes")
    index.add(np.arange(50), clustered(50))
    index.save(tmp_path)
    record = files.read_json(tmp_path / "vectors.json") | changes
    files.write_json(tmp_path / "vectors.json", files.sealed(record))
    with pytest.raises(CorruptError) as error:
        MemoryVectors.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    index = MemoryVectors(DIM)
    index.add(np.arange(5), clustered(5))
    index.save(tmp_path)
    index.add(np.arange(5, 9), clustered(4))

    def full(store, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faiss_stores.Flat, "write", full)
    with pytest.raises(DiskFullError, match=r"vectors\.faiss: No space left on device"):
        index.save(tmp_path)
    assert len(MemoryVectors.load(tmp_path)) == 5


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / os.fsdecode(b"od\xff d \xe2\x82\xac")
    folder.mkdir()
    index = MemoryVectors(DIM)
    index.add(np.arange(5), clustered(5))
    index.save(folder)
    assert len(MemoryVectors.load(folder)) == 5


def test_threads_of_others_are_left_alone():
    import faiss

    index = MemoryVectors(DIM, threads=1)
    faiss.omp_set_num_threads(3)
    try:
        seen = []
        index._store._index = Spy(
            index._store._index, lambda: seen.append(faiss.omp_get_max_threads())
        )
        index.add(np.arange(5), clustered(5))
        index.search(clustered(2), 1)
        assert seen == [1, 1] and faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(1)


class Spy:
    """An object that calls back before each of its methods `add` and `search`."""

    def __init__(self, inner, call) -> None:
        self._inner, self._call = inner, call

    def __getattr__(self, name):
        if name in ("add", "search"):
            self._call()
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    ("kind", "dim", "threads"), [("ivf", 4, 1), ("flat", 0, 1), ("hnsw", 4, 0)]
)
def test_settings_that_cannot_work(kind, dim, threads):
    with pytest.raises(ConfigError):
        MemoryVectors(dim, kind, threads)


@pytest.mark.parametrize("kind", vector_index.KINDS)
def test_the_estimate_is_what_it_takes(tmp_path, kind):
    index = MemoryVectors(128, kind)
    index.add(np.arange(2000), clustered(2000, 128))
    index.save(tmp_path)
    places = [index._rows._at] if index._rows else []
    ours = sum(a.nbytes for a in (index._ids, index._sorted, index._sorted_places, *places))
    taken = (tmp_path / FILES[kind][1]).stat().st_size + ours
    assert estimate_bytes(2000, 128, kind) == pytest.approx(taken, rel=0.03)


def test_kinds_by_size():
    assert (kind_for(1), kind_for(5_000), kind_for(5_001)) == ("flat", "flat", "codes")
    assert (kind_for(400_000), kind_for(400_001)) == ("codes", "hnsw")
    assert estimate_bytes(10**6, 512, "hnsw") < estimate_bytes(10**6, 512, "flat") / 2
    assert estimate_bytes(10, 512, "milvus") == 10 * 2056
    with pytest.raises(ConfigError, match="hnsw"):
        estimate_bytes(10, 512, "hsnw")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("faiss", r"faiss; .*crosstill\[search\]"),
        ("pymilvus", r"pymilvus; .*crosstill\[milvus\]"),
        ("milvus_lite", r"milvus_lite; .*crosstill\[milvus\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=words):
        if missing == "faiss":
            MemoryVectors(4)
        else:
            MilvusVectors(str(tmp_path / "a.db"), "photos", 4)


def test_neither_library_comes_with_the_module():
    heavy = {"faiss", "pymilvus", "grpc", "torch", "pyarrow"}
    code = f"import sys, crosstill.search.vector_index; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- Milvus -----------------------------------------------------------------------------------


@pytest.fixture
def lite(tmp_path):
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    return str(tmp_path / "lite.db")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://root:secret@127.0.0.1:9", "127.0.0.1:9 does not answer"),
        ("http://no.such.host.invalid:19530", "does not answer"),
        ("http://[bad", "not an address"),
        ("http://host:port", "not an address"),
        ("ftp://host", "no Milvus"),
        ("/no/such/folder/a.db", "no such folder"),
    ],
)
def test_a_milvus_that_is_not_there(uri, words):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    with pytest.raises(ConfigError) as error:
        MilvusVectors(uri, "photos", 4, token="root:secret")
    message = str(error.value)
    assert words in message and "secret" not in message and "\n" not in message


def test_a_file_that_is_no_milvus(lite, capfd):
    Path(lite).write_bytes(b"SQLite format 3")
    with pytest.raises(ConfigError, match="not a Milvus Lite file"):
        MilvusVectors(lite, "photos", 4)
    assert "Traceback" not in capfd.readouterr().err


def test_collections_that_are_not_ours(lite):
    MilvusVectors(lite, "first", 4).close()
    from pymilvus import MilvusClient

    client = MilvusClient(lite, dedicated=True)
    client.create_collection("cosine", dimension=4, metric_type="COSINE")
    client.create_collection("named", dimension=4, metric_type="IP", vector_field_name="other")
    client.close()
    for name, words in {"cosine": "by COSINE", "named": "fields id, other"}.items():
        with pytest.raises(MismatchError, match=words):
            MilvusVectors(lite, name, 4)
    for name in ("no name", "", "1st", "é", "a" * 256):
        with pytest.raises(ConfigError, match="only letters"):
            MilvusVectors(lite, name, 4)


def test_a_collection_half_made_is_finished(lite):
    index = MilvusVectors(lite, "photos", DIM)
    index._client.release_collection("photos")
    index._client.drop_index("photos", "vector")
    index.close()
    again = MilvusVectors(lite, "photos", DIM)
    again.add(np.arange(5), clustered(5))
    assert (again.search(clustered(5), 1)[1][:, 0] == np.arange(5)).all()
    again.close()


def test_what_milvus_says_is_one_line(lite):
    index = MilvusVectors(lite, "photos", DIM)
    index._client.drop_collection("photos")
    for call in (lambda: index.search(clustered(1), 1), lambda: index.ids(), lambda: len(index)):
        with pytest.raises(RunError) as error:
            call()
        assert "photos" in str(error.value) and "\n" not in str(error.value)
    index.close()


def test_two_indexes_share_a_file_until_both_are_closed(lite):
    first, second = (MilvusVectors(lite, "photos", DIM) for _ in range(2))
    first.add(np.arange(5), clustered(5))
    assert len(second) == 5  # at once: what was added is seen
    first.close()
    first.close()
    assert (second.search(clustered(5), 1)[1][:, 0] == np.arange(5)).all()
    with pytest.raises(RunError, match="closed"):
        first.search(clustered(5), 1)
    assert milvus_vectors._held(Path(lite) / "LOCK")
    second.close()
    assert not milvus_vectors._held(Path(lite) / "LOCK")


def test_a_file_that_another_process_uses(lite, capfd):
    MilvusVectors(lite, "photos", DIM).close()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print(flush=True); time.sleep(60)"
    )
    holds = [sys.executable, "-c", code, f"{lite}/LOCK"]
    other = subprocess.Popen(holds, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(LockedError, match="another process"):
            MilvusVectors(lite, "photos", DIM)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert "Traceback" not in capfd.readouterr().err


def test_rows_go_in_messages_of_a_bounded_size(lite, monkeypatch):
    monkeypatch.setattr(milvus_vectors, "MESSAGE", 4 * DIM * 7)
    monkeypatch.setattr(milvus_vectors, "IDS", 11)
    vectors, ids = clustered(40), np.arange(40)
    index = MilvusVectors(lite, "photos", DIM)
    sizes: list[int] = []
    send = index._client.upsert
    monkeypatch.setattr(
        index._client,
        "upsert",
        lambda name, data, **rest: (sizes.append(len(data)), send(name, data, **rest)),
    )
    index.add(ids, vectors)
    assert sizes == [7, 7, 7, 7, 7, 5]
    assert (index.search(vectors, 1)[1][:, 0] == ids).all()
    np.testing.assert_allclose(index.vectors(ids[::-1]), vectors[::-1], atol=1e-6)
    index.remove(ids[:30])
    assert index.ids().tolist() == list(range(30, 40))
    index.close()


def test_more_than_milvus_finds_is_refused(lite):
    index = MilvusVectors(lite, "photos", DIM)
    with pytest.raises(ConfigError, match="16384"):
        index.search(clustered(1), 16385)
    index.close()
