"""What is known of a licence, as model cards and people write it. This reads, it does not judge."""

from __future__ import annotations

import re
from typing import Literal

Standing = Literal["free", "bound", "unknown"]

_BOUND = re.compile(
    r"\bnc\b|non-? ?commercial|no(t for)? commercial|research|academic|educational|personal use"
    r"|evaluation only|apple-amlr|deepfloyd-if"
)
# "for research and commercial use" names research, and binds nobody to it.
_BOTH = re.compile(r"\b(research|academic|educational|personal)( use)?( and|,? or|,) commercial")
_FREE = re.compile(
    r"(apache|mit\b|bsd|isc\b|zlib|[al]?gpl|mpl|epl|eupl|afl|artistic|bsl-1|boost|unlicense|wtfpl"
    r"|cc-?0|cc-by(-sa)?(-\d|$)|https?://creativecommons\.org/(licenses/by(-sa)?/|publicdomain)"
    r"|public domain|pddl|odc-by|odbl|cdla|c-uda|ecl|osl|etalab|ms-pl|ncsa|ofl|postgresql|lppl"
    r"|apple-ascl|openmdw|openrail|bigscience|bigcode|creativeml)"
)


def standing(licence: str | None) -> Standing:
    """What is known of a licence.

    Of several in one text ("apache-2.0 and cc-by-nc-4.0") the strictest counts.

    Returns:
        "bound" where it forbids use in trade, or allows research alone; "free" where it is known
        by name not to; else "unknown", as "other" is: somebody has to read it.
    """
    text = " ".join((licence or "").lower().replace("_", "-").split())
    if _BOUND.search(_BOTH.sub("", text)):
        return "bound"
    parts = [_one_spelling(part) for part in re.split(r" and | & |[;+]", text)]
    return "free" if all(_FREE.match(part) for part in parts) else "unknown"


def non_commercial(licence: str | None) -> bool:
    """Whether a licence is known to forbid use in trade, or to allow research alone."""
    return standing(licence) == "bound"


def _one_spelling(text: str) -> str:
    """Creative Commons BY-SA 4.0 and CC BY-SA 4.0 as cc-by-sa-4.0."""
    text = text.strip(" .'\"").removeprefix("the ").replace("creative commons", "cc")
    text = text.replace("attribution", "by").replace("sharealike", "sa")
    return re.sub(r"[\s-]+", "-", text) if text.startswith("cc") else text
