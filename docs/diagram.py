"""Draw a diagram, described by lines of text, as SVG. generate.py calls it; nothing but the standard library is needed.

    size WIDTH HEIGHT
    box NAME X Y WIDTH HEIGHT "title" "line" …
    arrow FROM TO "label"        from the right side of a box to the left side of another one, both ways

The colours suit a light and a dark page: boxes have their own background, arrows and labels are grey.
"""

import shlex
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
LINE_HEIGHT, TITLE_SIZE, TEXT_SIZE = 18, 15, 12.5


class Box(NamedTuple):
    """A box of the diagram, in pixels from the top left corner, and its lines of text."""

    x: int
    y: int
    width: int
    height: int
    texts: tuple[str, ...]


def draw(description: str) -> str:
    """Return the SVG. Raises ValueError for a line that is none of the three."""
    width, height = 0, 0
    boxes: dict[str, Box] = {}
    parts: list[str] = []
    for line in description.splitlines():
        kind, *values = shlex.split(line, comments=True) or [""]
        if kind == "size":
            width, height = map(int, values)
        elif kind == "box":
            name, x, y, box_width, box_height, *texts = values
            boxes[name] = Box(int(x), int(y), int(box_width), int(box_height), tuple(texts))
            parts += box_lines(boxes[name])
        elif kind == "arrow":
            parts += arrow_lines(boxes[values[0]], boxes[values[1]], values[2])
        elif kind:
            raise ValueError(f"not a line of a diagram: {line}")
    title = (
        "<title>Clients call the gateway, which calls llama-server; a supervisor and a health server stand by.</title>"
    )
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>"
    return "\n".join([head, title, *parts, "</svg>", ""])


def box_lines(box: Box) -> Iterator[str]:
    yield (
        f"<rect x='{box.x}' y='{box.y}' width='{box.width}' height='{box.height}' rx='8' fill='#f4f6fb'"
        " stroke='#4a63a8' stroke-width='1.5'/>"
    )
    first_y = box.y + box.height / 2 - (len(box.texts) - 1) * LINE_HEIGHT / 2 + 5
    for number, text in enumerate(box.texts):
        size, weight, colour = (TITLE_SIZE, 600, "#1d2b53") if number == 0 else (TEXT_SIZE, 400, "#3d4663")
        yield (
            f"<text x='{box.x + box.width / 2:g}' y='{first_y + number * LINE_HEIGHT:g}' text-anchor='middle'"
            f" font-size='{size}' font-weight='{weight}' fill='{colour}'>{escape(text)}</text>"
        )


def arrow_lines(start: Box, end: Box, label: str) -> Iterator[str]:
    left, right = start.x + start.width + 4, end.x - 4
    y = start.y + start.height / 2
    heads = f"M{right - 8} {y - 5:g}L{right} {y:g}L{right - 8} {y + 5:g}"
    heads += f"M{left + 8} {y - 5:g}L{left} {y:g}L{left + 8} {y + 5:g}"
    yield f"<path d='M{left} {y:g}H{right}{heads}' fill='none' stroke='#7d869c' stroke-width='2'/>"
    yield (
        f"<text x='{(left + right) / 2:g}' y='{y - 10:g}' text-anchor='middle' font-size='{TEXT_SIZE}'"
        f" fill='#7d869c'>{escape(label)}</text>"
    )
