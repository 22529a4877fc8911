"""Tables as text: Markdown for a page, LaTeX for a paper."""

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


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"
