"""The table of results: one figure of base, ours and the peer in a row, and whether ours meets its bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

HEADINGS = ("", "unit", "base", "ours", "peer", "ours/peer", "bar", "met")


@dataclass(frozen=True)
class Row:
    """One figure. None where there is none. `ratio` is ours / peer.

    `at_most` bounds ours, `ratio_at_most` bounds the ratio; a row without either informs only.
    """

    name: str
    unit: str
    ours: float | None
    peer: float | None = None
    base: float | None = None
    ratio: float | None = None
    at_most: float | None = None
    ratio_at_most: float | None = None

    @property
    def bar(self) -> str:
        """The bar in words; empty for none."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.ratio_at_most is None else f"<= {self.ratio_at_most:g} of peer"

    @property
    def met(self) -> bool | None:
        """None when nothing can be judged: no bar, or a bar on the peer without the peer."""
        if self.at_most is not None and self.ours is not None:
            return self.ours <= self.at_most
        if self.ratio_at_most is not None and self.ratio is not None:
            return self.ratio <= self.ratio_at_most
        return None

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        verdict = {True: "yes", False: "NO", None: "-" if self.bar else ""}[self.met]
        figures = (_figure(value) for value in (self.base, self.ours, self.peer, self.ratio))
        return (self.name, self.unit, *figures, self.bar, verdict)

    def as_json(self) -> dict[str, object]:
        """All fields and the verdict."""
        return {**asdict(self), "met": self.met}


def render(rows: Sequence[Row]) -> str:
    """The table as text; names to the left, figures to the right."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    shown = [
        "  ".join(
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
