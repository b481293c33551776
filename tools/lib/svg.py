"""Line charts as SVG: axes with round ticks, one colour per series, names in a legend."""
import math
from xml.sax.saxutils import escape

# Okabe and Ito's palette, told apart by colour-blind readers, too; dashes beyond its end.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 15, 45


def ticks(low, high, count=6):
    """Round numbers from low to high, about so many."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def lines(x_title, y_title, series, log=False):
    """`series`: name -> [(x, y), ...]; an empty one only takes its colour. With `log`, a logarithmic y axis."""
    points = [point for values in series.values() for point in values]
    height = (lambda y: math.log10(y)) if log else (lambda y: y)
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(height(y) for _, y in points), max(height(y) for _, y in points)
    y0, y1 = y0 - 0.03 * (y1 - y0 or 1), y1 + 0.03 * (y1 - y0 or 1)
    px = lambda x: LEFT + (x - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - RIGHT)
    py = lambda y: HEIGHT - BOTTOM - (height(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for x in ticks(x0, x1):
        out.append(f'<line x1="{px(x):.1f}" y1="{TOP}" x2="{px(x):.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    for y in [10.0**e for e in range(math.ceil(y0), math.floor(y1) + 1)] if log else ticks(y0, y1):
        out.append(f'<line x1="{LEFT}" y1="{py(y):.1f}" x2="{WIDTH - RIGHT}" y2="{py(y):.1f}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>')
    out.append(f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    drawn = [(i, name, values) for i, (name, values) in enumerate(series.items()) if values]
    for place, (i, name, values) in enumerate(drawn):
        style = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.8"' + (' stroke-dasharray="6 3"' if i >= len(COLOURS) else "")
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in values)
        out.append(f'<polyline points="{path}" fill="none" {style}/>')
        row = TOP + 14 + 18 * place
        out.append(f'<line x1="{WIDTH - RIGHT + 12}" y1="{row - 4}" x2="{WIDTH - RIGHT + 36}" y2="{row - 4}" {style}/>')
        out.append(f'<text x="{WIDTH - RIGHT + 42}" y="{row}">{escape(name)}</text>')
    return "\n".join(out + ["</svg>", ""])
