"""The search page: HTML made here, and the three files that it loads.

Everything works with forms and links alone; `static/page.js` adds drop, paste, preview and keys.
All addresses are relative, so that the page also works under a path of a proxy.
"""

from __future__ import annotations

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
from crosstill.search.serve import uploads
from crosstill.search.serve.batching import Overloaded
from crosstill.search.serve.service import AUTO, Found, NoSuchPhotoError, Service

TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
FIRST, MOST = 24, 200  # results on a first page, and on the longest
UPLOADED = 48  # results for a photo: a page asked for by POST has no link to a longer one


@dataclass(frozen=True)
class Asked:
    """What was asked for, and how.

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
        """The address that asks this, with some of it changed."""
        asked = replace(self, **changes)  # type: ignore[arg-type]
        said = {
            "q": asked.q,
            "like": asked.like,
            "relevant": "1" if asked.relevant else "",
            "top": str(asked.top) if asked.top != FIRST else "",
        }
        return "./?" + urlencode({name: value for name, value in said.items() if value})


@dataclass(frozen=True)
class Holding:
    """What the page says about the index and the server.

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
    """The files beside the template: read once, and only these, whatever is asked for."""

    def __init__(self) -> None:
        folder = files("crosstill.search.serve") / "static"
        self.files = {name: (folder / name).read_bytes() for name in TYPES}

    def address(self, name: str) -> str:
        """Where a file is for as long as it is what it is now."""
        return f"static/{name}?v={self._mark(name)}"

    def answer(self, name: str, mark: str) -> Response:
        """The file; for a year, to who asked for this very content."""
        if name not in self.files:
            raise HTTPException(404, "not found")
        kept = "public, max-age=31536000, immutable" if mark == self._mark(name) else "no-cache"
        return Response(self.files[name], 200, {"cache-control": kept}, TYPES[name])

    def _mark(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()[:16]


class Page:
    """The template, and all that it is ever filled with."""

    def __init__(self) -> None:
        self.statics = Statics()
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["static"] = self.statics.address
        source = files("crosstill.search.serve") / "templates" / "page.html"
        self._template = environment.from_string(source.read_text(encoding="utf-8"))

    def first(self, holding: Holding) -> str:
        """Before anything was asked."""
        heading = f"Search {counted(holding.photos)}" if holding.photos else "No photos yet"
        return self._filled(Asked(), holding, heading, first=True)

    def answer(self, asked: Asked, found: Found, holding: Holding) -> str:
        """The results, or that there is nothing relevant."""
        cut = len(found.hits) == asked.top < min(MOST, holding.photos) and not asked.uploaded
        longer = asked.link(top=min(2 * asked.top, MOST)) + f"#r{asked.top + 1}"
        return self._filled(
            asked,
            holding,
            _heading(asked),
            count=_count(asked, found, holding),
            results=[_shown(hit) for hit in found.hits],
            more=longer if cut else "",
            bar=found.threshold,
            notes=[_sentence(note) for note in found.notes],
            anyway=asked.link(relevant=False) if asked.relevant else "",
        )

    def error(self, asked: Asked, sentence: str, again: bool, holding: Holding) -> str:
        """One sentence about what went wrong; the box keeps the words."""
        link = asked.link() if again and not asked.uploaded else ""
        return self._filled(asked, holding, "That did not work", error=sentence, again=link)

    def _filled(self, asked: Asked, holding: Holding, heading: str, **more: Any) -> str:
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
                "asked": replace(asked, q=clean(asked.q), like=clean(asked.like)),
                "holding": holding,
                "heading": clean(heading),
                "photos": counted(holding.photos),
                "photo_field": uploads.FIELD,
            }
        )


def counted(photos: int) -> str:
    """A number of photos, in words.

    >>> counted(8091)
    '8,091 photos'
    """
    return f"{photos:,} photo{'' if photos == 1 else 's'}"


def clean(text: str) -> str:
    """What a page can hold of a text, on one line: the rest is no character of HTML."""
    line = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", line)


def shortened(text: str, head: int, most: int = 48) -> str:
    """A long name without its middle: so many characters of its head, and its tail.

    >>> shortened("a/very/long/folder/", 0, most=10)
    '…g/folder/'
    """
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"


def router(service: Service) -> APIRouter:
    """The page's routes: `/`, asked by words, by a photo or by a photo's id, and its files."""
    page, routes = Page(), APIRouter(include_in_schema=False)

    @routes.get("/")
    @routes.post("/")
    async def ask(request: Request) -> Response:
        """Whatever happens is said on a page."""
        holding, asked = await _holding(service), Asked()
        status, headers = 200, {"cache-control": "private, no-cache"}
        try:
            asked, photo = await _read(request, holding)
            found = await _search(service, asked, photo)
            text = page.answer(asked, found, holding) if found else page.first(holding)
        except (HTTPException, InputError, Overloaded) as error:
            status, sentence = _refused(error, holding)
            text = page.error(asked, sentence, status == 503, holding)
            if status == 503:
                headers["retry-after"] = str(service.settings.retry)
        return Response(text, status, headers, "text/html; charset=utf-8")

    @routes.get("/static/{name}")
    async def static(name: str, v: str = "") -> Response:
        return page.statics.answer(name, v)

    return routes


async def _holding(service: Service) -> Holding:
    searcher, settings = service.searcher, service.settings
    return Holding(
        photos=len(searcher),
        generation=searcher.generation,
        model=searcher.bundle.name,
        # where the server has a bound of its own, it holds here too, and is not the asker's choice
        bar=await service.calibrated() if settings.threshold is None else None,
        limit=settings.body,
        longest=settings.text,
    )


async def _read(request: Request, holding: Holding) -> tuple[Asked, bytes | None]:
    """What is asked for, and the photo that came with it."""
    if request.method == "POST":
        form = await uploads.read(request, holding.limit)
        asked = _asked(form.fields, holding)
        return replace(asked, like="", uploaded=True, top=UPLOADED), form.photo
    return _asked(request.query_params, holding), None


def _asked(fields: Mapping[str, str], holding: Holding) -> Asked:
    top = fields.get("top", str(FIRST))
    if not (top.isascii() and top.isdigit() and 1 <= int(top[:9]) <= MOST):
        raise ConfigError(f"top: {top[:20]} is not possible; 1 to {MOST}")
    return Asked(
        q=fields.get("q", "").strip(),
        like=fields.get("like", ""),
        relevant=fields.get("relevant") == "1" and holding.bar is not None,
        top=int(top),
    )


async def _search(service: Service, asked: Asked, photo: bytes | None) -> Found | None:
    if photo is not None:
        if not photo:
            raise ConfigError("no photo was sent; choose one first")
        return await service.photo(photo, asked.q, asked.top)
    if asked.like:
        return await service.like(asked.like, asked.q, asked.top)
    if asked.q:
        return await service.text(asked.q, asked.top, AUTO if asked.relevant else None)
    return None


def _refused(error: Exception, holding: Holding) -> tuple[int, str]:
    """The status, and what went wrong in one sentence."""
    if isinstance(error, HTTPException):
        status, text = error.status_code, str(error.detail)
        if status == 413:
            text = f"this photo is too large: at most {holding.limit // 10**6} MB can be sent"
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


def _heading(asked: Asked) -> str:
    words = f"“{asked.q}”"
    if not asked.uploaded and not asked.like:
        return words
    kind = "Photos like yours" if asked.uploaded else "Photos like this one"
    return f"{kind}, with {words}" if asked.q else kind


def _count(asked: Asked, found: Found, holding: Holding) -> str:
    if found.nothing_relevant:
        return "Nothing relevant found"
    if not found.hits:
        return "No photos found"
    bounded = found.threshold is not None and len(found.hits) < asked.top
    kind = "relevant" if bounded else "closest"
    return f"{len(found.hits)} {kind} of {counted(holding.photos)}"


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
