"""How the pages look: one style sheet, for light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

SERIES_COLORS = 10
"""Classes `c0`, `c1`, ... are colours that differ."""

_STAGES = {"parent": ("#4a5568", "#a9b4c6"), "quantized": ("#c2410c", "#fb8f55"), "recovered": ("#1d4ed8", "#84a9ff")}
_SERIES = (
    ("#1d4ed8", "#84a9ff"),
    ("#ea580c", "#fb923c"),
    ("#15803d", "#4ade80"),
    ("#c026d3", "#e879f9"),
    ("#78350f", "#d6a77a"),
    ("#0891b2", "#22d3ee"),
    ("#dc2626", "#f87171"),
    ("#6b7f00", "#bedc4a"),
    ("#111827", "#e5e7eb"),
    ("#7b8494", "#9ca3af"),
)
_COLORS = {**_STAGES, **{f"c{index}": pair for index, pair in enumerate(_SERIES)}}


def _variables(dark: bool) -> str:
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLORS.items())


_CLASSES = "\n".join(f".{name} {{ --color: var(--{name}); }}" for name in _COLORS)
_LIGHT = f"--page: #ffffff; --ink: #1f2937; --soft: #5b6575; --line: #e2e6ec; --tint: #f6f7f9; {_variables(False)}"
_DARK = f"--page: #14171c; --ink: #e6e9ef; --soft: #9aa4b5; --line: #2c323c; --tint: #1c2128; {_variables(True)}"

STYLE = (
    f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
{_CLASSES}
"""
    """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 2rem 4rem; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 0 0 1rem; font-size: 1.25rem; letter-spacing: -0.01em; }
h3 { margin: 0 0 0.4rem; font-size: 0.95rem; font-weight: 600; }
p { margin: 0.4rem 0 0.8rem; max-width: 46rem; }
section { margin-top: 3rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.9em; }
.about { color: var(--soft); margin: 0.5rem 0 0; max-width: none; }
.note { color: var(--soft); font-size: 0.9rem; }
.warning {
  margin-top: 1.5rem; padding: 0.7rem 1rem; background: var(--tint); border-left: 3px solid var(--quantized);
  max-width: none;
}
.warning p { margin: 0; max-width: none; }
.warning ul { margin: 0.4rem 0 0; padding-left: 1.2rem; }

.figures { display: grid; grid-template-columns: repeat(6, 1fr); margin: 2rem 0 0; }
.figures { border-block: 1px solid var(--line); }
.figures > div { padding: 1rem 0.5rem 1rem 1rem; border-left: 1px solid var(--line); min-width: 0; }
.figures > div:first-child { border-left: 0; padding-left: 0; }
.figures dt { font-size: 0.8rem; color: var(--soft); }
.figures dd { margin: 0; }
.figures .value {
  display: block; font-size: 1.7rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; color: var(--color, var(--ink));
}
.figures .aside { display: block; font-size: 0.8rem; line-height: 1.35; color: var(--soft); }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2.5rem; }
figure { margin: 0 0 1.4rem; min-width: 0; break-inside: avoid; }
/* Caption, picture and legend of neighbours begin at the same height. */
.charts > figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 0; align-content: start; }
figcaption { margin-bottom: 0.6rem; }
figcaption h3, figcaption .note { margin: 0; }
svg { display: block; width: 100%; max-width: 32rem; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
svg text.label { fill: var(--color, var(--ink)); }
svg text.strong { fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .curve { stroke: var(--color); stroke-width: 2; fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .thin { stroke-width: 1; opacity: 0.4; }
svg .link { stroke: var(--soft); stroke-width: 1; fill: none; opacity: 0.6; }
svg .reference { stroke: var(--color); stroke-width: 1.4; stroke-dasharray: 5 4; fill: none; }
svg .mark { fill: var(--color); stroke: var(--page); stroke-width: 1; }
svg .hollow { fill: var(--page); stroke: var(--color); stroke-width: 2; }
svg .lost { stroke: var(--color); stroke-width: 2; fill: none; }
svg .bar { fill: var(--color, var(--soft)); }
svg .track { fill: var(--tint); }
.legend { display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; margin: 0.5rem 0 0; padding: 0; list-style: none; }
.legend li { font-size: 0.85rem; color: var(--soft); }
.legend li::before {
  content: ""; display: inline-block; width: 0.65em; height: 0.65em; margin-right: 0.4em; border-radius: 50%;
  background: var(--color); print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.key { display: inline-block; min-width: 1.2em; margin-right: 0.4em; font-weight: 700; color: var(--color); }

.scrolls { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; text-align: left; vertical-align: baseline; }
th, td { border-bottom: 1px solid var(--line); }
/* A table scrolls before its numbers break. */
td { overflow-wrap: normal; white-space: nowrap; }
tbody th { overflow-wrap: break-word; }
table.runs tbody th { min-width: 7rem; overflow-wrap: anywhere; }
table:not(.runs) thead th { min-width: 5rem; }
td, thead th:not(:first-child) { text-align: right; }
thead th { font-weight: 500; color: var(--soft); }
tbody th { font-weight: 400; }
table.text td, table.text thead th { text-align: left; }
table.runs { width: 100%; }
table.runs tbody th { font-weight: 600; }

.sample { margin: 0 0 2rem; break-inside: avoid; }
.side-by-side { display: grid; gap: 0.8rem 1.5rem; }
.side-by-side { grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); }
.side-by-side > div { border-top: 2px solid var(--color, var(--line)); padding-top: 0.4rem; min-width: 0; }
.side-by-side h4 { margin: 0 0 0.2rem; font-size: 0.8rem; font-weight: 500; color: var(--soft); }
pre { margin: 0; font-size: 0.84rem; line-height: 1.5; white-space: pre-wrap; }
pre.prompt { margin-bottom: 0.8rem; padding: 0.5rem 0.8rem; background: var(--tint); font-weight: 600; }
pre.prompt, pre.whole { border-radius: 4px; }
pre.whole { padding: 0.8rem 1rem; background: var(--tint); }
details { margin-top: 0.8rem; }
summary { cursor: pointer; font-weight: 500; }
details[open] > summary { margin-bottom: 0.6rem; }
.facts { display: grid; gap: 0 2rem; margin: 0; }
.facts { grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
.facts > div { display: flex; gap: 0.8rem; justify-content: space-between; border-bottom: 1px solid var(--line); }
.facts > div { padding: 0.3rem 0; font-size: 0.9rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; text-align: right; min-width: 0; font-variant-numeric: tabular-nums; }
.changes { margin: 0.3rem 0 1.2rem; padding-left: 1.2rem; font-size: 0.9rem; }
footer { margin-top: 3.5rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
footer { color: var(--soft); font-size: 0.85rem; }

@media (max-width: 58rem) {
  .figures { grid-template-columns: repeat(3, 1fr); }
  .figures > div:nth-child(3n + 1) { border-left: 0; padding-left: 0; }
  .figures > div:nth-child(n + 4) { border-top: 1px solid var(--line); }
}
@media (max-width: 46rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  section { margin-top: 2.4rem; }
  table.runs, table.runs tbody, table.runs tr, table.runs th, table.runs td { display: block; border: 0; }
  table.runs thead { display: none; }
  table.runs tr { padding: 0.8rem 0; border-top: 1px solid var(--line); }
  table.runs th, table.runs td { padding: 0.1rem 0; }
  table.runs td { display: flex; justify-content: space-between; gap: 1rem; }
  table.runs td::before { content: attr(data-label); color: var(--soft); text-align: left; }
}
@media (max-width: 34rem) {
  .figures { grid-template-columns: repeat(2, 1fr); }
  .figures > div:nth-child(n) { border-left: 1px solid var(--line); padding-left: 1rem; }
  .figures > div:nth-child(2n + 1) { border-left: 0; padding-left: 0; }
  .figures > div:nth-child(n + 3) { border-top: 1px solid var(--line); }
  .figures .value { font-size: 1.5rem; }
}
"""
    f"""
@media print {{
  :root {{ color-scheme: light; {_LIGHT} }}
  body {{ font-size: 10.5pt; }}
  main {{ max-width: none; padding: 0; }}
  section {{ margin-top: 1.6rem; }}
  h2, h3, h4, summary {{ break-after: avoid; }}
  svg {{ max-width: 9.5cm; }}
  .scrolls {{ overflow: visible; }}
  details::details-content {{ content-visibility: visible; display: block; height: auto; }}
}}
"""
)
