"""The page in Debian's Chromium, over the command that ships."""

import base64
import shutil

import pytest

from serving import proxied
from support import PATIENCE

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
expect = playwright.expect
expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


class Visit:
    """A page in a window of its own, and all that it said and asked for."""

    def __init__(self, browser, base, **window):
        self.base, self.said, self.asked = base, [], []
        self.context = browser.new_context(base_url=base, **window)
        self.context.set_default_timeout(1000 * PATIENCE)
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page = self.context.new_page()
        self.page.on("console", self._say)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def _say(self, message):
        # Chromium's own page around a single photo is not ours
        if "/images/" not in message.location["url"]:
            self.said.append(message.text)

    def elsewhere(self):
        ours = (self.base, f"blob:{self.base}")
        return [url for url in self.asked if not url.startswith(ours)]


@pytest.fixture
def visit(browser, server):
    visits = []

    def start(**window):
        visits.append(Visit(browser, f"http://127.0.0.1:{server.port}/", **window))
        return visits[-1].page

    start.visits = visits
    yield start
    for one in visits:
        one.context.close()
        assert one.elsewhere() == []
        refused = "Failed to load resource: the server responded with a status of 4"
        assert [line for line in one.said if not line.startswith(refused)] == []


def heading(page):
    return page.get_by_role("heading", level=1)


def results(page):
    return page.get_by_role("main").get_by_role("listitem")


def box(page):
    return page.get_by_role("searchbox", name="Describe the photo")


def search(page, words):
    box(page).fill(words)
    box(page).press("Enter")
    expect(heading(page)).to_have_text(f"“{words}”")


def carried(page, data, name="photo.png"):
    """A DataTransfer that holds the photo, as a drop and a paste bring it."""
    return page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const held = new DataTransfer();
            held.items.add(new File([bytes], name, { type: "image/png" }));
            return held;
        }""",
        [base64.b64encode(data).decode(), name],
    )


def chosen(data, name="photo.png"):
    return {"name": name, "mimeType": "image/png", "buffer": data}


@pytest.fixture
def huge(tmp_path):
    """A file of 21 MiB."""
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(21 * 2**20)
    return path


def loaded(image):
    return image.evaluate("(image) => image.decode().then(() => image.naturalWidth)")


def focused(page):
    return page.evaluate(
        "document.activeElement.closest('.results li')?.id || document.activeElement.id"
    )


def test_words_find_photos(visit, searcher):
    page = visit()
    page.goto("/")
    expect(heading(page)).to_have_text(f"Search {len(searcher)} photos")
    expect(box(page)).to_be_focused()
    search(page, "a red circle")
    expect(results(page)).to_have_count(24)
    count = f"24 closest of {len(searcher)} photos"
    expect(page).to_have_title(f"“a red circle”: {count} · crosstill")
    expect(page.get_by_role("status")).to_have_text(count)
    hit = searcher.find(searcher.encode_texts(["a red circle"]), 1)[0][0]
    first = results(page).first
    expect(first).to_contain_text(hit.path)
    expect(first).to_contain_text(f"Score {hit.score:.3f}")
    assert loaded(first.get_by_role("img")) > 0
    assert "photo=" not in page.url and "image=" not in page.url


@pytest.mark.slow
def test_under_a_path_of_a_proxy(browser, server, photo):
    with proxied(server) as base:
        visited = Visit(browser, base)
        page = visited.page
        page.goto(base)
        search(page, "a red circle")
        expect(results(page)).to_have_count(24)
        assert loaded(results(page).first.get_by_role("img")) > 0
        results(page).first.get_by_role("link", name="More like this").click()
        assert loaded(page.get_by_role("img", name="The photo asked for")) > 0
        page.get_by_label("Search by a photo").set_input_files(chosen(photo))
        expect(heading(page)).to_have_text("Photos like yours")
        page.get_by_role("link", name="crosstill").click()
        assert page.url == base
        visited.context.close()
        assert [url for url in visited.elsewhere() if not url.startswith("blob:")] == []
        assert visited.said == []


@pytest.mark.slow
def test_more_are_shown(visit, searcher):
    page = visit()
    page.goto("/?q=a+red+circle")
    page.get_by_role("link", name="Show more").click()
    expect(results(page)).to_have_count(len(searcher))
    assert page.url.endswith("&top=48#r25")
    expect(page.locator("#r25")).to_be_in_viewport()


@pytest.mark.slow
def test_more_like_one_and_with_words(visit):
    page = visit()
    page.goto("/?q=a+red+circle")
    third = results(page).nth(2)
    path = third.locator(".path").inner_text()
    third.get_by_role("link", name="More like this").click()
    expect(heading(page)).to_have_text("Photos like this one")
    assert loaded(page.get_by_role("img", name="The photo asked for")) > 0
    assert path not in page.locator(".path").all_inner_texts()
    box(page).fill("a blue square")
    page.get_by_role("checkbox", name="Add the words to this photo").check()
    box(page).press("Enter")
    expect(heading(page)).to_have_text("Photos like this one, with “a blue square”")
    search_without_it = page.get_by_role("checkbox", name="Add the words to this photo")
    search_without_it.uncheck()
    box(page).press("Enter")
    expect(heading(page)).to_have_text("“a blue square”")


def test_a_chosen_photo_finds_itself(visit, photo, photo_id):
    page = visit()
    page.goto("/")
    page.get_by_label("Search by a photo").set_input_files(chosen(photo))
    expect(heading(page)).to_have_text("Photos like yours")
    expect(results(page).first).to_contain_text("Score 1.000")
    assert loaded(page.get_by_role("img", name="The photo asked for")) > 0
    results(page).first.get_by_role("link").first.click()
    page.wait_for_url("**/images/*")
    page.go_back()
    expect(heading(page)).to_have_text("Photos like yours")


@pytest.mark.slow
def test_a_dropped_photo(visit, photo):
    page = visit()
    page.goto("/?q=a+red+circle")
    held = carried(page, photo)
    page.dispatch_event("footer", "dragover", {"dataTransfer": held})
    expect(page.get_by_text("Drop the photo to search by it")).to_be_visible()
    page.dispatch_event("footer", "dragleave", {})
    expect(page.get_by_text("Drop the photo to search by it")).to_be_hidden()
    page.dispatch_event("footer", "drop", {"dataTransfer": held})
    # the words of the search before are not added to it
    expect(heading(page)).to_have_text("Photos like yours")
    expect(results(page).first).to_contain_text("Score 1.000")


@pytest.mark.slow
def test_a_pasted_photo_with_words(visit, photo):
    page = visit()
    page.goto("/")
    box(page).fill("on grass")
    held = carried(page, photo)
    page.evaluate(
        """(held) => document.body.dispatchEvent(
            new ClipboardEvent("paste", { clipboardData: held, bubbles: true }))""",
        held,
    )
    expect(heading(page)).to_have_text("Photos like yours, with “on grass”")


@pytest.mark.slow
def test_nothing_relevant(visit, searcher):
    """A student that was not trained fits some words worse than the captions it knows."""
    words = [
        "a",
        "an",
        "the",
        "red",
        "blue",
        "green",
        "circle",
        "square",
        "star",
        "on",
        "in",
        "of",
        "and",
        "small",
        "large",
        "two",
    ]
    texts = [f"{one} {other}" for one in words for other in words]
    best = [hits[0].score for hits in searcher.find(searcher.encode_texts(texts), 1)]
    text = texts[best.index(min(best))]
    assert min(best) < searcher.threshold()
    page = visit()
    page.goto("/")
    box(page).fill(text)
    page.get_by_role("checkbox", name="Only relevant photos").check()  # which sends the form
    expect(heading(page)).to_have_text(f"“{text}”")
    expect(page.get_by_role("main")).to_contain_text("Nothing relevant found")
    expect(results(page)).to_have_count(0)
    page.get_by_role("link", name="Show the closest photos anyway").click()
    expect(results(page)).to_have_count(24)
    expect(page.get_by_role("checkbox")).not_to_be_checked()


@pytest.mark.slow
def test_a_broken_upload(visit):
    page = visit()
    page.goto("/")
    with page.expect_navigation() as sent:
        page.get_by_label("Search by a photo").set_input_files(chosen(b"no photo", "x.png"))
    assert sent.value.status == 400
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("This file cannot be read as a photo: not an image.")
    search(page, "a red circle")


@pytest.mark.slow
def test_a_photo_that_is_too_large_is_not_sent(visit, huge):
    page = visit()
    page.goto("/")
    page.get_by_label("Search by a photo").set_input_files(huge)
    expect(page.get_by_text("This photo is too large: at most 20 MB can be sent.")).to_have_count(2)
    assert "POST" not in [request.method for request in page.requests()]


def test_without_scripts(visit, photo, huge):
    page = visit(java_script_enabled=False)
    page.goto("/")
    search(page, "a red circle")
    expect(results(page)).to_have_count(24)
    results(page).first.get_by_role("link", name="More like this").click()
    expect(heading(page)).to_have_text("Photos like this one")
    page.get_by_label("Search by a photo").set_input_files(chosen(photo))
    page.get_by_role("button", name="Search by this photo").click()
    expect(heading(page)).to_have_text("Photos like yours")
    page.get_by_label("Search by a photo").set_input_files(huge)
    with page.expect_navigation() as sent:
        page.get_by_role("button", name="Search by this photo").click()
    assert sent.value.status == 413


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "lightest"),
    [("light", 255), ("dark", 40)],
)
def test_light_and_dark(visit, scheme, lightest):
    page = visit(color_scheme=scheme)
    page.goto("/?q=a+red+circle")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.body).color")
    levels = [max(map(int, one[4:-1].split(","))) for one in (colour, ink)]
    assert levels[0] <= lightest and (levels[0] > levels[1]) == (scheme == "light")


def test_a_phone(visit, photo, photo_id):
    page = visit(**PHONE)
    addresses = ("/", "/?q=a+red+circle", f"/?like={photo_id}", "/?like=x", "/?q=" + "long" * 200)
    for address in addresses:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") == 390, address
        small = page.evaluate(
            """[...document.querySelectorAll("a, button, label")].filter((one) => {
                const { width, height } = one.getBoundingClientRect();
                return !one.closest(".skip, .unseen, p.nothing, .hints, .message")
                    && width > 1 && (width < 24 || height < 24);
            }).map((one) => one.outerHTML)"""
        )
        assert small == [], address
    page.goto("/")
    page.get_by_label("Search by a photo").set_input_files(chosen(photo))
    expect(heading(page)).to_have_text("Photos like yours")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    columns = {results(page).nth(i).bounding_box()["x"] for i in range(6)}
    assert len(columns) == 2


@pytest.mark.slow
def test_the_layout_does_not_jump(visit):
    page = visit()
    page.route("**/thumbnails/*", lambda route: None)  # which never answers
    page.goto("/?q=a+red+circle", wait_until="domcontentloaded")
    before = results(page).nth(20).bounding_box()
    page.unroute_all(behavior="ignoreErrors")
    page.goto("/?q=a+red+circle", wait_until="networkidle")
    assert results(page).nth(20).bounding_box() == before


def test_keys_alone(visit):
    page = visit()
    page.goto("/?q=a+red+circle")
    press = page.keyboard.press
    press("Tab")
    skip = page.get_by_role("link", name="Skip to the results")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    press("/")
    expect(box(page)).to_be_focused()
    page.keyboard.type("a blue square/")
    expect(box(page)).to_have_value("a blue square/")
    press("Enter")
    expect(heading(page)).to_have_text("“a blue square/”")
    box(page).focus()
    seen = []
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "End", "Home"):
        press(key)
        seen.append(focused(page))
    row = page.evaluate(
        """() => { const tops = [...document.querySelectorAll(".results li")].map(
            (one) => one.offsetTop); return tops.filter((top) => top === tops[0]).length; }"""
    )
    assert row > 1
    assert seen == ["r1", "r2", f"r{2 + row}", "r2", "r1", "r24", "r1"]
    press("Enter")
    page.wait_for_url("**/images/*")


@pytest.mark.slow
def test_what_has_the_focus_can_be_seen(visit):
    page = visit()
    page.goto("/?q=a+red+circle")
    for _ in range(9):
        page.keyboard.press("Tab")
        drawn = page.evaluate(
            """() => { const at = document.activeElement;
              const shown = [at, at.closest(".box"), at.parentElement.querySelector("label")];
              return shown.filter(Boolean).some((one) => { const style = getComputedStyle(one);
                return style.outlineStyle !== "none" || style.boxShadow !== "none"; }); }"""
        )
        assert drawn, page.evaluate("document.activeElement.outerHTML")


def test_what_a_screen_reader_is_told(visit, searcher):
    page = visit()
    page.goto("/?q=a+red+circle&relevant=0")
    expect(page.locator("body")).to_match_aria_snapshot(
        r"""
        - link "Skip to the results"
        - banner:
          - link "crosstill"
          - search:
            - searchbox "Describe the photo": a red circle
            - button "Search"
            - text: Search by a photo
            - button "Search by a photo"
            - checkbox "Only relevant photos"
        - main:
          - heading "“a red circle”" [level=1]
          - paragraph: /24 closest of \d+ photos/
          - list:
            - listitem:
              - link:
                - img
              - paragraph:
                - text: /Score -?\d\.\d+/
                - 'link /More like this: .*png/'
              - paragraph: /png/
        - contentinfo:
          - paragraph: /\d+ photos · generation \d+/
        - status: /24 closest/
        """
    )
    unnamed = page.evaluate(
        """[...document.querySelectorAll("a, button, input, img:not([alt=''])")].filter((one) =>
            !(one.innerText || one.alt || one.querySelector("img")?.alt || one.labels?.length)
        ).map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.slow
def test_nothing_moves_for_who_wants_no_motion(visit):
    page = visit()
    page.goto("/?q=a+red+circle")
    image = results(page).first.get_by_role("img")
    for wanted, moves in (("reduce", False), ("no-preference", True)):
        page.emulate_media(reduced_motion=wanted)
        duration = image.evaluate("(image) => getComputedStyle(image).transitionDuration")
        assert (duration != "0s") == moves
