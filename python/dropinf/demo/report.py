"""Self-contained HTML reports on the influence of images.

Everything takes arrays, labels and scores, and returns HTML text in which every label is escaped. A page loads
nothing: styles, images and plots are inline, and it follows the reader's light or dark mode.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from ..files import replacing


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels.

    Args:
        pixels: `[N, H, W]` grey or `[N, H, W, 3]` colour, in `[0, 1]`.
        given: the label that each image carries.
        true: the label that each should carry, where known; an image whose two labels differ is marked flipped.
    """

    pixels: NDArray[Any]
    given: Sequence[object]
    true: Sequence[object] | None = None

    def __post_init__(self) -> None:
        for name, labels in (("given", self.given), ("true", self.true)):
            if labels is not None and len(labels) != len(self.pixels):
                raise ValueError(f"{name} has {len(labels)} labels, must have {len(self.pixels)}: one per image")

    def flipped(self, index: int) -> bool:
        """Return whether the true label of image `index` is known and differs from the given one."""
        return self.true is not None and bool(self.true[index] != self.given[index])


def image_uri(pixels: NDArray[Any]) -> str:
    """Return one `[H, W]` or `[H, W, 3]` image in `[0, 1]` as a PNG data URI."""
    buffer = io.BytesIO()
    imsave(buffer, np.clip(pixels, 0, 1), format="png", cmap="gray", vmin=0, vmax=1, metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def image_card(images: LabelledImages, index: int, *, score: float | None = None, note: str = "") -> str:
    """Return image `index` with its labels, its score and a note as one `<figure>`."""
    given, flipped = escape(str(images.given[index])), images.flipped(index)
    lines = [f"<b>{given}</b>"]
    if images.true is not None and flipped:
        lines = [f"<b>{given}</b> <span class=tag>flipped</span>", f"true {escape(str(images.true[index]))}"]
    elif images.true is not None:
        lines.append("correct")
    if score is not None:
        lines.append(f"<span class=num>{format_score(score)}</span>")
    if note:
        lines.append(escape(note))
    style = ' class="card flipped"' if flipped else ' class="card"'
    picture = f'<img src="{image_uri(images.pixels[index])}" alt="image {index}, labelled {given}">'
    return f"<figure{style}>{picture}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def format_score(score: float) -> str:
    """Return a signed score with three significant digits, or whole from 1,000 on, and a real minus sign."""
    return f"{score:{'+.3g' if abs(score) < 999.5 else '+,.0f'}}".replace("-", "\N{MINUS SIGN}")


def image_grid(images: LabelledImages, indices: Iterable[int], scores: NDArray[Any] | None = None) -> str:
    """Return the cards of `indices`, in that order; `scores` is `[N]`, one per image of `images`."""
    cards = (image_card(images, i, score=None if scores is None else float(scores[i])) for i in map(int, indices))
    return f'<div class="grid">{"".join(cards)}</div>'


def query_block(
    queries: LabelledImages,
    query: int,
    train: LabelledImages,
    scores: NDArray[Any],
    *,
    top: int = 5,
    note: str = "",
) -> str:
    """Return one query beside its strongest proponents and opponents.

    Args:
        queries, query: the queries and the index of the one to show.
        train: the training images.
        scores: `[N]` influence of each training image on this query, positive where it lowers the loss.
        top: how many of each side to show.
        note: a line under the query, such as the prediction.
    """
    order = np.argsort(-scores, kind="stable")
    sides = (
        ("Proponents", "lower its loss", order[:top]),
        ("Opponents", "raise its loss", order[::-1][:top]),
    )
    rows = "".join(
        f"<div><h3>{name} <small>{effect}</small></h3>{image_grid(train, indices, scores)}</div>"
        for name, effect, indices in sides
    )
    card = image_card(queries, query, note=note)
    return f'<article class="query"><div class="subject">{card}</div><div class="sides">{rows}</div></article>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], highlight: str = "") -> str:
    """Return a table whose first column names the row; the row named `highlight` stands out."""

    def line(row: Sequence[str]) -> str:
        style = ' class="mark"' if row[0] == highlight else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        return f'<tr{style}><th scope="row">{escape(row[0])}</th>{cells}</tr>'

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(line(row) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def roc_plot(curves: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], max_rate: float = 1.0) -> str:
    """Return ROC curves as inline SVG whose ink takes the page's text colour.

    Args:
        curves: legend label -> (false positive rate, true positive rate), each `[P]`.
        max_rate: where the false positive axis ends; below 1 it magnifies the part that a reviewer would see.
    """
    ink = "#010203"
    styles = (("#3b82f6", "-"), ("#e8811a", "-"), ("#17a37b", "-"), ("#d2438c", "-"), ("#9a6cf0", "--"))
    options: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dropinf",
        "font.family": "sans-serif",
        "font.size": 11,
    }
    with matplotlib.rc_context(options):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.subplots()
        for position, (label, (false_rate, true_rate)) in enumerate(curves.items()):
            color, line = styles[position % len(styles)]
            axes.plot(false_rate, true_rate, line, color=color, linewidth=2, label=label)
        axes.plot([0, 1], [0, 1], ":", color=ink, linewidth=1, alpha=0.5, label="chance")
        axes.set(xlim=(0, max_rate), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate")
        axes.grid(color=ink, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.tick_params(colors=ink)
        axes.legend(frameon=False, labelcolor=ink, loc="center right")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.label.set_color(ink)
        axes.yaxis.label.set_color(ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # The prolog and its metadata name outside addresses, which a page that loads nothing does without.
    svg = svg[svg.index("<svg") :]
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    if start >= 0:
        svg = svg[:start] + svg[end + len("</metadata>") :]
    return f'<div class="plot">{svg.replace(ink, "currentColor")}</div>'


def section(title: str, body: str, lead: str = "") -> str:
    """Return a section of ready HTML under an escaped title and an escaped lead sentence."""
    intro = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>"


def page(title: str, headline: str, sections: Iterable[str]) -> str:
    """Return the whole document; `title` and `headline` are escaped, `sections` are ready HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>"
        f'<header><p class="eyebrow">{escape(title)}</p><h1>{escape(headline)}</h1></header>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _style() -> str:
    return """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6570; --paper: #fff; --tint: #f3f5f8;
  --line: #dfe3e8; --accent: #1f66d6; --alarm: #b3261e; --wash: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4af; --paper: #14171b; --tint: #1d2127;
  --line: #323841; --accent: #7db0ff; --alarm: #ff8f84; --wash: #3a1f1d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.eyebrow { margin: 0; color: var(--accent); font-weight: 600; font-size: .9rem; }
h1 { margin: .4rem 0 0; font-size: clamp(1.35rem, 3.4vw, 1.9rem); line-height: 1.28; font-weight: 650;
  text-wrap: balance; }
h2 { margin: 2.75rem 0 .4rem; font-size: 1.2rem; }
h3 { margin: 0 0 .35rem; font-size: .9rem; }
small, section > p { color: var(--soft); }
small { font-weight: 400; }
section > p { margin: 0 0 1rem; max-width: 44rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: .6rem; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 500; }
.mark > * { background: var(--tint); font-weight: 650; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .75rem; }
.card { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--tint);
  font-size: .8rem; line-height: 1.4; }
.card.flipped { border-color: var(--alarm); background: var(--wash); }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  border-radius: .3rem; background: #000; margin-bottom: .4rem; }
.tag { color: var(--alarm); font-weight: 600; }
.num { font-variant-numeric: tabular-nums; color: var(--soft); }
.query { display: grid; grid-template-columns: 9rem 1fr; gap: 1.5rem; padding: 1.25rem 0;
  border-top: 1px solid var(--line); }
.subject .card { border-color: var(--accent); }
.sides { display: grid; gap: 1rem; min-width: 0; }
.plot svg { display: block; width: 100%; max-width: 42rem; height: auto; }
.plot text { font-family: inherit !important; }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; border-radius: .6rem; background: var(--tint);
  font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 40rem) { .query { grid-template-columns: 1fr; } .subject { max-width: 8rem; }
  .grid { grid-template-columns: repeat(auto-fill, minmax(4.9rem, 1fr)); gap: .5rem; }
  th, td { padding: .45rem .4rem; font-size: .86rem; } }
"""
