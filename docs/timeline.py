"""Draws timeline.svg: twelve tokens, L = 4, N = 2. Run `python docs/timeline.py` after a change."""

from __future__ import annotations

from pathlib import Path

WIDTH, MARGIN, CELL, TOKENS, WINDOW, PASSES = 390, 15, 30, 12, 4, 2
INK, SOFT, AWAKE, ASLEEP, STATE, GONE = "#1f2430", "#5b6472", "#f2b544", "#5b6fd8", "#3c9d7a", "#a9b1bd"
FONT = "font-family='system-ui, sans-serif'"


def text(x: float, y: float, words: str, size: float = 14, fill: str = INK, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' font-size='{size}' fill='{fill}' {FONT} {more}>{words}</text>"


def cells(y: float, kinds: list[str]) -> list[str]:
    """A row of tokens: each awake, asleep, gone, still to come, or not drawn."""
    drawn = []
    for place, kind in enumerate(kinds):
        if kind == "none":
            continue
        x = MARGIN + place * CELL
        fill = {"awake": AWAKE, "asleep": ASLEEP}.get(kind, "none")
        stroke = {"gone": GONE, "later": "none"}.get(kind, INK)
        dashes = "stroke-dasharray='3 3'" if kind == "gone" else ""
        size = f"x='{x + 1.5}' y='{y}' width='{CELL - 3}' height='26' rx='4'"
        drawn.append(f"<rect {size} fill='{fill}' stroke='{stroke}' {dashes}/>")
        color = {"gone": "#9aa3b1", "later": "#9aa3b1", "asleep": "#ffffff"}.get(kind, INK)
        drawn.append(text(x + CELL / 2, y + 18, str(place + 1), 14, color, "text-anchor='middle'"))
    return drawn


def state(y: float, number: int) -> list[str]:
    x, wide = MARGIN + 1.5, 150
    return [
        f"<rect x='{x}' y='{y}' width='{wide}' height='26' rx='13' fill='{STATE}'/>",
        text(x + wide / 2, y + 18, f"fast weights S{number}", 14, "#ffffff", "text-anchor='middle'"),
    ]


def draw() -> str:
    y, drawn = 26.0, []
    for window in range(TOKENS // WINDOW):
        first, last = window * WINDOW, (window + 1) * WINDOW
        kinds = ["gone"] * first + ["awake"] * WINDOW + ["later"] * (TOKENS - last)
        drawn.append(
            text(MARGIN, y, f"Awake: tokens {first + 1} to {last}, one pass each", 15, more="font-weight='600'")
        )
        drawn += cells(y + 10, kinds)
        drawn += state(y + 44, window)
        what = "empty" if window == 0 else f"of tokens 1 to {first}"
        drawn.append(text(MARGIN + 162, y + 62, f"{what}; keys: {first + 1} to {last}", 14, SOFT))
        y += 100
        if last == TOKENS:
            break
        drawn.append(
            text(MARGIN, y, f"Token {last + 1} comes, the window is full: sleep", 15, more="font-weight='600'")
        )
        for loop in range(PASSES):
            row = y + 10 + 32 * loop
            drawn += cells(row, ["none"] * first + ["asleep"] * WINDOW + ["none"] * (TOKENS - last))
            drawn.append(text(MARGIN + last * CELL + 8, row + 18, f"pass {loop + 1} of {PASSES}", 14, ASLEEP))
        y += 92
        drawn.append(
            text(MARGIN, y, f"State S{window} becomes S{window + 1}; keys {first + 1} to {last} are evicted", 14, SOFT)
        )
        y += 42
    drawn.append(text(MARGIN, y, "Token 13 is predicted awake, in one pass.", 15, more="font-weight='600'"))
    height = y + 18
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:g}' role='img'>",
            "<title>Twelve tokens with windows of four and two passes asleep</title>",
            f"<rect width='{WIDTH}' height='{height:g}' rx='8' fill='#ffffff'/>",
            *drawn,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("timeline.svg").write_text(draw(), encoding="utf-8")
