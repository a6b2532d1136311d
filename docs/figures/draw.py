"""Draws the figures of docs/how_it_works.md as SVG: python docs/figures/draw.py

Colours are of Okabe and Ito's palette, which readers with any colour vision tell apart; what a
colour says is written beside it too. The background is white, so that both figures can be read on
a dark page.
"""

from __future__ import annotations

from pathlib import Path

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#6b6b6b", "#1a1a1a"
HERE = Path(__file__).parent


class Figure:
    """A white sheet with boxes, arrows and text."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="15">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x, y, w, h, line=INK, fill="white", width=1.5, radius=6) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" '
            f'stroke="{line}" stroke-width="{width}"/>'
        )

    def text(self, x, y, words, colour=INK, size=15, anchor="middle", weight="normal") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{words}</text>'
        )

    def arrow(self, *points, colour=INK, tip=True) -> None:
        line = " ".join(f"{x},{y}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"{end}/>'
        )

    def cells(self, x, y, count, size, line, fills) -> None:
        for i in range(count):
            self.box(x + i * size, y, size, size, line, fills[i % len(fills)], 1, 0)

    def write(self, name: str) -> None:
        (HERE / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


# As characters: moved and smaller text is drawn in other places by some programs.
_LOW = {
    "k": "&#8342;",
    "0": "&#8320;",
    "1": "&#8321;",
    "2": "&#8322;",
    "+": "&#8330;",
    "&#8722;": "&#8331;",
}
_HIGH = {"k": "&#7503;", "T": "&#7488;"}


def low(index: str) -> str:
    """A subscript."""
    return _LOW[index]


def high(index: str) -> str:
    """A superscript."""
    return _HIGH[index]


def fused_pass() -> None:
    f = Figure(920, 452, "The fused pass of an update")
    # Memory on the left and on the right.
    for x, title, state in (
        (20, "weights in memory", "&#952; &#8722; &#956;z"),
        (770, "the same memory", "&#952; of the next step"),
    ):
        f.text(x + 65, 40, title, weight="bold")
        f.text(x + 65, 60, state, GREY)
        for row in range(9):
            now = row == 4
            f.cells(x + 9, 74 + row * 28, 4, 28, GREY, ["#d9d9d9" if now else "white"])
    f.arrow((148, 200), (205, 200))
    f.text(176, 188, "read", size=13)
    f.text(176, 218, "once", size=13)
    f.arrow((694, 200), (776, 200))
    f.text(744, 188, "written", size=13)
    f.text(744, 218, "once", size=13)
    # Registers.
    f.box(208, 74, 502, 252, BLUE, "#f2f8fc", 2.5, 12)
    f.text(459, 60, "registers of one group of weights", BLUE, weight="bold")
    f.box(228, 176, 66, 48)
    f.text(261, 206, "t", size=18)
    f.text(261, 244, "loaded", GREY, 13)
    f.text(261, 260, "weights", GREY, 13)
    f.box(318, 96, 196, 62, ORANGE, "#fdf3ec")
    f.text(416, 121, f"generate z{low('k')}", ORANGE, 17, weight="bold")
    f.text(416, 143, "Philox, Box&#8211;Muller", GREY, 13)
    f.arrow((416, 158), (416, 184))
    f.box(318, 186, 196, 74)
    f.text(416, 212, f"S1 += &#946;{low('1')}{high('k')} p{low('k')} z{low('k')}")
    f.text(416, 240, f"S2 += &#946;{low('2')}{high('k')} p{low('k')}&#178; z{low('k')}&#178;")
    f.arrow((330, 260), (330, 290), (304, 290), (304, 127), (316, 127), colour=ORANGE)
    f.text(420, 284, "for k = 0, 1, &#8230; H &#8722; 1,", ORANGE, 14)
    f.text(420, 304, "newest first", ORANGE, 14)
    f.arrow((514, 222), (540, 222))
    f.box(542, 130, 152, 140, GREEN, "#eff8f4")
    f.text(618, 158, f"&#952; = t + &#956; z{low('0')}", GREEN)
    f.text(618, 176, "restored", GREY, 13)
    f.text(618, 210, "&#952; &#8722; lr m / (&#8730;v + &#949;)", GREEN)
    f.text(618, 228, "updated", GREY, 13)
    f.text(618, 256, "rounded once", GREY, 13)
    f.arrow((261, 176), (261, 86), (618, 86), (618, 128))
    # History.
    f.box(298, 362, 322, 76, ORANGE)
    f.text(459, 386, "the history, for all weights together", ORANGE, 14, weight="bold")
    f.text(459, 406, f"H pairs: number of the direction, p{low('k')}", size=14)
    f.text(459, 425, "20 numbers at H = 10, and no tensor", GREY, 13)
    f.arrow((459, 362), (459, 318), colour=ORANGE)
    f.write("fused_pass.svg")


def regenerated_forward() -> None:
    f = Figure(920, 408, "The regenerated forward of a layer")
    f.text(90, 40, "one batch", weight="bold")
    f.text(90, 60, "the rows x, twice", GREY)
    f.box(40, 76, 100, 86, BLUE, "#e3f0f8")
    f.text(90, 116, "x", BLUE, 18, weight="bold")
    f.text(90, 140, "for &#952; + &#956;z", BLUE, 14)
    f.box(40, 162, 100, 86, ORANGE, "#fdeee6")
    f.text(90, 202, "x", ORANGE, 18, weight="bold")
    f.text(90, 226, "for &#952; &#8722; &#956;z", ORANGE, 14)
    # The product with W.
    f.arrow((140, 80), (152, 80), (152, 244), (140, 244), tip=False)
    f.arrow((152, 162), (236, 162))
    f.box(238, 98, 150, 128, INK, "#e6e6e6", 2)
    f.text(313, 152, "W", size=26, weight="bold")
    f.text(313, 180, "read once for both,", GREY, 13)
    f.text(313, 198, "never written", GREY, 13)
    f.arrow((388, 162), (572, 162))
    f.text(478, 152, f"x W{high('T')}", size=17)
    # The correction.
    f.arrow((190, 162), (190, 310), (236, 310))
    f.box(238, 272, 24, 76, GREEN, "#d6efe5", 2, 2)
    f.text(250, 366, "v", GREEN, 17, weight="bold")
    f.arrow((262, 310), (326, 310))
    f.text(294, 300, "x v", size=15)
    f.box(328, 280, 82, 30, BLUE, "#e3f0f8", 1.5, 4)
    f.text(369, 300, "times +&#956;", BLUE, 13)
    f.box(328, 310, 82, 30, ORANGE, "#fdeee6", 1.5, 4)
    f.text(369, 330, "times &#8722;&#956;", ORANGE, 13)
    f.arrow((410, 310), (442, 310))
    f.box(444, 298, 108, 24, GREEN, "#d6efe5", 2, 2)
    f.text(498, 344, f"u{high('T')}", GREEN, 17, weight="bold")
    f.arrow((552, 310), (590, 310), (590, 181))
    words = f"z = u v{high('T')} is generated as a row and a column, and never as a matrix"
    f.text(372, 392, words, GREEN, 14)
    f.parts.append(
        f'<circle cx="590" cy="162" r="17" fill="white" stroke="{INK}" stroke-width="1.8"/>'
    )
    f.text(590, 169, "+", size=22)
    f.arrow((607, 162), (662, 162))
    # Outputs.
    f.text(714, 40, "outputs", weight="bold")
    f.text(714, 60, "rounded once", GREY)
    f.box(664, 76, 100, 86, BLUE, "#e3f0f8")
    f.text(714, 124, f"x (W + &#956;z){high('T')}", BLUE, 14)
    f.box(664, 162, 100, 86, ORANGE, "#fdeee6")
    f.text(714, 210, f"x (W &#8722; &#956;z){high('T')}", ORANGE, 14)
    f.arrow((764, 119), (812, 119))
    f.arrow((764, 205), (812, 205))
    f.text(838, 125, f"L{low('+')}", BLUE, 18, weight="bold")
    f.text(838, 211, f"L{low('&#8722;')}", ORANGE, 18, weight="bold")
    f.text(838, 160, "&#8230;", size=18)
    f.text(780, 282, "after the last layer", GREY, 13)
    f.text(780, 306, f"p = (L{low('+')} &#8722; L{low('&#8722;')}) / 2&#956;", size=17)
    f.write("regenerated_forward.svg")


if __name__ == "__main__":
    fused_pass()
    regenerated_forward()
