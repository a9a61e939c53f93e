"""Small charts as SVG text: lines, points with intervals, steps of a band.  No library, no script, no network.

A chart maps data to a fixed drawing area and is scaled by the page.  Text is
drawn in the page's own font; colours are given by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, FAINT = "#1c2733", "#d5dbe1"


@dataclass
class Chart:
    """One drawing with a horizontal and a vertical axis."""

    x: tuple[float, float]
    """Ends of the horizontal axis."""
    y: tuple[float, float]
    """Ends of the vertical axis."""
    title: str
    """Above the drawing; also what a screen reader says."""
    x_label: str = ""
    """Below the horizontal axis."""
    y_label: str = ""
    """Along the vertical axis."""
    width: int = 420
    """Of the drawing, in its own units."""
    height: int = 340
    """Likewise."""
    parts: list[str] = field(default_factory=list)
    """What was drawn so far."""

    _LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 46

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point of the data."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self._LEFT + across * (self.width - self._LEFT - self._RIGHT),
            self.height - self._BOTTOM - up * (self.height - self._TOP - self._BOTTOM),
        )

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: str, *, dashed: bool = False, width: float = 2.0
    ) -> None:
        """Draw a line through points."""
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (self.at(x, y) for x, y in zip(xs, ys, strict=True)))
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"{dash} '
            'stroke-linejoin="round"/>'
        )

    def point(self, x: float, y: float, colour: str, *, filled: bool = True, says: str = "") -> None:
        """Draw a point; ``says`` is shown when the pointer rests on it."""
        px, py = self.at(x, y)
        fill = colour if filled else "#fff"
        tip = f"<title>{escape(says)}</title>" if says else ""
        self.parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5">'
            f"{tip}</circle>"
        )

    def interval(self, x: float, low: float, high: float, colour: str) -> None:
        """Draw an upright interval, cut where it leaves the drawing."""
        low, high = max(low, self.y[0]), min(high, self.y[1])
        if low < high:
            (px, bottom), (_, top) = self.at(x, low), self.at(x, high)
            self.parts.append(
                f'<line x1="{px:.1f}" y1="{bottom:.1f}" x2="{px:.1f}" y2="{top:.1f}" stroke="{colour}" '
                'stroke-width="1.5"/>'
            )

    def text(self, x: float, y: float, words: str, colour: str = INK, anchor: str = "middle") -> None:
        """Write words at a point of the data."""
        px, py = self.at(x, y)
        self.parts.append(
            f'<text x="{px:.1f}" y="{py:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="12">'
            f"{escape(words)}</text>"
        )

    def render(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], *, standalone: bool = False
    ) -> str:
        """Return the drawing; ``standalone`` for a file of its own."""
        grid: list[str] = []
        for value, words in x_ticks:
            (px, bottom), (_, top) = self.at(value, self.y[0]), self.at(value, self.y[1])
            grid.append(_rule(px, bottom, px, top))
            grid.append(_words(px, bottom + 17, words, "middle"))
        for value, words in y_ticks:
            (left, py), (right, _) = self.at(self.x[0], value), self.at(self.x[1], value)
            grid.append(_rule(left, py, right, py))
            grid.append(_words(left - 7, py + 4, words, "end"))
        middle = (self._LEFT + self.width - self._RIGHT) / 2
        half = (self._TOP + self.height - self._BOTTOM) / 2
        labels = [
            f'<text x="{middle:.1f}" y="18" text-anchor="middle" font-size="14" font-weight="600" fill="{INK}">'
            f"{escape(self.title)}</text>",
            _words(middle, self.height - 8, self.x_label, "middle"),
            f'<text transform="translate(14 {half:.1f}) rotate(-90)" text-anchor="middle" font-size="12" '
            f'fill="#52606d">{escape(self.y_label)}</text>',
        ]
        own = ' xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif"' if standalone else ""
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>' if standalone else ""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}"{own}>'
            f"{ground}{''.join(grid)}{''.join(labels)}{''.join(self.parts)}</svg>"
        )


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends, about five."""
    rough = (high - low) / 5
    power = 10.0 ** _floor_log10(rough)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = -(-low // step)
    return [round((first + n) * step, 12) for n in range(int((high - first * step) / step + 1e-9) + 1)]


def _floor_log10(value: float) -> int:
    exponent = 0
    while 10.0**exponent > value:
        exponent -= 1
    while 10.0 ** (exponent + 1) <= value:
        exponent += 1
    return exponent


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FAINT}" stroke-width="1"/>'


def _words(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="#52606d">{escape(words)}</text>'
