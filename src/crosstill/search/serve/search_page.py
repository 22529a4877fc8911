"""The search page: its HTML, and the three files that it loads.

Everything works with forms and links alone; `static/page.js` adds drop, paste, preview and keys.
All addresses are relative, so that the page also works under a path of a proxy.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

import jinja2
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from crosstill.errors import ConfigError, ImageError, InputError, printable
from crosstill.search.searcher import Hit
from crosstill.search.serve import photo_store
from crosstill.search.serve.load import Overloaded
from crosstill.search.serve.service import AUTO, NoSuchPhotoError, SearchResult, Service

TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
FIRST, MOST = 24, 200  # results on a first page, and on the longest
UPLOADED = 48  # results for a photo: a page asked for by POST has no link to a longer one


@dataclass(frozen=True)
class SearchParams:
    """The parameters of a search on the page.

    Attributes:
        q: the words.
        like: id of a photo in the index, or "".
        uploaded: a photo came with the request.
        relevant: leave out what the index's calibrated threshold calls irrelevant.
        top: how many results at most.
    """

    q: str = ""
    like: str = ""
    uploaded: bool = False
    relevant: bool = False
    top: int = FIRST

    def link(self, **changes: object) -> str:
        """Return the address of this search, with some parameters changed."""
        params = replace(self, **changes)  # type: ignore[arg-type]
        query = {
            "q": params.q,
            "like": params.like,
            "relevant": "1" if params.relevant else "",
            "top": str(params.top) if params.top != FIRST else "",
        }
        return "./?" + urlencode({name: value for name, value in query.items() if value})


@dataclass(frozen=True)
class PageContext:
    """Facts of the index and the server that the page shows.

    Attributes:
        photos: how many there are.
        generation: of the index.
        model: the student's name.
        bar: score under which a photo is irrelevant to words; None where that is not offered.
        limit: bytes of a request's body.
        longest: characters of a query.
    """

    photos: int
    generation: int
    model: str
    bar: float | None
    limit: int
    longest: int


class Statics:
    """The files beside the template: read once, and no others are sent."""

    def __init__(self) -> None:
        folder = files("crosstill.search.serve") / "static"
        self.files = {name: (folder / name).read_bytes() for name in TYPES}

    def address(self, name: str) -> str:
        """Return the address of a file's present content."""
        return f"static/{name}?v={self._mark(name)}"

    def answer(self, name: str, mark: str) -> Response:
        """Send a file; for a year where its present content was asked for."""
        if name not in self.files:
            raise HTTPException(404, "not found")
        kept = "public, max-age=31536000, immutable" if mark == self._mark(name) else "no-cache"
        return Response(self.files[name], 200, {"cache-control": kept}, TYPES[name])

    def _mark(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()[:16]


class Page:
    """Renders the template."""

    def __init__(self) -> None:
        self.statics = Statics()
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["static"] = self.statics.address
        source = files("crosstill.search.serve") / "templates" / "page.html"
        self._template = environment.from_string(source.read_text(encoding="utf-8"))

    def first(self, context: PageContext) -> str:
        """Render the page before a search."""
        heading = f"Search {counted(context.photos)}" if context.photos else "No photos yet"
        return self._filled(SearchParams(), context, heading, first=True)

    def answer(self, params: SearchParams, result: SearchResult, context: PageContext) -> str:
        """Render the results, or that there is nothing relevant."""
        cut = len(result.hits) == params.top < min(MOST, context.photos) and not params.uploaded
        longer = params.link(top=min(2 * params.top, MOST)) + f"#r{params.top + 1}"
        return self._filled(
            params,
            context,
            _heading(params),
            count=_count(params, result, context),
            results=[_shown(hit) for hit in result.hits],
            more=longer if cut else "",
            bar=result.threshold,
            notes=[_sentence(note) for note in result.notes],
            anyway=params.link(relevant=False) if params.relevant else "",
        )

    def error(self, params: SearchParams, sentence: str, again: bool, context: PageContext) -> str:
        """Render an error in one sentence; the box keeps the words."""
        link = params.link() if again and not params.uploaded else ""
        return self._filled(params, context, "That did not work", error=sentence, again=link)

    def _filled(self, params: SearchParams, context: PageContext, heading: str, **more: Any) -> str:
        blank = dict(
            error="",
            again="",
            first=False,
            count="",
            results=(),
            more="",
            bar=None,
            anyway="",
            notes=(),
        )
        return self._template.render(
            {
                **blank,
                **more,
                "params": replace(params, q=clean(params.q), like=clean(params.like)),
                "context": context,
                "heading": clean(heading),
                "photos": counted(context.photos),
                "photo_field": photo_store.FIELD,
            }
        )


def counted(photos: int) -> str:
    """Format a number of photos.

    >>> counted(8091)
    '8,091 photos'
    """
    return f"{photos:,} photo{'' if photos == 1 else 's'}"


def clean(text: str) -> str:
    """Put a text on one line, with characters that HTML does not have replaced."""
    line = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", line)


def shortened(text: str, head: int, most: int = 48) -> str:
    """Shorten a long name to so many characters of its head, and its tail.

    >>> shortened("a/very/long/folder/", 0, most=10)
    '…g/folder/'
    """
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"


def router(service: Service) -> APIRouter:
    """Make the page's routes: `/`, for words, a photo or a photo's id, and its files."""
    page, routes = Page(), APIRouter(include_in_schema=False)

    @routes.get("/")
    @routes.post("/")
    async def ask(request: Request) -> Response:
        """Answer a search, or an error, with a page."""
        context, params = await _context(service), SearchParams()
        status, headers = 200, {"cache-control": "private, no-cache"}
        try:
            params, photo = await _read(request, context)
            result = await _search(service, params, photo)
            text = page.answer(params, result, context) if result else page.first(context)
        except (HTTPException, InputError, Overloaded) as error:
            status, sentence = _refused(error, context)
            text = page.error(params, sentence, status == 503, context)
            if status == 503:
                headers["retry-after"] = str(service.settings.retry)
        return Response(text, status, headers, "text/html; charset=utf-8")

    @routes.get("/static/{name}")
    async def static(name: str, v: str = "") -> Response:
        return page.statics.answer(name, v)

    return routes


async def _context(service: Service) -> PageContext:
    searcher, settings = service.searcher, service.settings
    return PageContext(
        photos=len(searcher),
        generation=searcher.generation,
        model=searcher.bundle.name,
        # where the server has a bound of its own, it holds here too, and is not the asker's choice
        bar=await service.calibrated() if settings.threshold is None else None,
        limit=settings.body,
        longest=settings.text,
    )


async def _read(request: Request, context: PageContext) -> tuple[SearchParams, bytes | None]:
    """Read the parameters of a request, and the photo that came with it."""
    if request.method == "POST":
        form = await photo_store.read_upload(request, context.limit)
        params = _params(form.fields, context)
        return replace(params, like="", uploaded=True, top=UPLOADED), form.photo
    return _params(request.query_params, context), None


def _params(fields: Mapping[str, str], context: PageContext) -> SearchParams:
    top = fields.get("top", str(FIRST))
    if not (top.isascii() and top.isdigit() and 1 <= int(top[:9]) <= MOST):
        raise ConfigError(f"top: {top[:20]} is not possible; 1 to {MOST}")
    return SearchParams(
        q=fields.get("q", "").strip(),
        like=fields.get("like", ""),
        relevant=fields.get("relevant") == "1" and context.bar is not None,
        top=int(top),
    )


async def _search(
    service: Service, params: SearchParams, photo: bytes | None
) -> SearchResult | None:
    if photo is not None:
        if not photo:
            raise ConfigError("no photo was sent; choose one first")
        return await service.photo(photo, params.q, params.top)
    if params.like:
        return await service.like(params.like, params.q, params.top)
    if params.q:
        return await service.text(params.q, params.top, AUTO if params.relevant else None)
    return None


def _refused(error: Exception, context: PageContext) -> tuple[int, str]:
    """Return the status and the sentence of an error."""
    if isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
        if status == 413:
            text = f"this photo is too large: at most {context.limit // 10**6} MB can be sent"
    elif isinstance(error, Overloaded):
        status, text = 503, str(error)
    elif isinstance(error, NoSuchPhotoError):
        status, text = 404, str(error)
    elif isinstance(error, ImageError):
        status, text = 400, f"this file cannot be read as a photo: {error.reason}"
    else:
        status, text = 400, str(error)
    return status, _sentence(text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _heading(params: SearchParams) -> str:
    words = f"“{params.q}”"
    if not params.uploaded and not params.like:
        return words
    kind = "Photos like yours" if params.uploaded else "Photos like this one"
    return f"{kind}, with {words}" if params.q else kind


def _count(params: SearchParams, result: SearchResult, context: PageContext) -> str:
    if result.nothing_relevant:
        return "Nothing relevant found"
    if not result.hits:
        return "No photos found"
    bounded = result.threshold is not None and len(result.hits) < params.top
    kind = "relevant" if bounded else "closest"
    return f"{len(result.hits)} {kind} of {counted(context.photos)}"


def _shown(hit: Hit) -> dict[str, Any]:
    path, caption = printable(hit.path), clean(hit.caption)
    folder, slash, name = path.rpartition("/")
    name = shortened(name, 24)
    return {
        "id": hit.id,
        "path": path,
        "folder": shortened(folder + slash, 0),
        "name": name,
        "pieces": re.findall(".[^_.-]*", name),  # a long name breaks between them
        "caption": caption,
        "alt": caption or name,
        "score": f"{hit.score:.3f}",
    }
