"""Line charts as SVG, readable on light and dark pages."""
import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 132, 46, 50
# How the y axis counts.
EVEN, LOGARITHMIC = "even", "logarithmic"
# Told apart by people who see colours differently (Okabe and Ito), with enough contrast on both grounds.
COLOURS = ("#0072b2", "#c24f00", "#00805d", "#b0568b")
COLOURS_ON_DARK = ("#56b4e9", "#f0904a", "#3fc79a", "#e39ac4")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 }
.curve text { fill: currentColor }
.title { font-weight: 600; font-size: 15px }
.grid { stroke: #8884; stroke-width: 1 }
.ground { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .ground { fill: #16181c } DARK }
""".strip()


def colours(of):
    """A rule for each colour: curves are drawn in the colour of their class."""
    return " ".join(f".c{i} {{ color: {colour} }}" for i, colour in enumerate(of))


STYLE = f"{colours(COLOURS)}\n{STYLE}".replace("DARK", colours(COLOURS_ON_DARK))


@dataclass
class Line:
    """One curve: points in the order of x."""
    name: str
    points: list
    colour: int = 0
    dashed: bool = False


def ticks(top, n=5):
    """Round numbers from zero to just over `top`."""
    rough = top / n
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if rough <= size * m)
    return [step * i for i in range(math.ceil(top / step) + 1)]


def powers(curves):
    """The powers of ten around all that the curves show."""
    ys = [y for curve in curves for _, y in curve.points if 0 < y]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    return [10.0 ** e for e in range(low, max(high, low + 1) + 1)]


def number(value):
    """A tick's label."""
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def lines(title, x_label, y_label, curves, scale=EVEN):
    """The picture's text. The x axis has a place for each x that occurs, as doubling counts want it."""
    xs = sorted({x for curve in curves for x, _ in curve.points})
    marks = powers(curves) if scale == LOGARITHMIC else ticks(max(y for curve in curves for _, y in curve.points))
    def at_x(x):
        return LEFT + xs.index(x) * (WIDTH - LEFT - RIGHT) / max(1, len(xs) - 1)
    def at_y(y):
        share = y / marks[-1]
        if scale == LOGARITHMIC:
            share = math.log(max(y, marks[0]) / marks[0]) / math.log(marks[-1] / marks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
           f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>",
           f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
           f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
           f'<text x="{LEFT}" y="39" opacity=".75">{escape(y_label)}</text>']
    for mark in marks:
        y = at_y(mark)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(mark)}</text>')
    for x in xs:
        out.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{number(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle" opacity=".75">{escape(x_label)}</text>')
    # Names stand at the ends of their curves, pushed apart where ends are near.
    names, below = {}, HEIGHT
    for curve in sorted(curves, key=lambda c: c.points[-1][1]):
        below = min(at_y(curve.points[-1][1]) + 4, below - 16)
        names[id(curve)] = below
    for curve in curves:
        out.append(f'<g class="curve c{curve.colour}">')
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in curve.points)
        out.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2.5" stroke-linejoin="round"{dash}/>')
        for x, y in curve.points:
            label = f"{curve.name}, {number(x)}: {y:,.4g}"
            out.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="currentColor"><title>{escape(label)}</title></circle>')
        x = at_x(curve.points[-1][0]) + 10
        out.append(f'<text x="{x:.1f}" y="{names[id(curve)]:.1f}">{escape(curve.name)}</text></g>')
    return "\n".join(out + ["</svg>", ""])
