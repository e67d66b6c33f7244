"""The frontier of balancedness against slots moved, as SVG."""

from collections.abc import Sequence

from benchmarks.planner.measure import Row

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 320, 60, 50
_MOST_MOVED, _LEAST, _MOST = 0.25, 0.75, 1.0


def frontier_picture(rows: Sequence[Row]) -> str:
    points = [_at(float(row["moved"]), float(row["balancedness"])) for row in rows]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for percent in range(0, 26, 5):
        x, y = _at(percent / 100, _LEAST)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{percent}%</text>')
    for score in (0.75, 0.80, 0.85, 0.90, 0.95, 1.0):
        (left, y), (right, _) = _at(0.0, score), _at(_MOST_MOVED, score)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{score:.2f}</text>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#06c"/>' for x, y in points]
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">slots moved</text>')
    parts.append(
        f'<text x="{_LEFT}" y="16">balancedness after a drift of 0.3 (58 x 256 experts, 288 slots, 32 ranks)</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _at(moved: float, score: float) -> tuple[float, float]:
    x = _LEFT + moved / _MOST_MOVED * (_WIDTH - _LEFT - 20)
    y = _HEIGHT - _BOTTOM - (score - _LEAST) / (_MOST - _LEAST) * (_HEIGHT - _BOTTOM - 30)
    return x, y
