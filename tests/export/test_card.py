import re
from dataclasses import replace
from pathlib import Path

import pytest

from crosstill import export
from crosstill.data.pairs import read_licence
from crosstill.evaluate.recall import Retrieval
from crosstill.export.card import Facts, Origin, Rounding, Score, standing
from crosstill.export.card import card as card_of
from crosstill.pixels import Preprocess

HEADS = Retrieval.heads
FORMS = export.FORMS.names()
FREE = Facts(
    name="small",
    parameters={"image tower": 1_000_000, "heads": 2_000, "total": 1_002_000},
    dim=512,
    max_length=30,
    preprocess=Preprocess(size=(160, 160)),
    data=Origin("photos", "apache-2.0"),
    teacher=Origin("big", "apache-2.0", "owner/big"),
    towers={"image": Origin("mobilenet", "apache-2.0", "google/mobilenet_v2_1.0_224")},
    scores=(
        Score("teacher", "test", 1000, 5000, (50.0, 60.0, 70.0, 40.0, 50.0, 60.0, 330.0), HEADS),
        Score("student", "test", 1000, 5000, (45.5, 55.25, 65.0, 35.0, 45.0, 55.0, 300.75), HEADS),
    ),
    command="crosstill export runs/mine --to onnx",
    version="0.1.0",
    fingerprint="f" * 64,
)


def card(facts: Facts, form: str) -> str:
    return card_of(facts, export.FORMS.find(form)())


def _front(text: str) -> dict[str, str | list[str]]:
    """The front matter, read as the YAML that it is."""
    found: dict[str, str | list[str]] = {}
    key = ""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert head
    for line in head[1].splitlines():
        if line.startswith("- "):
            held = found[key] or []
            assert isinstance(held, list)
            found[key] = [*held, line[2:]]
        else:
            key, _, value = line.partition(":")
            assert key not in found and re.fullmatch(r"[a-z_]+", key)
            found[key] = value.strip()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_it_tells_all_there_is(form: str) -> None:
    text = card(FREE, form)
    front = _front(text)
    assert front["license"] == "apache-2.0" and front["library_name"] == form
    assert front["base_model"] == ["google/mobilenet_v2_1.0_224", "owner/big"]
    assert "crosstill" in front["tags"] and front["pipeline_tag"]
    for told in (
        "# small\n",
        "512 dimensions",
        "| student | test | 45.50 | 55.25 | 65.00 | 35.00 | 45.00 | 55.00 | 300.75 |",
        "Split test: 1,000 images, 5,000 captions.",
        "| image tower | 1,000,000 |",
        "squashed to 160 x 160 pixels",
        "up to 30 tokens",
        "f" * 64,
        "    crosstill export runs/mine --to onnx\n",
        "By crosstill 0.1.0",
        "- The teacher: [big](https://huggingface.co/owner/big), licence: apache-2.0",
        "- The data: photos, licence: apache-2.0",
    ):
        assert told in text, told
    assert "\n> " not in text  # no warning


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("transformers", ["AutoModel.from_pretrained", "truncation=True", "transformers 5"]),
        ("sentence-transformers", ["SentenceTransformer(FOLDER)", "sentence-transformers 6"]),
        ("onnx", ["onnxruntime", "crosstill index", "no torch"]),
    ],
)
def test_how_to_load_it_is_that_forms(form: str, words: list[str]) -> None:
    told = card(FREE, form).partition("## How to load it")[2]
    assert all(word in told for word in words)


def test_equal_facts_give_equal_cards() -> None:
    assert card(FREE, "onnx") == card(replace(FREE), "onnx")


def test_a_licence_of_trade_alone_is_warned_of() -> None:
    facts = replace(FREE, teacher=Origin("big", "cc-by-nc-4.0"), data=Origin("photos", None))
    text = card(facts, "onnx")
    assert "**Not for commercial use.** The licence of the teacher (big: cc-by-nc-4.0)" in text
    assert "**A licence is not known.** Read or ask for that of the data (photos" in text
    front = _front(text)
    assert front["license"] == "other" and front["license_name"] == "non-commercial-see-the-card"
    assert text.index("**Not for") < text.index("## Recall")


def test_a_tower_counts_too() -> None:
    facts = replace(FREE, towers={"text": Origin("words", "apple-amlr")})
    assert "the text tower (words: apple-amlr)" in card(facts, "onnx").partition("## Recall")[0]


def test_licences_that_differ_are_left_to_the_reader() -> None:
    front = _front(card(replace(FREE, data=Origin("photos", "mit")), "onnx"))
    assert (front["license"], front["license_name"]) == ("other", "see-the-card")


def test_the_licence_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for data, expected in (("apache-2.0", "apache-2.0"), ("cc-by-nc-4.0", "other")):
        facts = replace(FREE, data=Origin("photos", data))
        (tmp_path / "README.md").write_text(card(facts, "transformers"), encoding="utf-8")
        assert read_licence(tmp_path) == expected


def test_what_int8_lost() -> None:
    text = card(replace(FREE, rounding=Rounding("val", 500.0, 496.0)), "onnx")
    assert "RSUM on val is 496.00, and was 500.00 in float32: a loss of 0.80 %" in text
    assert Rounding("val", 0.0, 0.0).loss == 0


def test_little_is_known() -> None:
    facts = replace(FREE, teacher=None, towers={}, scores=(), data=Origin("not known"))
    text = card(facts, "onnx")
    assert "Not measured." in text and "base_model" not in _front(text)
    assert "distilled from" not in text


@pytest.mark.parametrize("resize", ["squash", "crop", "fit"])
def test_every_preprocess_has_words(resize: str) -> None:
    shorter = None if resize == "squash" else 200
    facts = replace(FREE, preprocess=Preprocess(size=(160, 160), resize=resize, shorter=shorter))
    assert ("200" in card(facts, "onnx")) == (resize != "squash")


def test_names_cannot_break_the_card() -> None:
    odd = "a|b\n---\n# <script>`x`"
    facts = replace(
        FREE,
        name=odd,
        command="crosstill export\nrm",
        data=Origin(odd, odd, "javascript:x"),
        scores=(replace(FREE.scores[0], model=odd, split=odd),),
    )
    text = card(facts, "onnx")
    assert _front(text)["license"] == "other"
    body = text.partition("\n---\n")[2]
    assert "\n---\n" not in body and "<script>" not in body.replace("\\<", "")
    assert "    crosstill export rm\n" in body and "javascript" not in body
    (row,) = (line for line in body.splitlines() if "40.00" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 10


@pytest.mark.parametrize(
    "licence",
    [
        "cc-by-nc-4.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-nd-4.0",
        "CC BY-NC 2.0",
        "CC_BY_NC",
        "Creative Commons Attribution-NonCommercial 4.0",
        "https://creativecommons.org/licenses/by-nc/4.0/",
        "apple-amlr",
        "Apple Machine Learning Research Model License",
        "intel-research",
        "h-research",
        "fair-noncommercial-research-license",
        "deepfloyd-if-license",
        "other (non-commercial research purposes only)",
        "Flickr terms of use; research only",
        "for academic use",
        "No commercial use.",
        "apache-2.0 and cc-by-nc-4.0",
    ],
)
def test_licences_that_forbid_trade(licence: str) -> None:
    assert standing(licence) == "bound"


@pytest.mark.parametrize(
    "licence",
    [
        "apache-2.0",
        "Apache License 2.0",
        "mit",
        "The MIT License",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "CC BY-SA 3.0",
        "Creative Commons Attribution 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "gpl-3.0",
        "openrail",
        "apple-ascl",
        "apache-2.0 and mit",
    ],
)
def test_licences_that_do_not(licence: str) -> None:
    assert standing(licence) == "free"


@pytest.mark.parametrize(
    "licence",
    [
        None,
        "",
        "  ",
        "other",
        "unknown",
        "see the website",
        "llama3.1",
        "cc",
        "cc-by-nd-4.0",
        "apache-2.0 and other",
        "free for research and commercial use",
    ],
)
def test_licences_that_somebody_has_to_read(licence: str | None) -> None:
    assert standing(licence) == "unknown"
