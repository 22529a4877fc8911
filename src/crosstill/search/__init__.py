"""Search: index a folder of photos with a bundle, find photos in it, serve it over HTTP.

bundle ─ build ─► index folder ─ Searcher ─► hits ─ serve ─► page and JSON

scan            photos of a folder, read and decoded
index_builder   what has changed → encoded → published
builder_memory  work.sqlite: contents and vectors known from earlier runs
index_folder    index.json and the generation of files that it names; verification of both
index_writer    one generation after another
catalogue       photos.sqlite: the photos of a generation
vector_index    their vectors: `milvus_vectors`, or
memory_vectors  by `codes` or `faiss_stores`, with exact `rows`
searcher        queries in, photos out
serve/          HTTP service and search page
"""

from crosstill.search.index_builder import Built, build
from crosstill.search.index_folder import Verdict, verify
from crosstill.search.searcher import MAX_TOP, Hit, Photo, Searcher, combine

__all__ = [
    "MAX_TOP",
    "Built",
    "Hit",
    "Photo",
    "Searcher",
    "Verdict",
    "build",
    "combine",
    "verify",
]
