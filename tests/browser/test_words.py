"""Words that are shaded by their shares of a sample's score."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror='window.ran=true'> \x1b\u202e "


def with_words(make, *words, position=1, score=1.0):
    text = "".join(piece for piece, _ in words)
    found = make.sample(position, score, text)
    return {**found, "words": [list(word) for word in words], "exact": sum(share for _, share in words)}


def test_words_are_shaded_by_their_shares(page, make):
    good = with_words(make, ("the ", 0.5), ("cat ", -0.25), ("sat", 0.0), ("", 0.125))
    bad = with_words(make, (HOSTILE, -1.0), position=2, score=-1.0)
    page.open(make([make.query(text="the cat", proponents=[good], opponents=[bad]), make.query(1)]))
    assert page.texts("#proponents .word") == ["the ", "cat ", "sat"]
    shade = "return [...document.querySelectorAll('#sides .word')].map((n) => [n.className, n.style.getPropertyValue('--share'), n.title])"
    assert page.js(shade) == [
        ["word lowers", "0.5", "+0.5000"],
        ["word raises", "0.25", "\u22120.2500"],
        ["word lowers", "0", "0.000"],
        ["word raises", "1", "\u22121.000"],
    ]
    strong, weak = (page.style(f"#proponents .word:nth-child({i})", "backgroundColor") for i in (1, 3))
    assert strong != weak
    assert page.texts("#opponents .word") == [HOSTILE.replace("\x1b", "\u241b")]
    assert page.js("return window.ran") is None
    assert page.texts("#proponents .exact") == ["exact +0.38"]
    assert page.shown("#legend")
    assert not page.shown("#shared")
    page.click("#next")
    assert not page.shown("#legend")
    assert page.shown("#shared")


def test_a_long_text_of_words_expands(page, make):
    words = [(f"word{i} ", 0.01 * (i % 3 - 1)) for i in range(200)]
    page.open(make([make.query(proponents=[with_words(make, *words)])]))
    text = "".join(piece for piece, _ in words)
    start = page.texts("#proponents .text")[0]
    assert start.endswith("\u2026")
    assert text.startswith(start[:-1])
    assert "".join(page.texts("#proponents .word")) == start[:-1]
    page.click("#proponents .more")
    assert page.texts("#proponents .text") == [text]
    assert page.js("return document.querySelectorAll('#proponents .word').length") == 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_strongest_word_can_be_read(page, make, scheme):
    page.device(scheme=scheme)
    page.open(make([make.query(proponents=[with_words(make, ("good ", 1.0), ("bad", -1.0))])]))
    for kind in ("lowers", "raises"):
        mixed = (
            "const n = document.querySelector(arguments[0]); const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
            "for (const colour of [getComputedStyle(document.body).backgroundColor, getComputedStyle(n).backgroundColor]) {c.fillStyle = colour; c.fillRect(0, 0, 1, 1);}"
            "const ground = c.getImageData(0, 0, 1, 1).data; c.fillStyle = getComputedStyle(n).color; c.fillRect(0, 0, 1, 1);"
            "const l = (d) => [0.2126, 0.7152, 0.0722].reduce((s, w, i) => s + w * ((d[i] / 255) <= 0.04045 ? d[i] / 255 / 12.92 : ((d[i] / 255 + 0.055) / 1.055) ** 2.4), 0);"
            "const [a, b] = [l(ground), l(c.getImageData(0, 0, 1, 1).data)].sort(); return (b + 0.05) / (a + 0.05);"
        )
        assert page.js(mixed, f"#proponents .word.{kind}") >= 4.5
