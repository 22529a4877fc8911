"""By which names the server answers, and under which path of a proxy."""

import json
import re
import urllib.error
import urllib.request
from urllib.parse import urljoin, urlsplit

import pytest

from crosstill.search.serve import limits
from serving import form, free_port, proxied, serving
from support import PATIENCE
from verbs import refusal

REBOUND = ["evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io",
           "192.0.2.7", "[2001:db8::1]", "localhost@evil.example", "evil.example@localhost",
           "127.0.0.1%evil.example", "[::1%evil.example]", "localhost:80:80", "[::1", "",
           "local host", "xn--localhost"]  # fmt: skip


def status(server, host, target="/search?q=a"):
    request = f"GET {target} HTTP/1.1\r\nHost: {host.format(port=server.port)}\r\n"
    return server.raw(request.encode() + b"Connection: close\r\n\r\n")


@pytest.mark.parametrize("host", REBOUND)
def test_no_page_elsewhere_reads_names_and_photos(server, photo_id, host):
    for target in ("/search?q=a", "/", f"/images/{photo_id}", "/metrics", "/openapi.json"):
        found = status(server, host, target)
        assert found.status in (400, 421), (target, found)
        assert list(found.json) == ["error"] and "\n" not in found.json["error"]
        assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:{port}", "127.0.0.1", "127.0.0.1:{port}", "127.1.2.3", "[::1]:{port}"],
)
def test_loopback_names_are_answered(server, host):
    assert status(server, host).status == 200


def test_a_name_is_answered_once_it_is_given(index_folder, tmp_path):
    port, names = free_port(), ["--allowed-host", "Photos.Example.org", "--allowed-host", "nas"]
    with serving(index_folder, tmp_path, "--host", "0.0.0.0", *names, port=port) as server:
        assert server.process.stdout.readline()
        for host in ("photos.example.org", "PHOTOS.example.org:443", "nas:{port}", "127.0.0.1"):
            assert status(server, host).status == 200, host
        for host in ("example.org", "a.nas", "photos.example.org.evil.example", "192.0.2.7"):
            assert status(server, host).status == 421, host


@pytest.mark.parametrize("name", ["http://nas", "nas:8000", "a b", "", "*"])
def test_a_name_that_cannot_be_is_one_line(index_folder, name):
    line = refusal("serve", index_folder, "--port", 0, "--allowed-host", name)
    assert line.startswith(f"error: --allowed-host {name}: ")


@pytest.mark.parametrize(
    ("header", "own", "answered"),
    [
        ("192.0.2.7:8000", "192.0.2.7", True),
        ("192.0.2.8:8000", "192.0.2.7", False),
        ("192.0.2.7", "::ffff:192.0.2.7", True),  # of a socket that listens on ::
        ("[2001:DB8:0::1]:8000", "2001:db8::1", True),
        ("[2001:db8::2]", "2001:db8::1", False),
        ("[::ffff:127.0.0.1]", "192.0.2.7", True),
    ],
)
def test_the_address_that_a_connection_came_in_at_is_answered(header, own, answered):
    assert limits.is_answered(limits.host_of(header), own, frozenset()) == answered


def get(address):
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        return answer.read(), answer.headers


def test_the_page_and_the_json_work_under_a_path_of_a_proxy(server, photo):
    with proxied(server) as base:
        assert urlsplit(base).path == "/photos/"
        with pytest.raises(urllib.error.HTTPError):
            get(urljoin(base, "/"))  # the root is another's
        page = get(base + "?q=a+red+circle")[0].decode()
        addresses = set(re.findall(r'(?:href|src|action)="([^"#][^"]*)"', page))
        for kind in ("static/", "thumbnails/", "images/", "./?like=", "./?q="):
            assert any(address.startswith(kind) for address in addresses), kind
        for address in addresses:
            assert get(urljoin(base, address.replace("&amp;", "&")))[0]
        search = base + "search?q=a+red+circle"
        for result in json.loads(get(search)[0])["results"]:
            assert get(urljoin(search, result["image"]))[0]
            assert get(urljoin(search, result["thumbnail"]))[0][:2] == b"\xff\xd8"
        described = json.loads(get(base + "openapi.json")[0])
        assert urljoin(base + "openapi.json", described["servers"][0]["url"]) == base
        whole = form(photo)
        asked = urllib.request.Request(base, whole["body"], {"Content-Type": whole["content_type"]})
        assert 'src="thumbnails/' in get(asked)[0].decode()
