"""Tables as text: Markdown for a page, LaTeX for a paper."""

from __future__ import annotations

from collections.abc import Sequence

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


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, at the right."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *body])


def latex(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular (booktabs)."""
    first, *rows = (" & ".join(map(_tex, cells)) + r" \\" for cells in [heads, *body])
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


def _tex(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)
