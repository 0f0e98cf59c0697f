"""Two small charts as SVG, for slides.py: lines and bars.

Each is a white card with its own letters, the same on every page. Series differ in dash and marker as well as
colour, and are named at their right end or in a key, so that a chart is readable without colour.
"""
if __name__ == "__main__":
    exit("A part of slides.py; run: python classroom/slides.py --help")

from html import escape

from evaluation import page

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 56, 24, 74, 50
LOOKS = (("#1f6cb0", "", 0), ("#b4541a", "8 4", 1), ("#3b7d4f", "2 3", 2), ("#62666e", "9 3 2 3", 3))
STYLE = """text{font:14px system-ui,"Segoe UI",Roboto,sans-serif;fill:#22252a}
.title{font-weight:600;font-size:17px}.soft{fill:#62666e}.axis{stroke:#a3a6ac}.grid{stroke:#e2ded5}"""
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "M-4-4H4V4H-4Z", "M0-5L5 4H-5Z", "M0-5L5 0L0 5L-5 0Z")


def card(title, body, height=HEIGHT):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#fff" '
            f'stroke="#d0d4da"/>\n<text class="title" x="20" y="30">{escape(title)}</text>\n{body}\n</svg>\n')


def text(x, y, says, anchor="middle", kind=""):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(says)}</text>'


def mark(x, y, k):
    colour, _, shape = LOOKS[k % 4]
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{MARKS[shape]}" fill="{colour}"/>'


def ticks(low, high):
    """Round numbers between two ends, four to eight of them."""
    step = next(s for s in (.1, .2, .5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3) if (high - low) / s <= 7)
    first = -int(-low // step) if low % step else int(low // step)
    return [step * k for k in range(first, int(high // step) + 1)]


def scale(low, high, start, end):
    return lambda value: start + (value - low) / (high - low or 1) * (end - start)


def lines(title, xlabel, series, notes=()):
    """series: {name: [(x, y)]}; notes: [(x, y, words)], points that have words beside them."""
    xs, ys = ([point[side] for points in series.values() for point in points] for side in (0, 1))
    if not xs:
        return card(title, text(WIDTH / 2, HEIGHT / 2, "nothing to draw yet"))
    place_x = scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    place_y = scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP if len(series) < 3 else TOP + 16)
    body = ""
    for y in ticks(min(ys), max(ys)):
        body += f'<path class="{"grid" if y else "axis"}" d="M{LEFT} {place_y(y):.1f}H{WIDTH - RIGHT}"/>'
        body += text(LEFT - 8, place_y(y) + 5, page.num(y), "end", "soft")
    for x in ticks(min(xs), max(xs)):
        body += text(place_x(x), HEIGHT - BOTTOM + 18, page.num(x), kind="soft")
    body += text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, xlabel, kind="soft")
    for k, (name, points) in enumerate(series.items()):
        colour, dash, _ = LOOKS[k % 4]
        path = " ".join(f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in points)
        look = f'stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}"'
        body += f'\n<path d="M{path}" fill="none" {look}/>'
        step = max(1, len(points) // 5)
        body += "".join(mark(place_x(x), place_y(y), k) for x, y in points[step // 2::step])
        body += key(k, name, len(series))
    for x, y, words in notes:
        body += f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="6" fill="none" stroke="#22252a"/>'
        body += text(place_x(x) + 10, place_y(y) - 8, words, "start")
    return card(title, body)


def key(k, name, n):
    """A series' name beside its line and marker: two in a row."""
    colour, dash, _ = LOOKS[k % 4]
    x, y = 24 + k % 2 * 300, 50 + 18 * (k // 2) if n > 2 else 54
    return (f'<path d="M{x} {y - 5}h34" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}"/>'
            + mark(x + 17, y - 5, k) + text(x + 42, y, name, "start"))


def bars(title, groups):
    """groups: {name: {label: (mean, low, high)}}, a bar each with its interval, one below the other."""
    rows = [(name, label, values) for name, bars in groups.items() for label, values in bars.items()]
    ends = [0, *(x for _, _, values in rows for x in values)]
    place = scale(min(ends), max(ends), 250, WIDTH - 80)
    y, body, last = 56, "", ""
    for name, label, (mean, low, high) in rows:
        if name != last:
            body += text(20, y + 16, name, "start", "title")
            y, last = y + 28, name
        left, right = sorted((place(0), place(mean)))
        body += text(236, y + 14, label, "end")
        body += f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="18" fill="#8fb6da"/>'
        body += f'<path d="M{place(low):.1f} {y + 9}H{place(high):.1f}" stroke="#22252a" stroke-width="2"/>'
        body += text(place(max(high, 0)) + 8, y + 14, page.num(mean, "+.2f"), "start")
        y += 25
    body += f'<path class="axis" d="M{place(0):.1f} 60V{y}"/>'
    return card(title, body, y + 18)
