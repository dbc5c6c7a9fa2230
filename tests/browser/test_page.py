"""The query page, used as a reader uses it. After each test the console must be empty and nothing may be loaded."""

from __future__ import annotations

from urllib.parse import quote

import numpy as np
import pytest

pytestmark = pytest.mark.browser

UP, DOWN, TAB, CONTROL = "\ue013", "\ue015", "\ue004", "\ue009"


def test_a_click_shows_a_query_in_full(page, make):
    result = make(3)
    page.open(result)
    assert page.selected() == "q0"
    page.choose(2)
    assert page.selected() == "q2"
    assert page.texts("#subject") == ["the text of query 2"]
    assert page.texts("#place") == ["3 of 3"]
    assert page.js("return document.title") == "q2 \N{MIDDLE DOT} Influence"
    for side in ("proponents", "opponents"):
        items = result["queries"][2][side]
        assert page.texts(f"#{side} h3 span") == [str(len(items))]
        assert page.texts(f"#{side} .rank") == [str(i + 1) for i in range(len(items))]
        assert page.texts(f"#{side} .text") == [item["text"] for item in items]
        assert page.texts(f"#{side} .card .id") == [item["id"] for item in items]
        assert page.texts(f"#{side} .position") == [f"position {item['position']}" for item in items]
        width = page.all(".bar")[0].size["width"]
        bars = [bar.size["width"] / width for bar in page.all(f"#{side} .bar i")]
        assert np.allclose(bars, [abs(item["score"]) / 0.4 for item in items], atol=0.01)
    assert page.texts("#proponents .score") == ["+0.400", "+0.200", "+0.133", "+0.100"]
    assert page.texts("#opponents .score") == ["\N{MINUS SIGN}0.200", "\N{MINUS SIGN}0.100", "\N{MINUS SIGN}0.067"]
    left, right = page.all("#sides section")
    assert left.location["y"] == right.location["y"]
    assert left.location["x"] + left.size["width"] < right.location["x"]


def test_the_address_names_the_query(page, make):
    strange = "a/b #?&%41 \N{SNOWMAN} '\0\ud800"
    result = make([make.query(i, id=id) for i, id in enumerate(["q0", "q1", strange])])
    page.open(result, hash="#q=q1")
    assert page.selected() == "q1"
    page.choose(2)
    shown = strange.replace("\0", "\N{SYMBOL FOR NULL}").replace("\ud800", "\ufffd")
    assert page.selected() == shown
    assert page.js("return location.hash") == "#q=" + quote(strange.replace("\ud800", "\ufffd"), safe="!'()*")
    page.driver.refresh()
    assert page.texts("#subject") == ["the text of query 2"]
    page.back()
    assert page.selected() == "q1"
    page.press(DOWN)
    assert page.js("return location.hash").startswith("#q=a%2Fb%20")


@pytest.mark.parametrize("hash", ["#q=gone%3Cb%3E", "#gone<b>", "#q=%E0%A4%A"])
def test_an_address_of_no_query_says_so(page, make, hash):
    page.open(make(2), hash)
    assert page.selected() == "q0"
    wanted = "%E0%A4%A" if "%A4" in hash else "gone<b>"
    assert page.shown("#notice") == [f"This page has no query \u201c{wanted}\u201d."]
    page.press(DOWN)
    assert page.selected() == "q1"
    assert page.shown("#notice") == []


def test_keys_move_through_the_queries(page, make):
    page.open(make(3))
    page.press(DOWN)
    assert page.selected() == "q1"
    page.press(DOWN, DOWN, DOWN)
    assert page.selected() == "q2"
    assert page.js("return location.hash") == "#q=q2"
    page.press(UP)
    assert page.selected() == "q1"
    page.press(CONTROL, DOWN)
    assert page.selected() == "q1"
    page.click("#previous")
    assert page.selected() == "q0"
    page.click("#next")
    page.press(DOWN)
    assert page.selected() == "q2"
    page.choose(0)
    page.press(DOWN)
    assert page.js("return document.activeElement.getAttribute('aria-current')") == "true"


def test_keys_scroll_within_the_texts(page, make):
    long = make.sample(1, 0.5, "word " * 2000)
    page.open(make([make.query(0, "line\n" * 500, proponents=[long]), make.query(1)]))
    page.click(".more")
    page.press(DOWN)
    assert page.selected() == "q0"
    assert page.js("return document.querySelector('#subject').tabIndex") == 0
    page.js("document.querySelector('#subject').focus()")
    page.press(DOWN)
    assert page.selected() == "q0"
    page.type("#filter", "word")
    page.press(DOWN)
    assert page.selected() == "q0"


def test_tab_reaches_one_query_of_the_list(page, make):
    page.open(make(20), hash="#q=q4")
    page.click("#search")
    reached = []
    for _ in range(5):
        page.press(TAB)
        reached.append(page.js("const a = document.activeElement; return a.id || a.textContent.slice(0, 2)"))
        assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["q4", "previous", "next", "copy", "filter"]


def test_search_narrows_the_list(page, make):
    page.open(make(8))
    assert page.shown("#search") == []
    page.open(make(12))
    page.type("#search", "QUERY 1")
    assert page.shown("#list .id") == ["q1", "q10", "q11"]
    page.press(DOWN)
    assert page.selected() == "q1"
    page.press(DOWN, DOWN, DOWN)
    assert page.selected() == "q11"
    page.press(UP)
    assert page.selected() == "q10"
    assert page.texts("#status") == ["Query 11 of 12: 4 proponents, 3 opponents"]
    page.type("#search", "q3")
    assert page.shown("#list .id") == ["q3"]
    page.type("#search", "no such")
    assert page.shown("#list .id") == []
    assert page.shown("#nothing") == ["No query matches."]
    page.press(DOWN)
    assert page.selected() == "q10"


def test_the_filter_narrows_both_sides(page, make):
    result = make(3)
    result["queries"][0]["proponents"][3]["position"] = 777
    page.open(result)
    for wanted, proponents, opponents in (
        ("777", ["row-3"], []),
        ("PROPONENT 2", ["row-2"], []),
        ("row-1", ["row-1"], []),
        ("5", [], ["row-50", "row-51", "row-52"]),
        ("of query", ["row-0", "row-1", "row-2", "row-3"], ["row-50", "row-51", "row-52"]),
    ):
        page.type("#filter", wanted)
        assert page.shown("#proponents .card .id") == proponents
        assert page.shown("#opponents .card .id") == opponents
    page.type("#filter", "ponent 2")
    assert page.texts("h3 span") == ["1 of 4", "1 of 3"]
    assert page.shown("#proponents .rank") == ["3"]
    assert page.texts("#status") == ["1 of 4 proponents, 1 of 3 opponents"]
    page.click("#next")
    assert page.shown("#proponents .card .id") == ["row-102"]
    page.type("#filter", "no such")
    assert page.shown(".empty") == ["None matches the filter."] * 2
    page.type("#filter", "q")
    assert page.texts("h3 span") == ["4", "3"]
    assert page.shown(".empty") == []


def test_a_narrow_screen_has_tabs_and_a_menu(page, make):
    page.device("narrow")
    page.open(make(3))
    assert page.shown("#sides .card .id") == ["row-0", "row-1", "row-2", "row-3"]
    page.click(".tabs [data-side=opponents]")
    assert page.shown("#sides .card .id") == ["row-50", "row-51", "row-52"]
    assert [tab.get_attribute("aria-pressed") for tab in page.all(".tabs button")] == ["false", "true"]
    assert page.shown("#list a") == []
    page.click("#menu")
    assert page.one("#menu").get_attribute("aria-expanded") == "true"
    page.choose(1)
    assert page.selected() == "q1"
    assert page.shown("#list a") == []
    assert page.shown("#sides .card .id") == ["row-150", "row-151", "row-152"]
    page.click(".tabs [data-side=proponents]")
    assert page.shown("#sides .card .id") == ["row-100", "row-101", "row-102", "row-103"]
    page.device("wide")
    assert len(page.shown("#sides .card .id")) == 7
    assert page.shown(".tabs, #menu") == []


def test_paper_shows_both_sides_of_the_selected_query(page, make):
    page.device("narrow", "dark", media="print")
    page.open(make([make.query(i, "line\n" * 500) for i in range(2)]), hash="#q=q1")
    assert page.shown("h2") == ["q1"]
    assert len(page.shown("#sides .card")) == 7
    assert page.shown("nav, #menu, input, button") == []
    assert page.js("const s = document.querySelector('#subject'); return s.scrollHeight - s.clientHeight") <= 0
    assert page.style("body", "color") == "rgb(0, 0, 0)"
    assert page.style("body", "backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(page, make, scheme):
    page.device("wide", scheme)
    page.open(make([make.query(0, "proponent", proponents=[make.sample(1, 1, "proponent " * 99)]), make.query(1)]))
    assert (page.luminance("body", "backgroundColor") > 0.5) == (scheme == "light")
    readable = {"body": (".text", ".soft", ".position", ".more"), "aside": ("dt", ".start"), "mark": ("mark",)}
    for ground, names in {**readable, "[aria-current]": ("[aria-current] .start",)}.items():
        for name in names:
            assert page.contrast(name, "color", ground) > 4.5, name
    assert page.contrast(".positive", "backgroundColor", "body") > 3
    assert page.contrast(".negative", "backgroundColor", "body") > 3


def test_every_control_has_a_name(page, make):
    page.open(make(20))
    for control in page.all("button, input, a, section, nav, [role=region], [role=group]"):
        assert control.accessible_name or not control.is_displayed()


def test_a_thousand_queries_of_which_one_is_rendered(page, make):
    top = [make.sample(i, 1 / (i + 1), "a text of some words " * 40) for i in range(20)]
    page.open(make([make.query(i, proponents=top, opponents=top[::-1]) for i in range(1000)]), hash="#q=q700")
    assert page.selected() == "q700"
    place, box = page.one("[aria-current]").location["y"], page.one("#list")
    assert box.location["y"] <= place <= box.location["y"] + box.size["height"]
    assert len(page.all("#list a")) == 1000
    assert len(page.all(".card")) == 40
    page.type("#search", "query 99")
    assert len(page.shown("#list a")) == 11
    page.press(DOWN)
    assert page.selected() == "q99"
    assert len(page.all(".card")) == 40
