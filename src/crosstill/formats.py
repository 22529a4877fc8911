r"""Rules for file names and texts, the same for folders, shards, tables, vectors and indexes.

    hidden files     .DS_Store, ._dog.jpg, __MACOSX: passed over
    endings          in any case; `PHOTOS` are read, `UNSUPPORTED` are listed as left out
    Unicode forms    é as one character (NFC) or as two (NFD, from macOS) is one name
    texts            UTF-8, with or without a byte-order mark
    lengths          texts of similar length share a pass
    lines            end at \n, \r\n or \r and nowhere else: U+2028 is part of a caption
    tables           written as Markdown, for people or for pages, and as LaTeX

A listing that names a hidden file means it: only what is met in a folder or an archive is passed
over.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

from crosstill.errors import DataError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
_OTHERS = (".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
PHOTOS = frozenset((*_JPEG, *_OTHERS, *_NETPBM))

_RAW = (
    "3fr ari arw bay cr2 cr3 crw dcr dcs dng erf fff gpr iiq k25 kdc mdc mef mos mrw nef nrw orf "
    "ori pef raf raw rw2 rwl rwz sr2 srf srw x3f"
)
# the format's name by the ending of files that people bring and that are not read here
UNSUPPORTED = {
    **dict.fromkeys((".heic", ".heif", ".heics", ".heifs", ".hif"), "HEIC"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    ".jxl": "JPEG XL",
    **dict.fromkeys(
        (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jpm", ".jph", ".jhc"), "JPEG 2000"
    ),
    **dict.fromkeys((".psd", ".psb"), "PSD"),
    **dict.fromkeys((".tga", ".targa"), "TGA"),
    **{f".{ending}": f"camera raw ({ending.upper()})" for ending in _RAW.split()},
}
BAD_TEXT = "corrupt captions: not UTF-8"  # the reason why a caption file is left out

_LINE_END = re.compile(r"\r\n|\n|\r")
# what LaTeX writes otherwise
_SIGNS = {
    **{sign: "\\" + sign for sign in "&%_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\to$",
    "±": r"$\pm$",
    "★": r"$\star$",
    "τ": r"$\tau$",
    "−": "$-$",
    "–": "--",
}


def ending(name: str) -> str:
    """Return the ending of a file's name in lower case, such as ".jpg"; "" where it has none."""
    return os.path.splitext(name)[1].lower()


def hidden(path: str) -> bool:
    """Tell whether a part of a relative path is hidden, or is left by macOS's zip."""
    parts = path.split("/")
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts
    )


def unsupported(name: str) -> str:
    """Return why a photo of this name is not read, or "" where its ending promises no such thing.

    >>> unsupported("IMG_1.HEIC")
    'HEIC is not read; convert it to JPEG or PNG'
    """
    kind = UNSUPPORTED.get(ending(name))
    return f"{kind} is not read; convert it to JPEG or PNG" if kind else ""


def name_key(name: str) -> str:
    """Return the key under which a name meets the same name in another Unicode form."""
    return unicodedata.normalize("NFC", name)


def sidecars(photo: str) -> list[str]:
    """Return the names that the caption file of a photo may have, the likeliest first."""
    folder, name = os.path.split(photo)
    stem = os.path.splitext(name)[0]
    stems = dict.fromkeys([stem, *(unicodedata.normalize(form, stem) for form in ("NFC", "NFD"))])
    return [os.path.join(folder, f"{s}{end}") for s in stems for end in (".txt", ".TXT", ".Txt")]


def decode(data: bytes, where: str) -> str:
    """Decode a text file, without its byte-order mark.

    Raises:
        DataError: it is not UTF-8; the message names `where` and the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = len(_LINE_END.findall(data[: error.start].decode("utf-8-sig", "replace"))) + 1
        raise DataError(f"{where}, line {row}: not UTF-8 text; save the file as UTF-8") from None


def lines(text: str) -> list[str]:
    r"""Cut a text into lines; unlike `str.splitlines` only at \n, \r\n and \r.

    >>> lines("a\x0bb\r\n\nc\n")
    ['a\x0bb', '', 'c']
    """
    parts = _LINE_END.split(text)
    return parts if parts[-1] else parts[:-1]


def captions(text: str) -> list[str]:
    """Return the captions in a text, one a line; blank lines are none."""
    return [line for line in lines(text) if line.strip()]


def encodable(text: str) -> str:
    """Replace lone surrogates, as in odd file names, by "?": tokenizers take UTF-8 only."""
    return text.encode("utf-8", "replace").decode()


def cleaned(text: str) -> str:
    """Replace broken Unicode in a caption and strip it; "" where no character is visible."""
    text = encodable(text).strip()
    return text if any(c.isprintable() and not c.isspace() for c in text) else ""


def by_length(lengths: Iterable[int], size: int) -> list[list[int]]:
    """Cut rows into chunks of similar length, so that little of a padded chunk is padding.

    Args:
        lengths: of every row, in characters or tokens.
        size: rows of a chunk.

    Returns:
        Numbers of rows, the shortest first, equal ones in their order.

    >>> by_length([7, 3, 5], 2)
    [[1, 2], [0]]
    """
    counts = list(lengths)
    order = sorted(range(len(counts)), key=counts.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; all columns but the first are numbers, at the right."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *body])


def aligned(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table whose columns line up as text; all but the first are numbers."""
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in [heads, rule, *body])


def latex(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Format a LaTeX tabular (booktabs)."""
    first, *rows = (
        " & ".join("".join(_SIGNS.get(sign, sign) for sign in cell) for cell in cells) + r" \\"
        for cells in [heads, *body]
    )
    lines = [
        "% " + " ".join(title.split()),
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        first,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"
