"""A recording as a picture: SVG, without a library.

Above, where in memory the pages lie over the order of their first touch: a start that reads
straight through shows as lines, scattered work as a cloud, phases as steps. Below, how many
faults came in each tick, and the point where the recording settled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from xml.sax.saxutils import escape

from . import limits
from .recording import Recording, settled_at

_MIB = 1 << 20
_WIDTH = 960
_LEFT, _RIGHT = 84, 28
_TOP = 92  # title and subtitle
_PAGES_HEIGHT, _RATE_HEIGHT = 360, 120
_AXIS = 52  # below each panel: numbers and name of its axis
_GAP = 30

# Pages are counted into cells of about 2 x 2 pixels and the filled ones drawn as vertical strokes:
# a million pages in random order are then one stroke a column, and the worst case (every second
# cell) is 40,000 strokes of 8 bytes.
_COLUMNS, _ROWS = 424, 180
_BARS = 424

_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a; }
.title { font-size: 18px; font-weight: 600; fill: #1f2328; }
.name { fill: #1f2328; }
.paper { fill: #ffffff; }
.panel { fill: #f6f8fa; }
.grid { stroke: #d8dee4; stroke-width: 1; }
.pages { stroke: #0969da; fill: none; }
.rate { fill: #0969da; }
.mark { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 5 4; }
.quiet { fill: #bc4c00; opacity: 0.10; }
.note { fill: #bc4c00; font-weight: 600; }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1; }
.title, .name { fill: #f0f6fc; }
.paper { fill: #0d1117; }
.panel { fill: #151b23; }
.grid { stroke: #30363d; }
.pages { stroke: #4493f8; }
.rate { fill: #4493f8; }
.mark { stroke: #f0883e; }
.quiet { fill: #f0883e; }
.note { fill: #f0883e; }
}
"""


@dataclass(frozen=True, slots=True)
class _Panel:
    """A rectangle with linear axes: ``x`` from 0 to ``x_end`` to the right, ``y`` from 0 to ``y_end`` up."""

    top: float
    height: float
    x_end: float
    y_end: float

    left = float(_LEFT)
    width = float(_WIDTH - _LEFT - _RIGHT)

    def x(self, value: float) -> float:
        return self.left + self.width * value / self.x_end

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - value / self.y_end)


def plot_recording(recording: Recording) -> str:
    """``recording`` as an SVG document: under 300 KB for any number of pages, for light and dark surroundings."""
    ticks = recording.faults_per_tick
    height = _TOP + _PAGES_HEIGHT + _AXIS + (_GAP + _RATE_HEIGHT + _AXIS if ticks else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img" aria-label="{_title(recording)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        _text(_LEFT, 34, _title(recording), "title"),
        *(_text(_LEFT, 57 + 18 * line, words) for line, words in enumerate(_subtitle(recording))),
        *_draw_pages(recording),
    ]
    if ticks:
        parts += _draw_rate(ticks, recording.ended, _TOP + _PAGES_HEIGHT + _AXIS + _GAP)
    return "\n".join([*parts, "</svg>"])


# --- words -----------------------------------------------------------------------------------


def _title(recording: Recording) -> str:
    pages = len(recording.offsets)
    return f"{pages:,} page{'s' * (pages != 1)} in the order of first touch" if pages else "No page was touched"


def _subtitle(recording: Recording) -> list[str]:
    pages, size = len(recording.offsets), recording.page_size
    told = _told_bytes(recording)
    words = [_size(pages * size) + (f" of {_size(told)}" if told else ""), f"pages of {_size(size)}"]
    if pages:
        runs = 1 + sum(after != before + size for before, after in pairwise(recording.offsets))
        words.append(f"{runs:,} run{'s' * (runs != 1)}")
    if recording.ended:
        words.append(f"ended: {recording.ended[:40]}")
    return [", ".join(words), *([f"snapshot {recording.snapshot[:80]}"] if recording.snapshot else [])]


def _told_bytes(recording: Recording) -> int:
    """The size of the memory, as its identity tells it; 0 when it does not."""
    told = (recording.memory or "").partition(":")[0]
    return int(told) if told.isdecimal() and len(told) < 16 else 0


def _extent(recording: Recording) -> int:
    """Where the address axis ends: at the end of the memory, else of its last page, in whole MiB."""
    end = max(recording.offsets, default=0) + recording.page_size
    return -(-max(end, _told_bytes(recording)) // _MIB) * _MIB


def _size(size: int) -> str:
    return f"{_mib(size)} MiB" if size >= _MIB else f"{size >> 10} KiB"


def _mib(size: float) -> str:
    return f"{size / _MIB:,.1f}".removesuffix(".0")


# --- panels ----------------------------------------------------------------------------------


def _draw_pages(recording: Recording) -> Iterator[str]:
    pages, extent = len(recording.offsets), _extent(recording)
    panel = _Panel(_TOP, _PAGES_HEIGHT, max(pages, 1), extent)
    yield from _axes(
        panel,
        [(at, f"{at:,.0f}") for at in _ticks(panel.x_end, max(1.0, _step(panel.x_end, 8)))],
        [(at, _mib(at)) for at in _ticks(extent, max(_MIB, 2.0 ** math.ceil(math.log2(extent / 6))))],
        "rank of first touch (pages)",
        "address (MiB)",
    )
    columns = min(max(pages, 1), _COLUMNS)
    strokes = "".join(
        f"M{column} {_ROWS - 1 - last}v{last - first + 1}"
        for column, first, last in _filled_runs(recording, columns, extent)
    )
    # One unit across is a column and one down is a row; few pages are drawn as dashes, not as bars.
    x_unit, y_unit = panel.width / columns, panel.height / _ROWS
    yield (
        f'<path class="pages" stroke-width="{min(1.0, 9 / x_unit):.3g}" d="{strokes}" transform="translate('
        f'{panel.left + x_unit / 2:.2f} {panel.top:g}) scale({x_unit:.4f} {y_unit:.4f})"/>'
    )


def _filled_runs(recording: Recording, columns: int, extent: int) -> Iterator[tuple[int, int, int]]:
    """``(column, first row, last row)`` of each vertical run of cells that hold a page, columns upwards."""
    offsets, pages = recording.offsets, len(recording.offsets)
    tall = recording.page_size * _ROWS // extent  # rows that a page covers beside its first
    for column in range(columns):
        of_column = offsets[column * pages // columns : (column + 1) * pages // columns]
        rows = {offset * _ROWS // extent for offset in of_column}
        if tall:
            rows = {row for first in rows for row in range(first, min(first + tall + 1, _ROWS))}
        for _, run in groupby(enumerate(sorted(rows)), lambda item: item[1] - item[0]):
            cells = [row for _, row in run]
            yield column, cells[0], cells[-1]


def _draw_rate(ticks: Sequence[int], ended: str | None, top: float) -> Iterator[str]:
    seconds = len(ticks) * limits.SETTLE_TICK_SECONDS
    most = max(max(ticks), 1)
    panel = _Panel(top, _RATE_HEIGHT, seconds, most * 1.08)
    yield from _axes(
        panel,
        [(at, f"{at:g}") for at in _ticks(seconds, _step(seconds, 10))],
        [(at, f"{at:,.0f}") for at in _ticks(most, max(1.0, _step(most, 4)))],
        "time since the start (s)",
        "faults / 100 ms",
    )
    settled = settled_at(list(accumulate(ticks)))
    if settled is not None:
        quiet = panel.x((settled + 1 - limits.SETTLE_QUIET_TICKS) * limits.SETTLE_TICK_SECONDS)
        end = panel.x((settled + 1) * limits.SETTLE_TICK_SECONDS)
        yield f'<rect class="quiet" x="{quiet:.1f}" y="{top:g}" width="{end - quiet:.1f}" height="{_RATE_HEIGHT}"/>'
    yield f'<path class="rate" d="{"".join(_bars(panel, ticks))}"/>'
    if settled is not None:
        yield from _mark(panel, (settled + 1) * limits.SETTLE_TICK_SECONDS, "settled")
    elif ended:
        yield from _mark(panel, seconds, ended[:40])


def _bars(panel: _Panel, ticks: Sequence[int]) -> Iterator[str]:
    bars = min(len(ticks), _BARS)
    width = panel.width / bars
    gap = min(1.0, width / 4)
    for bar in range(bars):
        most = max(ticks[bar * len(ticks) // bars : (bar + 1) * len(ticks) // bars])
        if most:
            height = max(1.5, panel.height * most / panel.y_end)  # a single fault is seen beside thousands
            left = panel.left + bar * width
            yield f"M{left + gap / 2:.1f} {panel.top + panel.height:.0f}v-{height:.1f}h{width - gap:.1f}v{height:.1f}z"


def _mark(panel: _Panel, seconds: float, word: str) -> Iterator[str]:
    x = panel.x(seconds)
    anchor, shift = ("end", -6) if x > panel.left + panel.width / 2 else ("start", 6)
    yield f'<path class="mark" d="M{x:.1f} {panel.top - 20:g}V{panel.top + panel.height:g}"/>'
    yield _text(x + shift, panel.top - 9, f"{word} at {seconds:.1f} s", "note", anchor)


# --- axes ------------------------------------------------------------------------------------


def _axes(
    panel: _Panel, across: list[tuple[float, str]], up: list[tuple[float, str]], x_name: str, y_name: str
) -> Iterator[str]:
    bottom, right = panel.top + panel.height, panel.left + panel.width
    yield (
        f'<rect class="panel" x="{panel.left:g}" y="{panel.top:g}" width="{panel.width:g}" height="{panel.height:g}"/>'
    )
    for at, label in across:
        x = panel.x(at)
        yield f'<path class="grid" d="M{x:.1f} {panel.top:g}V{bottom + 5:g}"/>'
        yield _text(x, bottom + 20, label, anchor="middle")
    for at, label in up:
        y = panel.y(at)
        yield f'<path class="grid" d="M{panel.left - 5:g} {y:.1f}H{right:g}"/>'
        yield _text(panel.left - 9, y + 4.5, label, anchor="end")
    yield _text(panel.left + panel.width / 2, bottom + 41, x_name, "name", "middle")
    place = f"translate(20 {panel.top + panel.height / 2:g}) rotate(-90)"
    yield f'<text class="name" text-anchor="middle" transform="{place}">{y_name}</text>'


def _step(extent: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, 20 ... that cuts ``extent`` into at most ``most`` parts."""
    least = extent / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _ticks(extent: float, step: float) -> list[float]:
    return [number * step for number in range(int(extent / step + 1e-9) + 1)]


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' * bool(kind) + f' text-anchor="{anchor}"' * (anchor != "start")
    return f'<text x="{x:.1f}" y="{y:g}"{attributes}>{_plain(words)}</text>'


def _plain(words: str) -> str:
    """A log's own words, harmless: XML knows most control characters not even as escapes."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in words))
