"""Draws the figures of the concept pages into docs/assets: `python scripts/site/figures.py`.

They are written as SVG by hand, so that they are small, sharp and the same wherever they are drawn. The
figure of waves shows what the planner of `fedjax_sim.engine.waves` does with twelve clients.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"
INK, PALE, BLUE, GREEN, ORANGE, GREY = "#1f2933", "#f4f6f8", "#c7d7f5", "#cdebd3", "#fbe0c0", "#d9dee4"


class Drawing:
    """Shapes on a white page, from the back to the front."""

    def __init__(self, width: int, height: int, title: str):
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}" font-family="Helvetica, Arial, sans-serif" font-size="13" '
            f'fill="{INK}">\n<title>{escape(title)}</title>\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
            '<pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="6" height="6" fill="white"/>'
            f'<path d="M0 0V6" stroke="#9aa5b1" stroke-width="2"/></pattern></defs>\n'
            f'<rect width="{width}" height="{height}" rx="8" fill="white"/>\n'
        )
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False
    ) -> None:
        """A rectangle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
            f'stroke="{INK}"{dash}/>'
        )

    def text(self, x: float, y: float, *lines: str, bold: bool = False, anchor: str = "middle") -> None:
        """Lines of text; `y` is the base of the first."""
        weight = ' font-weight="bold"' if bold else ""
        spans = "".join(
            f'<tspan x="{x:g}" dy="{0 if number == 0 else 17}">{escape(line)}</tspan>'
            for number, line in enumerate(lines)
        )
        self._parts.append(f'<text y="{y:g}" text-anchor="{anchor}"{weight}>{spans}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a tip at its end."""
        path = " ".join(f"{'M' if number == 0 else 'L'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
        self._parts.append(f'<path d="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        """The file's text."""
        return self._head + "\n".join(self._parts) + "\n</svg>\n"


def compiled_round() -> str:
    """What goes into a round, what happens in it, and what comes out."""
    page = Drawing(860, 420, "One compiled round: dispatch, train and merge over stacked clients")
    page.text(105, 28, "the host decides", bold=True)
    for number, lines in enumerate(
        (
            ("cohort:", "ids of K clients"),
            ("plan: which slot", "trains in which wave"),
            ("learning rate", "of the round"),
        )
    ):
        page.box(20, 44 + 62 * number, 170, 50, PALE)
        page.text(105, 64 + 62 * number, *lines)
    page.box(20, 262, 170, 50, GREEN)
    page.text(105, 282, "training samples,", "placed once")
    page.box(20, 336, 170, 64, BLUE)
    page.text(105, 356, "server state [K, …]", "clients' state [N, …]", "(donated)")

    page.box(236, 14, 410, 392, "none", dashed=True)
    page.text(441, 36, "one compiled program", bold=True)
    page.box(262, 54, 356, 46, BLUE)
    page.text(440, 73, "dispatch", bold=True)
    page.text(440, 91, "server state → what each slot starts from")
    page.box(262, 128, 356, 160, PALE)
    page.text(440, 148, "train: local steps of all K slots", bold=True)
    for device in range(2):
        left = 276 + 172 * device
        page.box(left, 160, 156, 114, "white")
        page.text(left + 78, 178, f"device {device + 1}")
        for wave in range(2):
            for lane in range(3):
                page.box(left + 12 + 46 * lane, 188 + 42 * wave, 40, 34, ORANGE)
                page.text(left + 32 + 46 * lane, 210 + 42 * wave, f"{device * 6 + wave * 3 + lane + 1}")
    page.box(262, 316, 356, 64, BLUE)
    page.text(440, 336, "merge", bold=True)
    page.text(440, 354, "K trained models, or only their mean,", "→ the next server state")
    page.arrow((440, 100), (440, 126))
    page.arrow((440, 288), (440, 314))

    for y in (69, 131, 193, 287, 368):
        page.arrow((190, y), (234, y))

    page.text(755, 28, "what comes out", bold=True)
    for y, fill, lines in (
        (44, PALE, ("loss of each slot,", "which are finite")),
        (106, PALE, ("the method's own", "numbers")),
        (168, PALE, ("meters: how far", "layers moved, …")),
        (230, ORANGE, ("models before and", "after the merge,", "in measured rounds")),
        (336, BLUE, ("the next state,", "in the same buffers")),
    ):
        height = 16 + 17 * len(lines)
        page.box(692, y, 150, height, fill)
        page.text(767, y + 20, *lines)
        page.arrow((646, y + height / 2), (690, y + height / 2))
    page.arrow((767, 388), (767, 412), (105, 412), (105, 402))
    return page.svg()


STEPS = np.asarray([40, 36, 30, 22, 20, 18, 12, 10, 8, 6, 4, 2])
"""Local steps of the twelve clients in the figure of waves, who were not drawn in this order."""


def waves() -> str:
    """Twelve clients of unequal size: all side by side, and in waves of three on two devices."""
    from fedjax_sim.engine.waves import make_plan

    page = Drawing(860, 500, "Clients of unequal size side by side, and in waves")
    order = np.random.default_rng(3).permutation(len(STEPS))
    steps = STEPS[order]
    scale, left = 8.2, 150

    def lane(y: float, slot: int, length: int, x: float) -> None:
        if length > steps[slot]:
            page.box(x + scale * steps[slot], y, scale * (length - steps[slot]), 14, "url(#idle)")
        page.box(x, y, scale * steps[slot], 14, ORANGE)

    page.text(20, 26, "One wave of six on each of two devices, as drawn", bold=True, anchor="start")
    longest = [int(steps[:6].max()), int(steps[6:].max())]
    for slot in range(12):
        y = 40 + 15 * slot + (8 if slot > 5 else 0)
        lane(y, slot, longest[slot // 6], left)
    page.text(80, 92, "device 1")
    page.text(80, 190, "device 2")

    plan = make_plan(steps, devices=2, width=3)
    page.text(20, 262, "Waves of three: clients of like length together", bold=True, anchor="start")
    places = plan.slot_of_place.reshape(2, -1, 3)
    lengths = plan.wave_steps.reshape(2, -1)
    for device in range(2):
        x = float(left)
        for slots, length in zip(places[device], lengths[device], strict=True):
            for number, slot in enumerate(slots):
                lane(278 + 62 * device + 15 * number, int(slot), int(length), x)
            x += scale * int(length) + 6
        page.text(80, 306 + 62 * device, f"device {device + 1}")
    done = {
        "one wave of six": 6 * sum(longest),
        "waves of three": 3 * int(lengths.sum()),
    }
    page.box(150, 424, 30, 14, ORANGE)
    page.text(188, 436, "a client's own steps", anchor="start")
    page.box(340, 424, 30, 14, "url(#idle)")
    page.text(378, 436, "steps that change nothing: it waits for the longest", anchor="start")
    page.text(
        20,
        470,
        "Steps computed over steps wanted: "
        + ", ".join(f"{name} {count / steps.sum():.2f}" for name, count in done.items())
        + ". A row is a client, and area is work.",
        anchor="start",
    )
    page.arrow((150, 404), (800, 404))
    page.text(750, 398, "steps of a device")
    return page.svg()


FIGURES = {"round.svg": compiled_round, "waves.svg": waves}
"""File below docs/assets -> what draws it."""


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (ASSETS / name).write_text(draw(), encoding="utf-8")
        print(f"wrote docs/assets/{name}")
