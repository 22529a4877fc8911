import hashlib
import re

import pytest

from crosstill.search.searcher import combine
from crosstill.search.serve.limits import HEADERS
from serving import form


def ids(found):
    return [result["id"] for result in found["results"]]


def expected(searcher, vector, top):
    return [hit.id for hit in searcher.find(vector[None], top)[0]]


def test_words_find_what_the_searcher_finds(server, searcher):
    found = server.search(q="a blue square", top=5)
    vector = searcher.encode_texts(["a blue square"])[0]
    assert ids(found) == expected(searcher, vector, 5)
    hit = searcher.find(vector[None], 1)[0][0]
    first = found["results"][0]
    assert first["score"] == pytest.approx(hit.score, abs=1e-5)
    assert (first["path"], first["caption"]) == (hit.path, hit.caption)
    assert first["image"] == f"images/{hit.id}"
    assert first["thumbnail"] == f"thumbnails/{hit.id}"
    assert found["query"] == "a blue square" and found["took_ms"] > 0
    assert found["generation"] == searcher.generation
    assert found["threshold"] is None and found["nothing_relevant"] is False


def test_what_of_the_words_counts_for_nothing_is_said(server, searcher):
    long = "a red circle " * 100
    assert server.search(q="a red circle")["notes"] == []
    notes = server.search(q=long)["notes"]
    assert notes and notes == searcher.notes(long)
    page = server.ask("/?q=" + long.replace(" ", "+")).body.decode()
    for note in notes:
        assert note[1:] + ".</p>" in page


def test_ten_results_are_given_where_none_are_asked_for(server):
    assert len(server.search(q="a circle")["results"]) == 10


def test_more_than_there_are_gives_all(server, searcher):
    assert len(server.search(q="a circle", top=1000)["results"]) == len(searcher)


def test_unknown_parameters_are_ignored(server):
    assert ids(server.search(q="a circle", utm_source="x")) == ids(server.search(q="a circle"))


def test_a_long_query_in_any_script_is_answered(server):
    longest = "雪" * 10_000
    assert server.search(q=longest)["query"] == longest


def test_a_photo_finds_itself(server, photo):
    own = hashlib.sha256(photo).hexdigest()
    for request in (form(photo), {"body": photo, "content_type": "image/png"}):
        found = server.ask("/search?top=3", "POST", **request)
        assert found.status == 200, found
        assert ids(found.json)[0] == own and len(ids(found.json)) == 3
        assert found.json["results"][0]["score"] == pytest.approx(1, abs=1e-4)


def test_a_photo_and_words_are_added(server, searcher, photo):
    text, image = searcher.encode_texts(["a circle"])[0], searcher.encode_image(photo, "photo")
    both = expected(searcher, combine(image, text), 4)
    assert ids(server.ask("/search?top=4", "POST", **form(photo, q="a circle")).json) == both
    found = server.ask("/search?top=4&q=a%20circle", "POST", **form(photo))
    assert ids(found.json) == both and found.json["query"] == "a circle"


def test_more_like_this_leaves_the_photo_itself_out(server, searcher, photo_id):
    found = ids(server.search(like=photo_id, top=6))
    assert found == expected(searcher, searcher.vector(photo_id), 7)[1:]
    moved = combine(searcher.vector(photo_id), searcher.encode_texts(["a circle"])[0])
    wanted = [key for key in expected(searcher, moved, 7) if key != photo_id][:6]
    assert ids(server.search(like=photo_id, q="a circle", top=6)) == wanted


def test_a_threshold_leaves_out_what_scores_less(server):
    everything = server.search(q="a circle", top=40)["results"]
    bound = (everything[3]["score"] + everything[4]["score"]) / 2
    assert ids(server.search(q="a circle", top=40, threshold=bound)) == [
        result["id"] for result in everything if result["score"] >= bound
    ]
    nothing = server.search(q="a circle", threshold=1)
    assert nothing["results"] == [] and nothing["nothing_relevant"] is True


def test_the_calibrated_threshold_is_for_words_alone(server, searcher, photo):
    found = server.search(q="a circle", threshold="auto")
    assert found["threshold"] == pytest.approx(searcher.threshold())
    assert all(result["score"] >= found["threshold"] for result in found["results"])
    refused = server.ask("/search?threshold=auto", "POST", **form(photo))
    assert refused.status == 400 and "words alone" in refused.json["error"]


def test_health_readiness_and_metrics(server):
    assert server.ask("/healthz").json == {"status": "alive"}
    assert server.ask("/readyz").json["status"] == "ready"
    before = server.metric('crosstill_requests_total{route="/search",status="200"}')
    server.search(q="a circle")
    after = server.metric('crosstill_requests_total{route="/search",status="200"}')
    assert after == before + 1
    assert server.metric("crosstill_index_photos") == 40
    assert server.metric("crosstill_index_generation") >= 1
    assert server.metric("crosstill_batch_size_count") >= 1
    assert server.metric("crosstill_queue") == 0
    assert server.metric("process_resident_memory_bytes") > 1e7
    assert server.ask("/metrics").headers["content-type"].startswith("text/plain")


def test_what_was_asked_for_is_no_label(server):
    server.ask("/a-path-nobody-has")
    server.ask("/images/" + "0" * 64)
    text = server.ask("/metrics").body.decode()
    assert "a-path-nobody-has" not in text and "0" * 64 not in text
    assert 'route="other",status="404"' in text


def test_the_routes_describe_themselves_and_load_nothing_from_elsewhere(server):
    described = server.ask("/openapi.json").json
    assert {"/search", "/images/{photo_id}", "/thumbnails/{photo_id}"} <= set(described["paths"])
    answer = described["paths"]["/search"]["get"]["responses"]["200"]["content"]
    assert answer["application/json"]["schema"]["$ref"].endswith("/Answer")
    for path in ("/docs", "/redoc"):
        assert server.ask(path).status == 404


@pytest.mark.parametrize("target", ["/", "/search?q=a", "/search?q=", "/nowhere", "/healthz"])
def test_every_answer_has_the_headers_that_protect(server, target):
    found = server.ask(target)
    for name in HEADERS:
        assert found.headers[name], name
    assert found.headers["x-content-type-options"] == "nosniff"
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and not re.search("unsafe|https?:|\\*", policy)
    assert "server" not in found.headers


def test_head_is_get_without_the_body(server, photo_id):
    for target in ("/search?q=a", f"/images/{photo_id}", "/", "/healthz"):
        whole, head = server.ask(target), server.ask(target, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert server.ask("/search", "HEAD").status == 400


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "BREW"])
def test_other_methods_are_refused(server, method):
    found = server.ask("/search?q=a", method)
    assert found.status == 405 and found.json == {"error": "method not allowed"}
    assert "GET" in found.headers["allow"]
    assert "access-control-allow-origin" not in found.headers


def test_connections_are_kept(server):
    request = b"GET /search?q=a HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as line:
        for _ in range(3):
            line.sendall(request)
            answer = line.makefile("rb")
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            for row in iter(answer.readline, b"\r\n"):
                if row.startswith(b"content-length"):
                    length = int(row.split()[1])
            assert answer.read(length).endswith(b"}")


def test_parts_of_a_form_that_are_not_known_are_refused(server, photo):
    edge = b"--edge\r\nContent-Disposition: form-data; name="
    top = edge + b'"top"\r\n\r\n1\r\n'
    image = edge + b'"image"; filename="a.png"\r\n\r\n' + photo + b"\r\n"
    for body, said in ((top + image, "top and threshold go into the address"), (b"", "no photo")):
        kind = "multipart/form-data; boundary=edge"
        found = server.ask("/search", "POST", body + b"--edge--\r\n", content_type=kind)
        assert found.status == 400 and said in found.json["error"], found
    whole = server.ask("/search?top=1", "POST", image + b"--edge--\r\n", content_type=kind)
    assert whole.status == 200 and len(whole.json["results"]) == 1
