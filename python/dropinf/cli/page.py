"""One self-contained HTML page that shows the result of an influence query, of text or of images.

The page loads nothing and may be opened from a folder. The result is data within it: only `page.js` reads it, and
turns it into text nodes, never into markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..files import replacing

_SIDES = ("proponents", "opponents")
_SHOWN = ("id", "text", "image")
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


_IMAGE = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*,\S*", re.ASCII)


def query_page(result: Mapping[str, Any], title: str = "Influence") -> str:
    """Return the page that shows `result`, as one HTML document.

    Args:
        result: `index`, `samples`, `kind`, `fisher` and `queries`; each query has `id`, `text`, `image`, `proponents`
            (best first) and `opponents` (most negative first); each of these has `position`, `id`, `score`, `text` and
            `image`, and may have `words`, [text, share] of each, and `exact`, their sum. Any text or image may be None;
            an image is a `data:image/` URI. Other keys are not shown.
        title: the page's title; any text.

    Raises:
        ValueError: a key is missing or holds another type, a score is not finite, an image is not a `data:image/`
            URI, there is no query, or two queries have one id; the message names the place.
    """
    style, script = _asset("page.css"), _asset("page.js")
    # The hashes admit these two texts alone: markup that got into the page could neither run nor load anything.
    policy = (
        f"default-src 'none'; script-src '{_source(script)}'; style-src '{_source(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    head, packed = _markup(title), _pack(result)
    facts = "".join(f"<div><dt>{term}</dt><dd><bdi>{_markup(fact)}</bdi></dd></div>" for term, fact in _facts(result))
    body = _BODY.format(title=head, facts=facts, alone="alone" if len(packed["queries"]) == 1 else "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{head}</title>\n<style>{style}</style>\n</head>\n{body}"
        f'<script type="application/json" id="data">{_embed(packed)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def save_query_page(result: Mapping[str, Any], path: str | os.PathLike[str], title: str = "Influence") -> None:
    """Write `query_page(result, title)` to `path` in one step; a folder that is missing is made.

    Raises:
        ValueError: as in `query_page`; nothing is written then.
    """
    text = query_page(result, title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _asset(name: str) -> str:
    return files("dropinf.cli").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _markup(text: str) -> str:
    """Return the text as markup, with pictures of control characters, and U+FFFD for what UTF-8 cannot hold."""
    return escape(text.translate(_PICTURES))


def _embed(value: object) -> str:
    """Return ASCII JSON without `<`, `>` and `&`: no text in it can end the element that holds it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Index", _text(result, "index", "result")
    yield "Samples", f"{_count(result, 'samples', 'result'):,}"
    yield "Score", _text(result, "kind", "result")
    yield "Fisher", _text(result, "fisher", "result")


def _pack(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked queries, and in `rows` their samples: one that several queries share is stored once."""
    rows: dict[tuple[int, str, str | None, str | None], int] = {}
    queries: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for i, query in enumerate(_list(result, "queries", "result")):
        where = f"queries[{i}]"
        shown: dict[str, Any] = dict(zip(_SHOWN, _sample(query, where), strict=True))
        if seen.setdefault(shown["id"], i) != i:
            raise ValueError(
                f"{where}.id is {shown['id']!r}, as is queries[{seen[shown['id']]}].id; each query needs its own"
            )
        for side in _SIDES:
            shown[side] = []
            for j, item in enumerate(_list(query, side, where)):
                place = f"{where}.{side}[{j}]"
                sample = (_count(item, "position", place), *_sample(item, place))
                shown[side].append([_score(item, place), rows.setdefault(sample, len(rows)), *_words(item, place)])
        queries.append(shown)
    if not queries:
        raise ValueError("queries is empty; a page needs at least one query")
    return {"rows": [dict(zip(("position", *_SHOWN), row, strict=True)) for row in rows], "queries": queries}


def _value(item: object, key: str, where: str) -> Any:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} is {_short(item)}; it must be an object with keys such as {key!r}")
    if key not in item:
        raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, item)) or 'no key'}")
    return item[key]


def _text(item: object, key: str, where: str) -> str:
    value = _value(item, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}.{key} is {_short(value)}; it must be text")
    return value


def _count(item: object, key: str, where: str) -> int:
    value = _value(item, key, where)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{where}.{key} is {_short(value)}; it must be a whole number, 0 or more")
    return int(value)


def _list(item: object, key: str, where: str) -> Sequence[Any]:
    value = _value(item, key, where)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}.{key} is {_short(value)}; it must be a list")
    return value


def _score(item: object, where: str) -> float:
    return _number(_value(item, "score", where), f"{where}.score")


def _number(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is {_short(value)}; it must be a finite number")
    return number


def _words(item: Mapping[str, Any], where: str) -> list[Any]:
    """Return the exact score of a result, and its words with their shares; nothing where it has none."""
    if "words" not in item:
        return []
    words: list[tuple[str, float]] = []
    for i, word in enumerate(_list(item, "words", where)):
        if not isinstance(word, Sequence) or len(word) != 2 or not isinstance(word[0], str):
            raise ValueError(f"{where}.words[{i}] is {_short(word)}; it must be [text, share]")
        words.append((word[0], _number(word[1], f"{where}.words[{i}][1]")))
    if "".join(text for text, _ in words) != item["text"]:
        raise ValueError(f"{where}.words are not those of its text; in a row, they must be the text")
    return [_number(_value(item, "exact", where), f"{where}.exact"), words]


def _sample(item: object, where: str) -> tuple[str, str | None, str | None]:
    """Return the id, the text and the image of a query or of a result."""
    name = _text(item, "id", where)
    text, image = (None if _value(item, key, where) is None else _text(item, key, where) for key in ("text", "image"))
    if image is not None and not _IMAGE.fullmatch(image):
        raise ValueError(f"{where}.image is {_short(image)}; it must be a data:image/ URI or None")
    return name, text, image


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_BODY = """<body class="{alone}">
<aside>
<header><h1>{title}</h1><dl>{facts}</dl></header>
<button type="button" id="menu" aria-expanded="false" aria-controls="queries">Queries</button>
<nav id="queries" aria-label="Queries">
<input type="search" id="search" placeholder="Search queries" aria-label="Search queries" autocomplete="off" hidden>
<ol id="list" role="list"></ol>
<p id="nothing" class="soft" hidden>No query matches.</p>
</nav>
</aside>
<main>
<article aria-labelledby="name">
<header class="top">
<h2 id="name"></h2>
<span class="steps"><span id="place" class="soft"></span>
<button type="button" id="previous" aria-label="Previous query" title="Previous query (up)">&#8593;</button>
<button type="button" id="next" aria-label="Next query" title="Next query (down)">&#8595;</button></span>
<button type="button" id="copy">Copy as JSON</button>
</header>
<p id="notice" hidden></p>
<div id="subject" role="region" aria-label="Query"></div>
</article>
<div class="tools">
<input type="search" id="filter" placeholder="Filter results" aria-label="Filter results" autocomplete="off">
<button type="button" id="shared" aria-pressed="true">Shared words</button>
<p class="soft">Training on a sample with a positive score lowers this query&#8217;s loss. All bars share one scale.</p>
<p id="legend" class="soft" hidden><span class="word lowers">Blue</span> words add to a sample&#8217;s exact score,
<span class="word raises">orange</span> ones take away. Point at a word for its share; shares add up to the score.</p>
</div>
<div class="tabs" role="group" aria-label="Results shown">
<button type="button" data-side="proponents" aria-pressed="true">Proponents
<span data-count="proponents"></span></button>
<button type="button" data-side="opponents" aria-pressed="false">Opponents
<span data-count="opponents"></span></button>
</div>
<div id="sides" data-side="proponents">
<section id="proponents" aria-labelledby="for"><h3 id="for">Proponents <span data-count="proponents"></span></h3>
<ol role="list"></ol><p class="empty soft" hidden></p></section>
<section id="opponents" aria-labelledby="against"><h3 id="against">Opponents <span data-count="opponents"></span></h3>
<ol role="list"></ol><p class="empty soft" hidden></p></section>
</div>
</main>
<p id="status" class="unseen" role="status"></p>
<noscript><p>This page shows its data with JavaScript, which is switched off.</p></noscript>
"""
