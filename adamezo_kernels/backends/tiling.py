"""Which parts of a plan Triton's kernel for low-rank directions does in tiles, and in how many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..plan import Launch, Segment

ROWS, COLUMNS = 64, 64
"""Those of a program's tile. Together they are as many as the threads, so that each thread makes
one normal for each term of a direction."""


def tile_constants(shared: dict[str, Any]) -> dict[str, Any]:
    """The constants of the kernel for tiles, of those of the other kernel."""
    own = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    return {k: v for k, v in shared.items() if k not in ("DISTRIBUTION", "WINDOW")} | own


def tile_threads(rule: str) -> int:
    """The number of threads of a tile's program: a rule's buffers take registers."""
    return 128 if rule == "moments" else 256


def tiles_of(s: Segment) -> int:
    """The most tiles of a segment: where they begin depends on the offset of a call."""
    if _is_long(s):  # its tiles are those of the matrix
        rows, across = (s.row_length + 2 * s.columns - 2) // s.columns, -(-s.columns // COLUMNS)
    else:
        rows, across = s.rows, (s.row_length + COLUMNS + 2) // COLUMNS
    return -(-rows // ROWS) * across


def _is_long(s: Segment) -> bool:
    return s.rows == 1 and s.row_length >= s.columns


def kind_of_segment(s: Segment, offset: int) -> str:
    """What does a segment in a call with low-rank directions and that offset: "windows", as it is a
    part of a vector; "tiles" of rows that lie under each other in the matrix; or, in layouts which
    have no such tiles, "scattered" elements."""
    if not s.columns:
        return "windows"
    column, width = (s.index_offset + offset) % s.columns, COLUMNS
    if _is_long(s):
        return "tiles"
    if s.rows > 1 and s.index_stride % s.columns:
        return "scattered"
    inside = column + s.row_length <= s.columns
    return "tiles" if inside or (column % width == s.columns % width == 0) else "scattered"


def parts(launch: Launch, offset: int) -> dict[str, Launch]:
    """The launches of the segments of each of those kinds, kept with the launch for their tables,
    which do not depend on the offset."""
    kinds = tuple(kind_of_segment(s, offset) if s.elements else "" for s in launch.segments)
    kept: dict[tuple[str, ...], dict[str, Launch]]
    kept = vars(launch).setdefault("triton_parts", {})
    if kinds not in kept:
        kept[kinds] = {
            kind: replace(
                launch,
                segments=tuple(s for s, k in zip(launch.segments, kinds, strict=True) if k == kind),
            )
            for kind in sorted({*kinds} - {""})
        }
    return kept[kinds]
