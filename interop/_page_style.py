"""How a page looks: light and dark, wide and narrow. Verdicts are told by words; colours only repeat them."""

STYLE = """
:root { --paper: #fff; --ink: #1b1f24; --faint: #5b6470; --line: #d9dee5; --panel: #f5f7f9;
  --rounding: #116b36; --rounding-bg: #e6f5ec; --semantic: #a3161c; --semantic-bg: #fdecec;
  --inconclusive: #7a5200; --inconclusive-bg: #fdf3dc;
  --c0: #b3261e; --c1: #1f5fbf; --c2: #8a5a00; --c3: #6a3fb5; --c4: #00767a; --c5: #b0307f; --c6: #4c6b12;
  --c7: #34506b }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --faint: #9aa4b0; --line: #343b44;
  --panel: #1c2127; --rounding: #7fd6a1; --rounding-bg: #12301f; --semantic: #ff9a94; --semantic-bg: #3d1718;
  --inconclusive: #f0c66a; --inconclusive-bg: #362a0e;
  --c0: #ff8a80; --c1: #7fb2ff; --c2: #e3b04b; --c3: #bfa0ff; --c4: #5fd0d0; --c5: #ff8fcf; --c6: #b5d66a;
  --c7: #a9c1d9 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px }
section, figure, footer { margin: 28px 0 0 } .name { margin: 40px 0 8px; font: 600 1rem ui-monospace, monospace }
.name:first-child { margin-top: 0 }
header { padding: 16px 20px; border-left: 6px solid; border-radius: 6px }
header p { margin: 6px 0; max-width: 75ch; color: var(--ink) }
header .badge { font-weight: 600; color: inherit }
header.rounding { border-color: var(--rounding); background: var(--rounding-bg); color: var(--rounding) }
header.semantic { border-color: var(--semantic); background: var(--semantic-bg); color: var(--semantic) }
header.inconclusive { border-color: var(--inconclusive); background: var(--inconclusive-bg);
  color: var(--inconclusive) }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; color: var(--ink) }
h2 { margin: 0 0 8px; font-size: 1.15rem }
ul { margin: 0; padding-left: 20px } li { margin: 4px 0; overflow-wrap: anywhere }
code, pre { font-family: ui-monospace, monospace; font-size: .92em }
.faint, figcaption { color: var(--faint) } .wide { overflow-x: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint) }
.over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
.chart { min-width: 600px; width: 100%; display: block } .chart path, .key path { fill: none; stroke-width: 2 }
.grid { stroke: var(--line); stroke-width: 1 !important } .eps { stroke: var(--faint); stroke-width: 1 !important;
stroke-dasharray: 1 4 }
.rest { stroke: var(--faint); stroke-dasharray: 2 3 } .narrow { stroke: var(--faint); stroke-dasharray: 9 4 }
.s0 { stroke: var(--c0) } .s1 { stroke: var(--c1); stroke-dasharray: 10 3 } .s2 { stroke: var(--c2);
stroke-dasharray: 4 3 }
.s3 { stroke: var(--c3); stroke-dasharray: 10 3 2 3 } .s4 { stroke: var(--c4) } .s5 { stroke: var(--c5);
stroke-dasharray: 10 3 }
.s6 { stroke: var(--c6); stroke-dasharray: 4 3 } .s7 { stroke: var(--c7); stroke-dasharray: 10 3 2 3 }
.dot { fill: currentColor } .ring { fill: var(--paper); stroke-width: 2; stroke-dasharray: none }
.mark { width: 12px; height: 12px; vertical-align: -1px }
.key { width: 28px; height: 12px; margin-right: 6px; vertical-align: middle }
.in64 { fill: var(--c1) } .in32 { fill: var(--paper); stroke: var(--c2); stroke-width: 2 }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: .9rem }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
vertical-align: top }
thead th { background: var(--panel); vertical-align: bottom; font-weight: 600 }
tbody th { min-width: min(300px, 45vw); max-width: 360px; white-space: normal;
  overflow-wrap: anywhere; font-weight: 500 }
.why td { padding-top: 0; white-space: normal; color: var(--faint) }
.why div { position: sticky; left: 10px; max-width: min(1000px, 86vw); overflow-wrap: anywhere }
tr:has(+ .why) > * { border-bottom: 0 }
.strip { width: 200px; display: block } .strip text { font-size: 10px }
.chip { padding: 1px 8px; border-radius: 10px; font-weight: 600 }
.chip.rounding { background: var(--rounding-bg); color: var(--rounding) }
.chip.semantic { background: var(--semantic-bg); color: var(--semantic) }
.chip.inconclusive { background: var(--inconclusive-bg); color: var(--inconclusive) }
dt { font-weight: 600 } dd { margin: 0 0 8px } summary { cursor: pointer; font-weight: 600 }
.inline { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0; font-size: .9rem }
.inline div { display: flex; gap: 6px } .inline dt { font-weight: 400; color: var(--faint) } .inline dd { margin: 0 }
@media (max-width: 600px) { main { padding: 12px 12px 32px } h1 { font-size: 1.35rem } header { padding: 12px 14px } }
@media print { .wide { overflow: visible } details > * { display: block } }
"""
