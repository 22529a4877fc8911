"""Thirty requests that no honest client sends: each gets a 4xx, at once, that tells nothing."""

import gzip
import re

import pytest

from serving import form, last_words

LITTLE = 5.0  # seconds of a processor, which other work does not lengthen; mostly milliseconds
PNG = b"\x89PNG\r\n\x1a\n"
GET = "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{}\r\n"
POST = "POST /search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{}\r\n"


def get(target: str, headers: str = "") -> bytes:
    return GET.format(target, headers).encode()


def post(kind: str, body: bytes, headers: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return (
        POST.format(f"Content-Type: {kind}\r\nContent-Length: {length}\r\n{headers}").encode()
        + body
    )


def posted(whole: dict) -> bytes:
    return post(whole["content_type"], whole["body"])


def encoded(parameter: str, edge: str = "utf-8") -> bytes:
    """A form in some charset, whose boundary looks like the name of the right one."""
    head = 'Content-Disposition: form-data; name="q"'
    body = f"--{edge}\r\n{head}\r\n\r\na b-c\r\n--{edge}--\r\n".encode()
    return post(f"multipart/form-data; boundary={edge}; {parameter}", body)


CHARSETS = {
    "a codec that decodes nothing": "charset=undefined",
    "a codec for names of hosts": "charset=punycode",
    "a codec in quotes": 'CharSet="idna"',
    "a codec behind UTF-8": "charset=utf-8; charset=undefined",
    "a codec as RFC 2231 writes it": "charset*=utf-8''punycode",
    "a codec in pieces": "charset*0=puny; charset*1=code",
    "no codec": "charset=",
}


def many_parts(count: int) -> bytes:
    fields = {f"field{number}": "x" for number in range(count)}
    return posted(form(b"photo", **fields))


def ranges(photo_id: str) -> bytes:
    parts = ",".join(f"{at}-{at + 1}" for at in range(10_000))
    return get(f"/images/{photo_id}", f"Range: bytes={parts}\r\n")


MALFORMED = {
    "bad JSON": post("application/json", b'{"q": '),
    "deep JSON": post("application/json", b"[" * 100_000 + b"]" * 100_000),
    "a threshold that is no number": get("/search?q=a&threshold=NaN"),
    "an infinite threshold": get("/search?q=a&threshold=inf"),
    "a threshold of words": get("/search?q=a&threshold=low"),
    "a vector of the wrong size": post("application/json", b'{"vector": [1.0, NaN]}'),
    "top 0": get("/search?q=a&top=0"),
    "top -1": get("/search?q=a&top=-1"),
    "top 1e9": get("/search?q=a&top=1000000000"),
    "top of 5,000 digits": get("/search?q=a&top=" + "9" * 5000),
    "10 MB of text": get("/search?q=" + "a" * 10_000_000),
    "a text over the limit": get("/search?q=" + "a" * 10_001),
    "no text": get("/search?q="),
    "blank text": get("/search?q=%20%09"),
    "no question": get("/search"),
    "an empty photo": posted(form(b"")),
    "an empty body": post("image/png", b""),
    "a photo that is text": posted(form(b"this is no photo")),
    "half a photo": posted(form(PNG + b"\0" * 50)),
    "an SVG": posted(form(b'<svg xmlns="http://www.w3.org/2000/svg"/>', kind="image/svg+xml")),
    "the wrong kind of body": post("text/html", b"<p>photo"),
    "no kind of body": b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
    "no boundary": post("multipart/form-data", b"--x\r\n\r\n--x--"),
    "a boundary that does not come": post("multipart/form-data; boundary=x", b"photo" * 100),
    "a form of an address": post("application/x-www-form-urlencoded; charset=punycode", b"q=a-b"),
    **{name: encoded(parameter) for name, parameter in CHARSETS.items()},
    "2,000 parts": many_parts(2000),
    "a part of 10 MB that is no file": posted(form(PNG, q="a" * 10_000_000)),
    "two lengths": b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a length that is no number": b"POST /search HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: many\r\n\r\nabc",
    "text that is not UTF-8": get("/search?q=%ff%fe%fd"),
    "a null character": get("/search?q=dog%00cat"),
    "bad gzip": post("image/png", b"\x1f\x8b\x08junk", "Content-Encoding: gzip\r\n"),
    "good gzip": post("image/png", gzip.compress(PNG), "Content-Encoding: gzip\r\n"),
    "an unknown photo": get("/search?like=" + "0" * 64),
    "an id that is none": get("/search?like=../../etc/passwd"),
    "a path with ..%2f": get("/images/..%2f..%2f..%2fetc%2fpasswd"),
    "an absolute path": get("/images//etc/passwd"),
    "OPTIONS": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "TRACE": b"TRACE /search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "CONNECT": b"CONNECT example.com:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "HEAD without a question": get("/search").replace(b"GET", b"HEAD"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200 + b"\r\n\r\n",
    "no Host": b"GET /search?q=a HTTP/1.1\r\n\r\n",
    "a chunk of no length": POST.format(
        "Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
    ).encode()
    + b"zz\r\nabc\r\n",
    "1,000 headers": get("/search?q=a", "".join(f"X-{n}: {'v' * 200}\r\n" for n in range(1000))),
    "one header of 1 MB": get("/search?q=a", f"X-Long: {'v' * 2**20}\r\n"),
    "a header with a null": get("/search?q=a", "X-Null: a\0b\r\n"),
}


SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HEAD = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "a length and chunks": HEAD + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks and a length": HEAD + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 0\r\nContent-Length: 4\r\n\r\n",
    "two lengths in one": HEAD + b"Content-Length: 0, 4\r\n\r\n",
    "a length with a sign": HEAD + b"Content-Length: +0\r\n\r\n",
    "a space before the colon": HEAD + b"Content-Length : 0\r\n\r\n",
    "a bare CR": HEAD + b"X: a\rContent-Length: 0\r\n\r\n",
    "chunks twice": HEAD + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "an unknown encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "an encoding that is none": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "a folded encoding": HEAD
    + b"Content-Length: 0\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a chunk that ends late": HEAD + CHUNKED + b"\r\n1\r\naXX0\r\n\r\n",
    "a bare LF behind an extension": HEAD + CHUNKED + b"\r\n1;a\nb\r\na\r\n0\r\n\r\n",
    "two hosts": HEAD + b"Host: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_bodies_of_two_readings_are_refused_and_nothing_behind_them_is_read(server, name):
    """Where a proxy and the server disagree on a body's end, one hides a request in the other's."""
    with server.connect() as line:
        line.sendall(AMBIGUOUS[name] + SMUGGLED)
        said = last_words(line)
    assert said is not None and said.startswith(b"HTTP/1.1 400 "), said
    assert said.count(b"HTTP/1.1 ") == 1 and b"alive" not in said


def check_refusal(server, request):
    before = server.cpu()
    found = server.raw(request)
    assert 400 <= found.status < 500, found
    assert server.cpu() - before < LITTLE
    assert found.headers["x-content-type-options"] == "nosniff"
    told = found.body.decode()
    assert not re.search(r"Traceback|\.py\b|File \"|/work/|/home/|/tmp/|/usr/", told), told
    assert found.body == b"" or list(found.json) == ["error"]


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_and_the_next_is_served(server, name):
    check_refusal(server, MALFORMED[name])
    assert server.search(q="a circle")["results"]


@pytest.mark.parametrize("name", CHARSETS)
@pytest.mark.parametrize("target", [b"/search", b"/"])
def test_a_form_in_another_charset_than_utf_8_is_refused(server, target, name):
    request = encoded(CHARSETS[name]).replace(b"/search", target)
    assert server.raw(request).status == 415


@pytest.mark.parametrize("parameter", ["charset=utf-8", 'charset="UTF-8"', "charset=utf8", "a=b"])
def test_a_form_in_utf_8_may_say_so(server, parameter):
    found = server.raw(encoded(parameter))
    assert found.status == 400 and "no photo" in found.json["error"]


def test_ten_thousand_ranges_are_refused(server, photo_id):
    check_refusal(server, ranges(photo_id))


def test_there_are_thirty(server):
    assert len(MALFORMED) >= 30


def test_an_upgrade_to_web_sockets_is_a_plain_request(server):
    headers = "Upgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n"
    asked = get("/search?q=", headers).replace(b"Connection: close", b"Connection: upgrade, close")
    assert server.raw(asked).status == 400


def test_nothing_of_all_this_is_an_error_of_the_server(server):
    assert server.log() == ""
    assert server.metric('crosstill_requests_total{route="/search",status="500"}') == 0
