"""The page's HTML, over a service that answers what a test tells it to."""

import asyncio
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("fastapi", reason="the search extra is not installed")

from fastapi import FastAPI, HTTPException

from crosstill.errors import ConfigError, ImageError, printable
from crosstill.search.searcher import Hit
from crosstill.search.serve import photo_store, search_page
from crosstill.search.serve.limits import Settings
from crosstill.search.serve.load import Overloaded
from crosstill.search.serve.service import AUTO, NoSuchPhotoError, SearchResult

BAR = 0.25
VOID = {"meta", "link", "input", "img", "wbr", "circle", "path", "rect"}
XSS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "</title><script>alert(1)</script>",
    "</textarea><iframe src=javascript:alert(1)>",
    "<a href=javascript:alert(1)>x</a>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "<!--<img src=--><img src=x onerror=alert(1)//>",
    "<style>@import'//evil.example/x'</style>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egpj.<b>exe\u2028<script>",
    "x\x00<scr\x00ipt>alert(1)</script>\udcff",
)


class Fake:
    """A service over made-up photos, each called by its number; `queue` turns away everyone."""

    def __init__(self, count=60, bar=BAR, threshold=None, name=lambda i: f"{i:03}.jpg", caption=""):
        self.searcher = _Searcher(count)
        self.settings = Settings(threshold=threshold)
        self.bar, self.name, self.caption = bar, name, caption
        self.calls = []

    async def calibrated(self):
        return self.bar

    async def text(self, q, top=None, threshold=None):
        if q == "busy":
            raise Overloaded("too many requests at once; try again soon")
        if len(q) > self.settings.text:
            raise ConfigError(f"q: {len(q)} characters; at most {self.settings.text}")
        return self._found("text", q, top, self.bar if threshold == AUTO else threshold)

    async def photo(self, data, q="", top=None, threshold=None):
        if data != b"a photo":
            raise ImageError("photo", "not an image")
        return self._found("photo", q, top, threshold)

    async def like(self, photo_id, q="", top=None, threshold=None):
        if photo_id != "0" * 64:
            raise NoSuchPhotoError("no photo of this index has that id")
        return self._found("like", q, top, threshold)

    def _found(self, kind, q, top, bound):
        self.calls.append((kind, q, top, bound))
        least = self.settings.threshold if bound is None else bound
        best = 0.2 if q == "nothing" else 0.4
        hits = [
            Hit(f"{i:064x}", best - i / 100, self.name(i), self.caption)
            for i in range(min(top, len(self.searcher)))
        ]
        kept = [hit for hit in hits if least is None or hit.score >= least]
        return SearchResult(q, kept, 1.0, 7, least, ["no <word> is known"] if q == "zxqv" else [])


class _Searcher:
    def __init__(self, count):
        self.count, self.generation = count, 7
        self.bundle = SimpleNamespace(name="mobile")

    def __len__(self):
        return self.count


class Read(HTMLParser):
    """A document, read strictly: what is opened is closed, in order, and nothing is named twice.

    Attributes:
        shape: every tag with the names of its attributes.
        all: tag → its attributes, in order.
    """

    def __init__(self, html):
        super().__init__()
        self.shape, self.all, self._open = [], {}, []
        self.feed(html)
        self.close()
        assert self._open == []
        ids = [a["id"] for tags in self.all.values() for a in tags if "id" in a]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.shape.append((tag, tuple(name for name, _ in attrs)))
        self.all.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(data)

    def addresses(self):
        names = ("href", "src", "action", "formaction", "srcset", "poster", "data")
        return [a[n] for tags in self.all.values() for a in tags for n in names if n in a]


class Client:
    """Asks an application without a socket."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app)

    def get(self, address, **more):
        return asyncio.run(self._ask("GET", address, more))

    def post(self, address, **more):
        return asyncio.run(self._ask("POST", address, more))

    async def _ask(self, method, address, more):
        async with httpx.AsyncClient(transport=self.transport, base_url="http://page") as client:
            return await client.request(method, address, **more)


def client(service=None):
    app = FastAPI()
    app.include_router(search_page.router(service or Fake()))
    return Client(app)


def get(service=None, **asked):
    return client(service).get("/", params=asked)


def post(service=None, data=b"a photo", field="image", **fields):
    return client(service).post("/", files={field: ("p.jpg", data, "image/jpeg")}, data=fields)


def between(html, before, after):
    return html.partition(before)[2].partition(after)[0]


def heading(answer):
    return between(answer.text, "<h1>", "</h1>")


def results(answer):
    return len(re.findall('<li id="r', answer.text))


STATES = {
    "first": lambda: get(),
    "empty": lambda: get(Fake(0)),
    "words": lambda: get(q="dogs"),
    "words, relevant": lambda: get(Fake(caption="a dog"), q="dogs", relevant=1),
    "nothing": lambda: get(q="nothing", relevant=1),
    "like": lambda: get(like="0" * 64, q="snow"),
    "photo": lambda: post(),
    "unknown": lambda: get(like="x"),
    "broken": lambda: post(data=b"x"),
    "busy": lambda: get(q="busy"),
}


def test_the_first_page_says_what_there_is():
    service = Fake()
    answer = get(service)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert heading(answer) == "Search 60 photos"
    assert "60 photos · generation 7 · mobile" in answer.text
    assert get(q="  ").text == get(photo="").text == answer.text
    assert not service.calls and results(answer) == 0


def test_an_index_without_photos_says_so():
    assert heading(get(Fake(0))) == "No photos yet"
    assert "1 photo ·" in get(Fake(1)).text


def test_words_find_photos():
    service = Fake()
    answer = get(service, q=" two dogs ")
    assert service.calls == [("text", "two dogs", 24, None)]
    assert answer.status_code == 200 and heading(answer) == "“two dogs”"
    assert "<title>“two dogs”: 24 closest of 60 photos · crosstill</title>" in answer.text
    assert results(answer) == 24
    first = between(answer.text, '<li id="r1">', "</li>")
    assert f'href="images/{0:064x}"' in first and f'src="thumbnails/{0:064x}"' in first
    assert f'href="./?like={0:064x}"' in first and "0.400" in first and "000.jpg" in first


def test_what_of_the_words_counts_for_nothing_is_said_above_the_results():
    answer = get(q="zxqv")
    above = between(answer.text, "<h1>", '<li id="r1">')
    assert '<p class="note">No &lt;word&gt; is known.</p>' in above
    assert 'class="note"' not in get(q="dogs").text


def test_more_are_shown_until_there_are_no_more():
    shown, link = [], "./?q=dogs"
    browser = client(Fake(count=1000))
    while link:
        answer = browser.get(link)
        shown.append(results(answer))
        link = between(answer.text, '<p class="more"><a href="', '"').replace("&amp;", "&")
        assert not link or f'id="{link.partition("#")[2]}"' in browser.get(link).text
    assert shown == [24, 48, 96, 192, 200]
    assert 'class="more"' not in get(Fake(count=24), q="dogs").text
    assert 'class="more"' in get(Fake(count=25), q="dogs").text


def test_only_relevant_photos():
    service = Fake()
    answer = get(service, q="dogs", relevant=1)
    assert service.calls == [("text", "dogs", 24, BAR)]
    assert between(answer.text, 'id="count">', "<") == "16 relevant of 60 photos"
    assert 'name="relevant" type="checkbox" value="1" checked' in answer.text


def test_nothing_relevant_is_an_answer():
    answer = get(q="nothing", relevant=1)
    assert answer.status_code == 200 and results(answer) == 0
    assert between(answer.text, 'id="count">', "<") == "Nothing relevant found"
    assert "no score reaches 0.250" in answer.text
    assert 'href="./?q=nothing">Show the closest photos anyway' in answer.text


def test_an_index_that_is_not_calibrated_offers_no_choice():
    service = Fake(bar=None)
    answer = get(service, q="dogs", relevant=1)
    assert service.calls == [("text", "dogs", 24, None)] and results(answer) == 24
    assert 'name="relevant"' not in answer.text


def test_the_bound_of_a_server_is_no_choice_either():
    answer = get(Fake(threshold=0.3), q="nothing", relevant=1)
    assert "no score reaches 0.300" in answer.text and "anyway" not in answer.text
    assert 'name="relevant"' not in answer.text


def test_photos_like_one_of_the_index():
    service, photo = Fake(), "0" * 64
    answer = get(service, like=photo)
    assert service.calls == [("like", "", 24, None)] and heading(answer) == "Photos like this one"
    assert f'<a href="./?like={photo}&amp;top=48#r25">Show more</a>' in answer.text
    assert f'name="like" type="checkbox" value="{photo}">' in answer.text
    both = get(service, like=photo, q="on snow")
    assert service.calls[-1] == ("like", "on snow", 24, None)
    assert heading(both) == "Photos like this one, with “on snow”"
    assert f'name="like" type="checkbox" value="{photo}" checked>' in both.text


def test_photos_like_an_uploaded_one():
    service = Fake()
    answer = post(service)
    assert service.calls == [("photo", "", 48, None)] and results(answer) == 48
    assert heading(answer) == "Photos like yours" and 'class="more"' not in answer.text
    assert heading(post(service, q="on snow")) == "Photos like yours, with “on snow”"
    assert service.calls[-1] == ("photo", "on snow", 48, None)


@pytest.mark.parametrize(
    ("ask", "status", "sentence"),
    [
        (lambda: get(like="a" * 64), 404, "No photo of this index has that id."),
        (lambda: get(q="x" * 10_001), 400, "Q: 10001 characters; at most 10000."),
        (lambda: get(q="x", top=0), 400, "Top: 0 is not possible; 1 to 200."),
        (lambda: get(q="x", top=201), 400, "Top: 201 is not possible; 1 to 200."),
        (lambda: get(q="x", top="-١"), 400, "Top: -١ is not possible; 1 to 200."),
        (lambda: get(q="x", top="9" * 9999), 400, f"Top: {'9' * 20} is not possible; 1 to 200."),
        (lambda: post(data=b"x"), 400, "This file cannot be read as a photo: not an image."),
        (lambda: post(data=b""), 400, "No photo was sent; choose one first."),
        (lambda: client().post("/", data={"q": "x"}), 415, "Send the photo as a form"),
        (lambda: post(field="other"), 400, "Form: the photo"),
        (lambda: get(q="busy"), 503, "Too many requests at once; try again soon."),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence(ask, status, sentence):
    answer = ask()
    Read(answer.text)
    assert answer.status_code == status and heading(answer) == "That did not work"
    assert sentence in between(answer.text, 'role="alert">', "</section>")
    assert ("retry-after" in answer.headers) == (status == 503)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_a_photo_that_is_too_large_is_named_so(monkeypatch):
    async def read(request, limit):
        raise HTTPException(413, f"the body is too large; at most {limit} bytes")

    monkeypatch.setattr(photo_store, "read_upload", read)
    answer = post()
    assert answer.status_code == 413
    assert "<p>This photo is too large: at most 20 MB can be sent.</p>" in answer.text


def test_words_stay_in_the_box_when_something_goes_wrong():
    busy = get(q="busy", relevant=1)
    assert 'value="busy"' in busy.text
    assert '<a href="./?q=busy&amp;relevant=1">Search again</a>' in busy.text
    assert 'value="on snow"' in post(data=b"x", q="on snow").text


@pytest.mark.parametrize("text", XSS)
def test_names_captions_and_words_are_text(text):
    plain = get(Fake(name=lambda i: "folder/x", caption="x"), q="x")
    words = text.encode("utf-8", "replace").decode()
    answer = get(Fake(name=lambda i: f"folder/{text}", caption=text), q=words)
    read = Read(answer.text)
    # a long name may break at more places
    shape, expected = (
        [row for row in one.shape if row[0] != "wbr"] for one in (read, Read(plain.text))
    )
    assert shape == expected
    more = [a for a in read.addresses() if a.startswith("./?q=")]
    assert len(more) == 1 and re.fullmatch(r"\./\?q=[\w.+%~-]+&top=48#r25", more[0])
    others = [a for a in read.addresses() if a not in more]
    assert others == [a for a in Read(plain.text).addresses() if not a.startswith("./?q=")]
    assert read.all["input"][0]["value"] == search_page.clean(words)
    assert read.all["img"][1]["alt"] == search_page.clean(text)
    titles = [a["title"] for a in read.all["p"] if a.get("class") == "path"]
    assert titles == [printable(f"folder/{text}")] * 24


def test_any_characters_of_a_name_fit_a_page():
    for odd in ("a\nb", "\x1b[2J", "\udcff\udc80", "\ufffe", "é" * 300, "\u202e", ""):
        answer = get(Fake(name=lambda i, odd=odd: odd, caption=odd), q="x")
        assert answer.status_code == 200 and results(answer) == 24
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ufffe]", answer.text)


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_a_whole_document(state):
    answer = STATES[state]()
    read = Read(answer.text)
    assert answer.text.startswith("<!doctype html>") and read.all["html"] == [{"lang": "en"}]
    for tag in ("title", "h1", "main", "header", "footer", "form"):
        assert len(read.all[tag]) == 1, tag
    assert {a["class"] for a in read.all["a"][:1]} == {"skip"}
    assert read.all["a"][0]["href"] == "#main" and read.all["main"][0]["id"] == "main"
    assert all("alt" in image and "width" in image for image in read.all["img"])
    labelled = {label.get("for") for label in read.all["label"]}
    wrapped = re.findall("<label [^>]*><input [^>]*>[^<]+", answer.text)
    loose = [a for a in read.all["input"] if a["type"] != "checkbox"]
    assert {a["id"] for a in loose} <= labelled
    assert len(wrapped) == len(read.all["input"]) - len(loose)


@pytest.mark.parametrize("state", STATES)
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(state):
    answer = STATES[state]()
    read = Read(answer.text)
    for address in read.addresses():
        assert re.match(r"\./|#|(static|images|thumbnails)/", address), address
    assert "style" not in read.all
    assert read.all["script"] == [{"src": read.all["script"][0]["src"], "defer": None}]
    assert "<script" in answer.text and "></script>" in answer.text
    for _, names in read.shape:
        assert not [name for name in names if name == "style" or name.startswith("on")]
    served = client()
    for address in [*read.addresses()]:
        if address.startswith("static/"):
            text = served.get(address).text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|url\(|@import|[\"'`(=]\s*//", text), address


def test_the_pages_files_are_kept_for_as_long_as_they_are_the_same():
    served, read = client(), Read(get().text)
    files = sorted({a for a in read.addresses() if a.startswith("static/")})
    assert [a.partition("?")[0] for a in files] == [
        f"static/{n}" for n in sorted(search_page.TYPES)
    ]
    for address in files:
        answer = served.get(address)
        assert answer.status_code == 200 and answer.text
        assert answer.headers["content-type"] == search_page.TYPES[address[7:].partition("?")[0]]
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        other = served.get(address.partition("?")[0], params={"v": "0"})
        assert other.content == answer.content and other.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name", ["page.html", "..%2fpage.py", "%2e%2e/page.py", "%2fetc%2fpasswd", "page.css%00", "."]
)
def test_no_other_file_is_served(name):
    assert client().get(f"/static/{name}").status_code == 404


def test_names_are_shortened_in_the_middle():
    assert search_page.shortened("x" * 48, 0) == "x" * 48
    assert search_page.shortened("a" * 30 + "b" * 30, 24) == "a" * 24 + "…" + "b" * 23
    assert search_page.shortened("a" * 30 + "b" * 30, 0) == "…" + "a" * 17 + "b" * 30
    long = get(Fake(name=lambda i: "f" * 90 + "/" + "n" * 90 + ".jpg"), q="x")
    assert "…" + "f" * 46 + "/" in long.text and "n" * 24 + "…" in long.text
    names = get(Fake(name=lambda i: "a_b-c d.jpg"), q="x")
    assert "<bdi><wbr>a<wbr>_b<wbr>-c d<wbr>.jpg</bdi>" in names.text
    assert search_page.counted(1) == "1 photo" and search_page.counted(8091) == "8,091 photos"


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_told_apart(scheme):
    """4.5 to 1 for text and 3 to 1 for edges, as WCAG 2.2 asks at level AA."""
    css = client().get("/static/page.css").text
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", css.split(":root {")[1 + scheme]))
    pairs = [(name, on, 4.5) for name in ("ink", "soft", "accent") for on in ("page", "box")]
    pairs += [("wrong", "page", 4.5), ("on-accent", "accent", 4.5), ("edge", "page", 3)]
    for name, on, least in pairs:
        light, dark = sorted((luminance(colours[name]), luminance(colours[on])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (name, on)
