"""Receive the photo of a search, and send the photos of an index and their thumbnails, by id alone.

An id is the SHA-256 of a photo's bytes: what is sent is read once, hashed, and only then sent,
so that whatever lies at the photo's path by now, nothing else gets out. What is received
stays in memory.
"""

import hashlib
import io
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException, Request, Response
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Receive, Scope, Send

from crosstill import pixels
from crosstill.errors import ImageError
from crosstill.search import scan
from crosstill.search.searcher import Searcher
from crosstill.search.serve.limits import Settings
from crosstill.search.serve.load import Gate, jobs

TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "PPM": "image/x-portable-anymap",
}
ID = re.compile("[0-9a-f]{64}")
KEPT = "private, max-age=31536000, immutable"  # another content has another id
POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"
FIELD = "image"
_FIELDS, _FIELD_SIZE = 16, 64 * 1024
T = TypeVar("T")
_CHUNK, _QUALITY = 64 * 1024, 82


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its media type."""

    data: bytes
    type: str


class Store:
    """Reads photos and makes thumbnails in a few threads, and keeps some thumbnails."""

    def __init__(self, searcher: Searcher, settings: Settings) -> None:
        self.searcher, self.settings = searcher, settings
        self.sending = Gate(settings.photos)
        self._gate = Gate(settings.photo_queue)
        self._workers = jobs(settings.photo_workers)
        self._kept: OrderedDict[str, Picture] = OrderedDict()
        self._size = 0

    async def photo(self, photo_id: str) -> Picture | None:
        """Read a photo; None where there is none with that id, or no longer."""
        return await self._work(self._photo, photo_id)

    async def holds(self, photo_id: str) -> bool:
        """Tell whether the index has a photo with that id."""
        return await self._work(self.searcher.photo, photo_id) is not None

    async def thumbnail(self, photo_id: str) -> Picture | None:
        """Make a small upright JPEG of a photo, or take the one in memory."""
        if photo_id in self._kept:
            self._kept.move_to_end(photo_id)
            return self._kept[photo_id]
        picture = await self._work(self._thumbnail, photo_id)
        if picture is not None and photo_id not in self._kept:
            self._keep(photo_id, picture)
        return picture

    def close(self) -> None:
        """Shut down the threads."""
        self._workers.close()

    async def _work(self, job: Callable[[str], T], photo_id: str) -> T:
        with self._gate.enter():
            answer: T = await self._workers(partial(job, photo_id))
            return answer

    def _keep(self, photo_id: str, picture: Picture) -> None:
        self._kept[photo_id] = picture
        self._size += len(picture.data)
        while self._size > self.settings.thumbnails:
            _, oldest = self._kept.popitem(last=False)
            self._size -= len(oldest.data)

    def _photo(self, photo_id: str) -> Picture | None:
        data = self._bytes(photo_id, self.settings.photo_size)
        kind = data and _type(data)
        return Picture(data, kind) if data and kind else None

    def _thumbnail(self, photo_id: str) -> Picture | None:
        data = self._bytes(photo_id, None)
        if data is None:
            return None
        side = self.settings.thumbnail
        try:
            with pixels.upright(data, photo_id) as upright:
                image = Image.fromarray(upright[..., :3])
                image.thumbnail((side, side), Image.Resampling.BICUBIC)
        except ImageError:
            return None
        out = io.BytesIO()
        image.save(out, "JPEG", quality=_QUALITY)
        return Picture(out.getvalue(), TYPES["JPEG"])

    def _bytes(self, photo_id: str, limit: int | None) -> bytes | None:
        photo = self.searcher.photo(photo_id)
        if photo is None or (limit is not None and photo.size > limit):
            return None
        try:
            if photo.path.stat().st_size != photo.size:
                return None
            data = scan.read_photo(photo.path.parent, photo.path.name)
        except (OSError, ImageError):
            return None
        return data if hashlib.sha256(data).hexdigest() == photo_id else None


class Sent(Response):
    """A response that sends a picture in pieces, and is counted while a slow reader takes them."""

    def __init__(self, picture: Picture, sending: Gate, headers: dict[str, str]) -> None:
        super().__init__(picture.data, headers=headers, media_type=picture.type)
        self._sending = sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._sending.enter(len(self.body)):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            view = memoryview(self.body)
            for at in range(0, len(view), _CHUNK):
                piece = {"type": "http.response.body", "body": view[at : at + _CHUNK]}
                await send({**piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def router(store: Store) -> APIRouter:
    """Make the routes `/images/{id}` and `/thumbnails/{id}`."""
    routes = APIRouter(tags=["photos"])
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/*": {}}},
        304: {"description": "You have it."},
    }

    @routes.get("/images/{photo_id}", response_class=Response, responses=answers)
    async def image(photo_id: str, request: Request) -> Response:
        """The photo as it is on disk; 404 when it is no longer what was indexed."""
        return await _answer(store, store.photo, photo_id, request, f'"{photo_id}"')

    @routes.get("/thumbnails/{photo_id}", response_class=Response, responses=answers)
    async def thumbnail(photo_id: str, request: Request) -> Response:
        """A small upright JPEG of the photo."""
        mark = f'"{photo_id}-{store.settings.thumbnail}"'
        return await _answer(store, store.thumbnail, photo_id, request, mark)

    return routes


async def _answer(
    store: Store,
    make: Callable[[str], Awaitable[Picture | None]],
    photo_id: str,
    request: Request,
    mark: str,
) -> Response:
    if not ID.fullmatch(photo_id):
        raise HTTPException(404, "no such photo")
    if "," in request.headers.get("range", ""):
        raise HTTPException(416, "ask for the whole photo")
    headers = {"etag": mark, "cache-control": KEPT, "content-security-policy": POLICY}
    known = mark in request.headers.get("if-none-match", "")
    if known and await store.holds(photo_id):  # its bytes cannot have changed
        return Response(status_code=304, headers=headers)
    picture = await make(photo_id)
    if picture is None:
        raise HTTPException(404, "no such photo")
    return Sent(picture, store.sending, headers)


def _type(data: bytes) -> str | None:
    """Return the media type of a photo that indexing would decode, else None."""
    Image.init()
    for name in pixels.FORMATS:
        accept = Image.OPEN[name][1]
        if accept is None or accept(data[:16]) is True:
            return TYPES[name]
    return None


@dataclass(frozen=True)
class Upload:
    """The parts of a body.

    Attributes:
        photo: the photo's bytes; empty where the form was sent without one.
        fields: the other parts of the form.
    """

    photo: bytes
    fields: dict[str, str] = field(default_factory=dict)


async def read_upload(request: Request, limit: int) -> Upload:
    """Read a form with a part `image`, or a body that is the photo itself.

    Args:
        request: its body has not been read yet; who counts it is `limits.Guard`.
        limit: bytes of a body: so much stays in memory.

    Raises:
        HTTPException: 415 for another type of body, 400 for a broken one.
    """
    whole = request.headers.get("content-type", "").lower()
    kind = whole.partition(";")[0].strip()
    if kind == "multipart/form-data":
        _check_charset(whole)
        return await _form(request, limit)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return Upload(await request.body())
    raise HTTPException(415, f"send the photo as a form's part {FIELD!r}, or as image/*")


def _check_charset(content_type: str) -> None:
    """Refuse another charset than UTF-8: Starlette would try any codec of Python's.

    The parser is Starlette's own, so that both read the same; it drops `charset*=`, which other
    versions of it may not. No boundary contains an asterisk.
    """
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset not in (b"utf-8", b"utf8") or "charset*" in content_type:
        raise HTTPException(415, "send the form in UTF-8")


async def _form(request: Request, limit: int) -> Upload:
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=_FIELDS,
        max_part_size=_FIELD_SIZE,
    )
    parser.spool_max_size = limit + 1
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        text = getattr(error, "message", "not a form that can be read")
        raise HTTPException(400, f"form: {text}") from None
    try:
        return await _taken_apart(form)
    finally:
        await form.close()


async def _taken_apart(form: FormData) -> Upload:
    photo, fields = b"", {}
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            fields[name] = value
        elif name == FIELD:
            photo = await value.read()
        else:
            raise HTTPException(400, f"form: the photo's part is called {FIELD!r}")
    return Upload(photo, fields)
