"""What all pictures share: colours that colour-blind readers can tell apart, SVG with the same bytes every time, short names."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import matplotlib
from matplotlib.figure import Figure

from muxtune.spec.timeline import Timeline

Key = TypeVar("Key")

#: Okabe and Ito's colours, which colour-blind readers can tell apart, and two of Tol's.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#7F7F7F"),
)
PREDICTED, MEASURED = "#56B4E9", "#E69F00"
LABEL_POINTS = 6.5
#: Width of a digit of the label font in ems, generously.
DIGIT_EMS = 0.68

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "muxtune",
    "text.parse_math": False,
}


def draw(make: Callable[[], Figure]) -> str:
    """SVG of the figure that `make` gives, in the common style."""
    with matplotlib.rc_context(STYLE):
        return svg(make())


def svg(figure: Figure) -> str:
    """SVG without prolog, comments, metadata; ids carry a prefix, so that several pictures can stand in one page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(r"<!--.*?-->\n?", "", file.getvalue()[file.getvalue().index("<svg") :], flags=re.DOTALL)
    prefix = "p" + hashlib.sha256(text.encode()).hexdigest()[:8] + "-"
    return re.sub(r'(\bid="|href="#|url\(#)', lambda m: m.group(1) + prefix, text)


def short(text: str, limit: int = 44) -> str:
    """A name that cannot run over its neighbours."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour such as #0072B2."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 299 * red + 587 * green + 114 * blue > 140_000 else "white"


def edge(points: float) -> float:
    """Width of the white line around a box that is `points` wide: narrow boxes must not turn white."""
    return min(0.3, 0.1 * points)


def fits(text: str, points: float) -> bool:
    """Whether a label of the small font is no wider than `points`."""
    return points > len(text) * DIGIT_EMS * LABEL_POINTS


def alike(timeline: Timeline, key: Callable[[int], Key]) -> list[tuple[str, int]]:
    """(label, first rank) of each set of ranks for which `key` is the same: what tensor-parallel ranks do is shown once."""
    groups: dict[Any, list[int]] = {}
    for rank in timeline.ranks:
        groups.setdefault(key(rank), []).append(rank)
    return [(_ranks(ranks), ranks[0]) for ranks in groups.values()]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2:
        return f"ranks {ranks[0]}–{ranks[-1]}"
    return f"ranks {listed(map(str, ranks), 4)}"


def listed(names: Iterable[str], limit: int) -> str:
    """The names, or the first ones and how many more there are."""
    every = list(names)
    shown = every if len(every) <= limit else [*every[: limit - 1], f"+{len(every) - limit + 1}"]
    return ", ".join(shown)
