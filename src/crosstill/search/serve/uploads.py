"""Read the photo in a request's body, in memory: nothing is written to disk."""

from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

FIELD = "image"
_FIELDS, _FIELD_SIZE = 16, 64 * 1024


@dataclass(frozen=True)
class Upload:
    """The parts of a body.

    Attributes:
        photo: the photo's bytes; empty where the form was sent without one.
        fields: the other parts of the form.
    """

    photo: bytes
    fields: dict[str, str] = field(default_factory=dict)


async def read(request: Request, limit: int) -> Upload:
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
