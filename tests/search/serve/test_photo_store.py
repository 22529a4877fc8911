"""Photos leave the server by their id, whole, as what they are, and nothing else does: R26."""

import hashlib
import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from crosstill.search import index_builder
from serving import form, serving

TRAVERSALS = [
    f"{start}{path}"
    for start in ("/images/", "/thumbnails/", "/static/", "/")
    for path in (
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "..%2F..%2F..%2Fetc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%252f..%252fetc%252fpasswd",
        "%252e%252e%252fetc%252fpasswd",
        "..%c0%af..%c0%afetc/passwd",
        "..%5c..%5cetc%5cpasswd",
        "..\\..\\etc\\passwd",
        "....//....//etc/passwd",
        "..;/..;/etc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "file:///etc/passwd",
        "./index.json",
        "index.json%00",
    )
]

XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "javascript:alert(1)",
    "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "<iframe src=javascript:alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<!--<script>alert(1)//-->",
    "<style>@import'//evil';</style>",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u202egpj.exe\u2028<b>x</b>",
    "<math><mtext><script>alert(1)</script>",
]


def picture(seed: int, size=(48, 40)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def odd(bundle_folder, tmp_path_factory):
    """A server, the folder of its photos and the index: odd names, formats and captions."""
    folder = tmp_path_factory.mktemp("odd")
    photos, index = folder / "photos", folder / "index"
    photos.mkdir()
    for number, payload in enumerate(XSS):
        name = f"{number} {payload}".replace("/", "\u2215")
        picture(number).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(payload)
    for number, kind in enumerate(("jpg", "gif", "webp", "bmp", "tif", "ppm")):
        picture(100 + number).save(photos / f"kind.{kind}")
    picture(300).save(photos / "really-png.jpg", "PNG")
    turned = picture(200, (30, 90))  # upright: 90 high, 30 wide
    turned.save(photos / "turned.jpg", exif=_orientation(6))
    picture(201, (1000, 1500)).save(photos / "large.jpg", quality=95)
    picture(202).save(os.fsencode(photos) + b"/not-utf8-\xff\xfe.png")
    for name in ("linked", "piped", "changed", "gone", "grown"):
        picture(len(name) * 1000 + ord(name[0])).save(photos / f"{name}.png")
    index_builder.build(bundle_folder, photos, index)
    with serving(index, folder) as running:
        yield running, photos


def key(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_photo_comes_as_it_lies_on_disk(odd):
    server, photos = odd
    for kind, media in {
        "jpg": "image/jpeg",
        "gif": "image/gif",
        "webp": "image/webp",
        "bmp": "image/bmp",
        "tif": "image/tiff",
        "ppm": "image/x-portable-anymap",
    }.items():
        path = photos / f"kind.{kind}"
        found = server.ask(f"/images/{key(path)}")
        assert (found.status, found.headers["content-type"]) == (200, media)
        assert found.body == path.read_bytes()
        assert "sandbox" in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "immutable" in found.headers["cache-control"]


def test_the_name_of_a_file_does_not_say_what_it_is(odd):
    server, photos = odd
    found = server.ask(f"/images/{key(photos / 'really-png.jpg')}")
    assert (found.status, found.headers["content-type"]) == (200, "image/png")


def test_an_id_of_another_index_is_unknown(odd, server):
    assert server.ask(f"/images/{key(odd[1] / 'kind.jpg')}").status == 404


def test_a_thumbnail_is_a_small_upright_jpeg(odd):
    server, photos = odd
    for name, size in {"large.jpg": (320, 213), "turned.jpg": (30, 90)}.items():
        found = server.ask(f"/thumbnails/{key(photos / name)}")
        assert found.headers["content-type"] == "image/jpeg"
        image = Image.open(io.BytesIO(found.body))
        assert (image.format, image.size) == ("JPEG", size)
        assert not image.getexif()
    assert len(server.ask(f"/thumbnails/{key(photos / 'large.jpg')}").body) < 60_000


def test_what_a_browser_has_is_not_sent_again(odd):
    server, photos = odd
    for kind in ("images", "thumbnails"):
        first = server.ask(f"/{kind}/{key(photos / 'kind.jpg')}")
        again = server.ask(
            f"/{kind}/{key(photos / 'kind.jpg')}", if_none_match=first.headers["etag"]
        )
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("target", TRAVERSALS)
def test_no_path_leads_to_a_file(odd, target):
    server, _ = odd
    found = server.raw(
        f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    assert found.status == 404, found
    assert b"root:" not in found.body and b"sha256" not in found.body


def test_there_are_sixty_spellings():
    assert len(set(TRAVERSALS)) >= 60


@pytest.mark.parametrize("kind", ["images", "thumbnails"])
def test_an_id_is_64_small_hex_digits(odd, kind):
    server, photos = odd
    known = key(photos / "kind.jpg")
    for spelling in (known[:-1], known + "0", known.upper(), known[:32], known + ".jpg", "0" * 64):
        assert server.ask(f"/{kind}/{spelling}").status == 404, spelling
    assert server.ask(f"/{kind}/{known}").status == 200


def replace_by_link(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def change(path):
    """The same size and time, other bytes."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def grow(path):
    with path.open("ab") as file:
        file.write(b"<script>")


@pytest.mark.parametrize(
    ("name", "replace"),
    [
        ("linked", replace_by_link),
        ("piped", replace_by_pipe),
        ("changed", change),
        ("grown", grow),
        ("gone", lambda path: path.unlink()),
    ],
)
def test_what_took_a_photos_place_is_not_sent(odd, name, replace):
    server, photos = odd
    path = photos / f"{name}.png"
    known = key(path)
    assert server.ask(f"/images/{known}").status == 200
    replace(path)
    for kind in ("images", "thumbnails"):
        found = server.ask(f"/{kind}/{known}")
        assert found.status == 404 and found.json == {"error": "no such photo"}


def test_a_link_to_another_file_of_the_same_size_is_not_followed_to_it(odd, tmp_path):
    server, photos = odd
    path, secret = photos / "kind.bmp", tmp_path / "secret"
    known, before, whole = key(path), path.stat(), path.read_bytes()
    secret.write_bytes(b"s" * before.st_size)
    os.utime(secret, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.unlink()
    path.symlink_to(secret)
    try:
        assert server.ask(f"/images/{known}").status == 404
    finally:
        path.unlink()
        path.write_bytes(whole)


def test_svg_and_html_are_never_sent(odd, bundle_folder, tmp_path):
    """Not even when they lie in the folder under the name of a photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(odd[1] / "kind.jpg", folder / "a.jpg")
    (folder / "b.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>')
    (folder / "c.png").write_text("<html><script>alert(1)</script></html>")
    index_builder.build(bundle_folder, folder, tmp_path / "index")
    with serving(tmp_path / "index", tmp_path) as server:
        assert server.metric("crosstill_index_photos") == 1
        for name in ("b.svg", "c.png"):
            assert server.ask(f"/images/{key(folder / name)}").status == 404
            refused = server.ask("/search", "POST", **form((folder / name).read_bytes()))
            assert refused.status == 400 and "script" not in refused.body.decode()


def test_names_and_captions_are_escaped_in_json_and_on_the_page(odd):
    server, _ = odd
    found = server.ask("/search?q=a&top=100")
    for character in b"<>&":
        assert character not in found.body
    results = {result["caption"]: result for result in found.json["results"]}
    assert set(XSS) <= set(results)
    assert all(result["path"].isprintable() for result in results.values())
    page = server.ask("/?q=%3Cscript%3Ealert(1)%3C/script%3E&top=100").body.decode()
    for tag in ("<script>", "<img src=x", "<svg onload", "<iframe", "<body onload", "<details"):
        assert tag not in page, tag
    assert ' onmouseover="' not in page and " onfocus='" not in page
    assert 'href="javascript:' not in page and "49" not in page.partition("7*7")[2][:20]


def test_a_name_that_is_not_utf8_is_shown_and_sent(odd):
    server, photos = odd
    paths = [result["path"] for result in server.search(q="a", top=100)["results"]]
    assert "not-utf8-\\xff\\xfe.png" in paths
    path = next(path for path in photos.iterdir() if path.name.startswith("not-utf8"))
    assert server.ask(f"/images/{key(path)}").status == 200


def test_no_answer_names_the_folder(odd):
    server, photos = odd
    for target in ("/search?q=a&top=100", "/?q=a", "/metrics", "/openapi.json", "/readyz"):
        body = server.ask(target).body.decode()
        assert str(photos) not in body and str(photos.parent) not in body, target


def _orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


@pytest.mark.parametrize("kind", ["images", "thumbnails"])
def test_an_unknown_photo_is_not_found_whatever_the_asker_has(server, kind):
    unknown = "0" * 64
    for mark in (f'"{unknown}"', f'"{unknown}-320"'):
        assert server.ask(f"/{kind}/{unknown}", if_none_match=mark).status == 404
