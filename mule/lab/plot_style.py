"""Colours, dashes and the style sheet of the report's plots, for light and dark pages."""

from __future__ import annotations

# Told apart by people with any colour vision, and with a contrast of 3:1 on their page; the light
# ones are Okabe and Ito's, darkened where they were too pale for a line.
_LIGHT = ("#0072b2", "#c8500a", "#00805d", "#b0428a", "#8a6d00", "#55606b", "#7a3e1d", "#2a2a8c")
_DARK = ("#5ab4f0", "#f5904e", "#35c99f", "#ea9fd0", "#e6c229", "#b4bfca", "#d3a17e", "#a8a4ff")
NUM_COLOURS = len(_LIGHT)
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 3", "4 2", "1 3", "9 3 2 3 2 3")
_THEMES = {
    "light": {"ink": "#1f2328", "faint": "#59636e", "grid": "#e4e8ec", "page": "#ffffff"},
    "dark": {"ink": "#e3e7eb", "faint": "#a5b0bb", "grid": "#333b44", "page": "#1d2126"},
}
# Cividis, at even steps: also grey readers see its order.
_CIVIDIS = (
    *((0, 34, 78), (28, 54, 109), (61, 78, 108), (89, 97, 110), (112, 116, 115)),
    *((138, 135, 121), (165, 156, 116), (194, 178, 105), (224, 202, 86), (254, 232, 56)),
)


def style_sheet() -> str:
    """CSS for every `svg.plot`, in a page or in a file of its own."""
    dark = _rules("dark", _DARK)
    return (
        "svg.plot{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;display:block;"
        "width:100%;height:auto}\n"
        "svg.plot .line{fill:none;stroke-width:1.8;stroke-linejoin:round}\n"
        "svg.plot .band{opacity:.18;stroke:none}\n"
        "svg.plot .error{fill:none;stroke-width:1.8}\n"
        "svg.plot .end{text-anchor:end}svg.plot .middle{text-anchor:middle}\n"
        "svg.plot .small{font-size:11.5px}\n"
        + "".join(
            f"svg.plot .d{place}{{stroke-dasharray:{dash}}}\n"
            for place, dash in enumerate(_DASHES)
            if dash
        )
        + _rules("light", _LIGHT)
        + f"@media (prefers-color-scheme:dark){{\n{dark}}}\n"
        + f"@media print{{\n{_rules('light', _LIGHT)}}}\n"
    )


def shade(share: float) -> str:
    """The colour of a heat map's cell, 0 (dark blue) to 1 (yellow)."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    below = min(int(place), len(_CIVIDIS) - 2)
    mixed = (
        round(low + (place - below) * (high - low))
        for low, high in zip(_CIVIDIS[below], _CIVIDIS[below + 1])
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ink_on(share: float) -> str:
    """What can be read on `shade(share)`."""
    return "#ffffff" if share < 0.55 else "#101418"


def _rules(theme: str, colours: tuple[str, ...]) -> str:
    t = _THEMES[theme]
    rules = [
        f"svg.plot text{{fill:{t['ink']}}}svg.plot .faint{{fill:{t['faint']}}}",
        f"svg.plot .page{{fill:{t['page']}}}svg.plot .grid{{stroke:{t['grid']}}}",
        f"svg.plot .axis{{stroke:{t['faint']}}}svg.plot .zero{{stroke:{t['ink']}}}",
        f"svg.plot .ring{{fill:none;stroke:{t['ink']}}}",
    ]
    rules += [
        f"svg.plot .s{place}{{stroke:{colour}}}svg.plot .f{place}{{fill:{colour}}}"
        for place, colour in enumerate(colours)
    ]
    return "".join(f"{rule}\n" for rule in rules)
