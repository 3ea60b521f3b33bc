"""The page of ``tmx explain --html``: one file, without scripts and without anything from elsewhere."""

from __future__ import annotations

from html import escape

from tmx_compile.commands.outcome import Outcome, Row
from tmx_compile.commands.picture import Shape, svg

# Colours that stay apart with every kind of colour blindness (M. Okabe and K. Ito, "Color Universal Design", 2002).
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #8a8a8a; --faint: #e4e4e4;
  --triangle: #0072b2; --on-triangle: #ffffff; --refused: #e69f00; --last: #e69f00; --dense: #9a9a9a; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #161616; --line: #8a8a8a; --faint: #333333;
  --triangle: #56b4e9; --on-triangle: #000000; --dense: #7d7d7d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--faint); padding: .3rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.map { display: flex; flex-wrap: wrap; gap: .3rem; padding: 0; list-style: none; }
.map li { width: 2.2rem; height: 2.2rem; display: grid; place-items: center; font-size: .8rem; box-sizing: border-box;
  border: 2px solid var(--line); }
.map .triangle, .key .triangle { background: var(--triangle); color: var(--on-triangle); }
.map .dense { background: var(--faint); }
.map .refused, .key .refused { background: var(--refused); color: #000000; border-style: dashed; }
.map .none { border-style: dotted; }
.key span { display: inline-block; padding: 0 .5rem; margin-right: .5rem; border: 2px solid var(--line); }
.key .dense-call { background: var(--faint); } .key .none { border-style: dotted; }
.key .streaming { background: var(--triangle); color: var(--on-triangle); }
.key .last { background: var(--last); color: #000000; } .key .middle { background: var(--faint); }
.key .whole { background: var(--dense); color: #000000; }
.masks { display: flex; flex-wrap: wrap; gap: 2rem; } figure { margin: 0; width: 22rem; max-width: 100%; }
svg.mask { width: 100%; height: auto; display: block; }
svg .frame { fill: none; stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg polygon { stroke-width: 1; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
svg .streaming { fill: var(--triangle); stroke: var(--triangle); }
svg .last { fill: var(--last); stroke: var(--last); }
svg .middle { fill: var(--faint); } svg .dense { fill: var(--dense); }
"""

_MAP_KEY = (
    '<p class="key"><span class="triangle">triangle</span><span class="dense-call">dense</span>'
    '<span class="refused">dense, though selected</span><span class="none">no attention</span></p>'
)
_MASK_KEY = (
    '<p class="key"><span class="streaming">streaming: sinks and window</span><span class="last">last rows</span>'
    '<span class="middle">middle: skipped</span><span class="whole">attended densely</span></p>'
    "<p>Rows run downwards, keys to the right, to scale; a part thinner than a line is drawn one line wide.</p>"
)


def page(outcome: Outcome) -> str:
    """The page as HTML. Whatever comes from the model (names, paths, reasons) is escaped."""
    title = f"tmx explain {escape(outcome.model)}"
    summary = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in outcome.summary())
    squares = "".join(_square(row) for row in outcome.rows)
    figures = "".join(_figure(shape, shared) for shape, shared in outcome.shapes().items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in outcome.notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n<dl>{summary}</dl>\n"
        + (f"<h2>Notes</h2><ul>{notes}</ul>\n" if notes else "")
        + f'<h2>Layers</h2>{_MAP_KEY}<ol class="map">{squares}</ol>\n'
        f'<h2>Masks</h2>{_MASK_KEY}<div class="masks">{figures}</div>\n'
        f"<h2>Every layer</h2>{_table(outcome)}\n</body></html>\n"
    )


def _square(row: Row) -> str:
    name = "?" if row.layer is None else str(row.layer)
    text = f"layer {name}: {row.words}" + (f" ({row.why})" if row.why else "")
    return f'<li class="{row.kind}" title="{escape(text)}">{name}</li>'


def _figure(shape: Shape, shared: list[Row]) -> str:
    layers = ", ".join("?" if row.layer is None else str(row.layer) for row in shared)
    reach = shape.geometry.reach
    own = "" if reach is None else f", within the layer's own window of {reach + 1:,} keys"
    if shape.geometry.is_dense:
        label = f"dense: causal{own}"
    else:
        sink, window, last = shape.geometry.counts
        label = f"triangle: {sink:,} sinks, window {window:,}, {last:,} last rows{own}"
    row = shared[0]
    pairs = f"{row.attended:,} of {row.causal:,} pairs ({row.share})"
    caption = f"<strong>{label}</strong><br>{pairs}<br>layer{'s' * (len(shared) > 1)} {layers}"
    return f"<figure>{svg(shape, label)}<figcaption>{caption}</figcaption></figure>"


def _table(outcome: Outcome) -> str:
    heads = "".join(f"<th>{name}</th>" for name in ("layer", "module", "decision", "lowering", "pairs", "share", "why"))
    lines = "".join(
        f'<tr><td class="number">{"?" if row.layer is None else row.layer}</td><td>{escape(row.path)}</td>'
        f"<td>{row.words}</td><td>{escape(row.lowering)}</td>"
        f'<td class="number">{f"{row.attended:,}" if row.causal else ""}</td><td class="number">{row.share}</td>'
        f"<td>{escape(row.why)}</td></tr>"
        for row in outcome.rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
