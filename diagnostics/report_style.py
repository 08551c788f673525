"""The style sheet of report.html: light and dark by the reader's own setting, and for print."""

# Shades of the heat map as (background, text): headroom from full (w0) to none (w7),
# fading signals (c1 to c4), not finite (x), all zero (z).
_LIGHT_SHADES = {
    "w0": ("#f3f1ec", "#57534a"),
    "w1": ("#f9e7c8", "#57462a"),
    "w2": ("#fbd499", "#573f14"),
    "w3": ("#f9b566", "#4d3003"),
    "w4": ("#f2903f", "#3d2000"),
    "w5": ("#e2652b", "#fff"),
    "w6": ("#c43d23", "#fff"),
    "w7": ("#9c1c1f", "#fff"),
    "c1": ("#d7e5f0", "#2d4a61"),
    "c2": ("#aac9e2", "#1d3c55"),
    "c3": ("#6fa3cf", "#0c2740"),
    "c4": ("#3b78b0", "#fff"),
    "x": ("#3a0710", "#ffb3b3"),
    "z": ("#1f4f80", "#fff"),
}
_DARK_SHADES = {
    "w0": ("#2b2e34", "#a5abb5"),
    "w1": ("#41382c", "#cbb795"),
    "w2": ("#5f4726", "#e6c892"),
    "w3": ("#855822", "#ffdca6"),
    "w4": ("#b26a1e", "#fff"),
    "w5": ("#db7a26", "#241200"),
    "w6": ("#f2603a", "#2b0a02"),
    "w7": ("#ff3b4e", "#2b0006"),
    "c1": ("#263846", "#9fbdd4"),
    "c2": ("#264d6b", "#b9d8f0"),
    "c3": ("#2a6a9c", "#e0f0ff"),
    "c4": ("#3c90cf", "#04182a"),
    "x": ("#fff", "#b00020"),
    "z": ("#6db6f2", "#04182a"),
}

_COLOURS = """
--paper: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --dim: #6a6e76; --line: #e2dfd8;
--bad: #b3261e; --good: #1c7a43; --warn: #9a6100; --accent: #2a5d8f; --soft: #f3f1ec;
"""
_DARK_COLOURS = """
--paper: #16181c; --card: #1e2126; --ink: #e8e9eb; --dim: #9aa0a9; --line: #33373e;
--bad: #ff7b72; --good: #5ac47f; --warn: #e0a63a; --accent: #79b4ea; --soft: #262a30;
"""

_RULES = """
* { box-sizing: border-box }
html { color-scheme: light dark }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 1064px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 8px; letter-spacing: -0.01em }
h2 { font-size: 19px; margin: 44px 0 4px }
h2 + p, .note { margin: 4px 0 12px; color: var(--dim); font-size: 14px; max-width: 80ch }
.run-name { color: var(--dim); font-size: 14px; overflow-wrap: anywhere }
.lead { margin: 0; font-size: 17px; max-width: 70ch }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 14px;
  margin: 24px 0 14px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; overflow-wrap: anywhere }
.card h3, .advice h3 { margin: 0 0 2px; font-size: 13px; font-weight: 600; color: var(--dim) }
.card b { display: block; font-size: 18px; line-height: 1.3; margin-bottom: 4px }
.card p { margin: 4px 0 0; font-size: 14px }
.advice { border-left: 5px solid var(--warn) }
.advice.verified { border-left-color: var(--good) }
.badge { font-weight: 600; color: var(--warn) }
.verified .badge, td.yes { color: var(--good) }
td.no { color: var(--bad) }
pre { margin: 10px 0 0; padding: 12px 14px; background: var(--soft); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
  font: 14px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; width: 100%; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; border-spacing: 0 }
th, td { padding: 7px 14px; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-top: 1px solid var(--line) }
thead th { border-top: 0; color: var(--dim); font-weight: 600; white-space: nowrap }
tbody th { font-weight: 500; color: var(--dim); white-space: nowrap; width: 1% }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.minimal { background: color-mix(in srgb, var(--good) 12%, transparent) }
tr.bad { color: var(--bad); font-weight: 600 }
tr.onset { color: var(--warn) }
ul { padding-left: 20px; margin: 8px 0; max-width: 80ch }
li { margin: 6px 0 }
details { margin-top: 44px }
summary { cursor: pointer; font-size: 19px; font-weight: 700 }
details table { margin-top: 12px }
footer { margin-top: 48px; color: var(--dim); font-size: 13px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; color: var(--dim);
  margin: 6px 0 0; align-items: center }
.legend svg { display: block }
svg.run { display: block; max-width: none }
svg text { font-family: inherit; font-size: 12px; fill: var(--ink) }
.heat rect { shape-rendering: crispEdges }
.heat.bordered rect { stroke: var(--card); stroke-width: 0.5 }
.heat text { text-anchor: middle; font-size: 11px; font-variant-numeric: tabular-nums;
  pointer-events: none }
.heat g:hover rect { stroke: var(--ink); stroke-width: 1.5 }
.names text, text.tick { text-anchor: end }
svg text.tick, svg text.step { fill: var(--dim); font-size: 11px }
text.step { text-anchor: middle }
svg text.title { font-weight: 600 }
.frame { fill: none; stroke: var(--line) }
.strip { fill: var(--soft) }
.grid { stroke: var(--line) }
.guess { stroke: var(--dim); stroke-dasharray: 2 3 }
svg text.guess { stroke: none; fill: var(--dim); font-size: 11px }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round }
.dot { fill: var(--accent) }
.band { fill: var(--accent); opacity: 0.18 }
rect.bad { fill: var(--bad) }
svg text.bad-inside { fill: var(--card); font-size: 10px; font-weight: 700; text-anchor: middle }
svg text.bad-before { fill: var(--bad); font-size: 10px; font-weight: 700; text-anchor: end }
.outline { fill: none; stroke-width: 2.5; pointer-events: none }
.guide { stroke-width: 1 }
.outline.failure, .guide.failure { stroke: var(--bad) }
.outline.onset, .guide.onset { stroke: var(--warn); stroke-dasharray: 4 3 }
svg text.flag { font-weight: 600 }
svg text.flag.failure { fill: var(--bad) }
svg text.flag.onset { fill: var(--warn) }
@media print { body { background: #fff } .card, table { break-inside: avoid } }
"""


def _shades(shades: dict[str, tuple[str, str]]) -> str:
    return "\n".join(
        f".{name} rect {{ fill: {fill} }} .{name} text {{ fill: {text} }}"
        for name, (fill, text) in shades.items()
    )


def style_sheet() -> str:
    """All of it, as the content of a style element."""
    light = f":root {{ {_COLOURS} }}\n{_RULES}\n{_shades(_LIGHT_SHADES)}"
    dark = f":root {{ {_DARK_COLOURS} }}\n{_shades(_DARK_SHADES)}"
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
