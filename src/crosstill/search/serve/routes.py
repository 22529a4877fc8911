"""The application: JSON routes, health, photos and the page under one roof."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from crosstill import files
from crosstill.errors import ConfigError, CorruptError, ImageError, printable
from crosstill.search.searcher import MAX_TOP, Hit, Searcher
from crosstill.search.serve import limits, load, photo_store, search_page
from crosstill.search.serve.service import NoSuchPhotoError, SearchResult, Service

# what an asker is told of; the rest stays in the server's log
STATUS: dict[type, int] = {
    ConfigError: 400,
    ImageError: 400,
    ClientDisconnect: 400,  # no one reads it
    NoSuchPhotoError: 404,
    load.Overloaded: 503,
}


class Json(JSONResponse):
    """JSON in ASCII without <, > and &, which no reader can take for HTML."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, allow_nan=False)
        for character in "<>&":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return text.encode()


class Result(BaseModel):
    """A photo that was found."""

    id: str = Field(description="SHA-256 of the photo's bytes.")
    score: float = Field(description="Cosine with the query.")
    path: str = Field(description="Relative to the folder of the photos.")
    caption: str
    image: str = Field(description="Address of the photo, relative to this answer's.")
    thumbnail: str = Field(description="Address of a small JPEG, likewise.")


class Answer(BaseModel):
    """The answer to a search; the best result is the first."""

    query: str
    results: list[Result]
    took_ms: float
    generation: int = Field(description="Of the index.")
    threshold: float | None = Field(description="Least score that was asked for.")
    nothing_relevant: bool = Field(description="No photo reached the threshold.")
    notes: list[str] = Field(description="What of the words the model cannot use, a sentence each.")


class Error(BaseModel):
    """What went wrong, in one sentence."""

    error: str


class App(FastAPI):
    """FastAPI with `Guard` around everything, its own error pages included."""

    service: Service
    metrics: load.Metrics

    def build_middleware_stack(self) -> ASGIApp:
        return limits.Guard(super().build_middleware_stack(), self.service.settings, self.metrics)


Top = Annotated[int | None, Query(ge=1, le=MAX_TOP, description="Results at most.")]
Least = Annotated[
    float | Literal["auto"] | None,
    Query(description="Least score, -1 to 1; `auto`, for words: what the index was calibrated to."),
]
Words = Annotated[str | None, Query(description="What the photo shows.")]
Like = Annotated[str | None, Query(description="Id of a photo of the index.")]


def create(searcher: Searcher, settings: limits.Settings) -> App:
    """Make the application that answers for an index; `server.run` listens for it."""
    metrics = load.Metrics(searcher)
    service = Service(searcher, settings, metrics)
    store = photo_store.Store(searcher, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:  # also where a second Ctrl-C cuts it short
            service.close()
            store.close()

    app = App(
        title="crosstill",
        version=files.VERSION,
        description="Search a folder of photos by words or by a photo.",
        docs_url=None,  # both load scripts from other hosts
        redoc_url=None,
        servers=[{"url": "."}],  # beside the description, under whatever path a proxy has put it
        redirect_slashes=False,  # it would repeat the asker's Host header
        default_response_class=Json,
        lifespan=lifespan,
        responses={"4XX": {"model": Error}, "5XX": {"model": Error}},
    )
    app.service, app.metrics = service, metrics
    # on the application itself: a router within it costs time in every request
    _add_search(app)
    _add_health(app)
    app.include_router(photo_store.router(store))
    app.include_router(search_page.router(service))
    _handle_errors(app)
    return app


def _add_search(app: App) -> None:
    service = app.service

    @app.get("/search", response_model=Answer, tags=["search"])
    async def by_words(
        q: Words = None, like: Like = None, top: Top = None, threshold: Least = None
    ) -> Response:
        """Photos that fit the words `q`, or that are like one of the index, or both."""
        if like is not None:
            return _answer(await service.like(like, q or "", top, threshold))
        if q is None:
            raise ConfigError("q: missing; say what the photo shows, or give like=ID")
        return _answer(await service.text(q, top, threshold))

    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {photo_store.FIELD: binary, "q": {"type": "string"}}}
    kinds = {"multipart/form-data": {"schema": form}, "image/*": {"schema": binary}}
    body = {"requestBody": {"required": True, "content": kinds}}

    @app.post("/search", response_model=Answer, tags=["search"], openapi_extra=body)
    async def by_photo(
        request: Request, q: Words = None, top: Top = None, threshold: Least = None
    ) -> Response:
        """Photos like the one in the body, and that fit the words `q` where they are given."""
        upload = await photo_store.read_upload(request, service.settings.body)
        for name in upload.fields.keys() - {"q"}:
            raise HTTPException(
                400, f"form: the part {name!r} is not known; top and threshold go into the address"
            )
        if not upload.photo:
            raise HTTPException(400, f"no photo; send it as a form's part {photo_store.FIELD!r}")
        words = q or upload.fields.get("q", "")
        return _answer(await service.photo(upload.photo, words, top, threshold))


def _add_health(app: App) -> None:
    service = app.service

    @app.get("/healthz", tags=["health"])
    async def healthz() -> Response:
        """200 as long as the server lives."""
        return Json({"status": "alive"})

    @app.get("/readyz", tags=["health"])
    async def readyz() -> Response:
        """200 once both towers are warm and while a search succeeds; else 503, which says why."""
        if fault := await service.fault():
            raise load.Overloaded(fault)
        return Json({"status": "ready", "generation": service.searcher.generation})

    @app.get("/metrics", response_class=Response, tags=["health"])
    async def metrics() -> Response:
        """Counters in Prometheus's text form."""
        return Response(service.metrics.text(), media_type=load.TYPE)


def _answer(result: SearchResult) -> Response:
    return Json(
        {
            "query": result.query,
            "results": [_result(hit) for hit in result.hits],
            "took_ms": round(result.took, 3),
            "generation": result.generation,
            "threshold": result.threshold,
            "nothing_relevant": result.nothing_relevant,
            "notes": result.notes,
        }
    )


def _result(hit: Hit) -> dict[str, object]:
    return {
        "id": hit.id,
        "score": round(hit.score, 6),
        "path": hit.path if hit.path.isprintable() else printable(hit.path),
        "caption": hit.caption,
        "image": f"images/{hit.id}",
        "thumbnail": f"thumbnails/{hit.id}",
    }


def _handle_errors(app: App) -> None:
    """Answer every error in one form, without anything that is the server's alone."""

    async def known(request: Request, error: Exception) -> Response:
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        retry = {"retry-after": str(app.service.settings.retry)} if status == 503 else None
        return Json({"error": str(error)}, status, retry)

    async def damaged(request: Request, error: Any) -> Response:
        retry = {"retry-after": str(app.service.settings.retry)}
        return Json({"error": app.service.damage(error)}, 503, retry)

    async def http(request: Request, error: Any) -> Response:
        return Json({"error": str(error.detail).lower()}, error.status_code, error.headers)

    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return Json({"error": f"{first['loc'][1]}: {first['msg']}"}, 422)

    async def broken(request: Request, error: Exception) -> Response:
        return Json({"error": "something went wrong here; the server's log says what"}, 500)

    for kind in STATUS:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(CorruptError, damaged)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)
