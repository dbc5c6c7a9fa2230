"""The query page, used as a reader uses it. After each test the console must be empty and nothing may be loaded."""

from __future__ import annotations

import json
from urllib.parse import quote

import numpy as np
import pytest

from dropinf.pages import query_page

pytestmark = pytest.mark.browser

UP, DOWN, TAB, CONTROL, ENTER = "\ue013", "\ue015", "\ue004", "\ue009", "\ue007"
RUN = "window.ran = true; alert(1)"
HOSTILE = {
    "script": f"</script><script>{RUN}</script>",
    "image": f"<img src=x onerror='{RUN}'><svg onload='{RUN}'>",
    "attribute": f'" onmouseover="{RUN}" x=\'',
    "comment": "<!-- <script> --> ]]> <![CDATA[ &lt;b&gt; &#60;",
    "lines": "one\u2028two\u2029three\rfour\x85five",
    "rtl": "\u05e9\u05dc\u05d5\u05dd (abc) 123 \u202eevil\u202c \u0645\u0631\u062d\u0628\u0627",
    "emoji": "\N{FAMILY}\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea e\u0301 Z\u0351\u036b\u0343",
    "template": "${alert(1)} {{7*7}} `x` \\u003cb\\u003e %3Cb%3E",
    "proto": "__proto__ constructor toString",
    "long": "word <b> " * 11_500,
    "unbroken": "x" * 100_000,
}


def selected(page):
    (name,) = page.texts("h2")
    assert page.texts("#list a[aria-current=true] .id") == [name]
    return name


def test_a_click_shows_a_query_in_full(page, make):
    result = make(3)
    page.open(result)
    assert selected(page) == "q0"
    page.choose(2)
    assert selected(page) == "q2"
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
    assert selected(page) == "q1"
    page.choose(2)
    shown = strange.replace("\0", "\N{SYMBOL FOR NULL}").replace("\ud800", "\ufffd")
    assert selected(page) == shown
    assert page.js("return location.hash") == "#q=" + quote(strange.replace("\ud800", "\ufffd"), safe="!'()*")
    page.driver.refresh()
    assert page.texts("#subject") == ["the text of query 2"]
    page.back()
    assert selected(page) == "q1"
    page.press(DOWN)
    assert page.js("return location.hash").startswith("#q=a%2Fb%20")


@pytest.mark.parametrize("hash", ["#q=gone%3Cb%3E", "#gone<b>", "#q=%E0%A4%A"])
def test_an_address_of_no_query_says_so(page, make, hash):
    page.open(make(2), hash)
    assert selected(page) == "q0"
    wanted = "%E0%A4%A" if "%A4" in hash else "gone<b>"
    assert page.shown("#notice") == [f"This page has no query \u201c{wanted}\u201d."]
    page.press(DOWN)
    assert selected(page) == "q1"
    assert page.shown("#notice") == []


def test_keys_move_through_the_queries(page, make):
    page.open(make(3))
    page.press(DOWN)
    assert selected(page) == "q1"
    page.press(DOWN, DOWN, DOWN)
    assert selected(page) == "q2"
    assert page.js("return location.hash") == "#q=q2"
    page.press(UP)
    assert selected(page) == "q1"
    page.press(CONTROL, DOWN)
    assert selected(page) == "q1"
    page.click("#previous")
    assert selected(page) == "q0"
    page.click("#next")
    page.press(DOWN)
    assert selected(page) == "q2"
    page.choose(0)
    page.press(DOWN)
    assert page.js("return document.activeElement.getAttribute('aria-current')") == "true"


def test_keys_scroll_within_the_texts(page, make):
    long = make.sample(1, 0.5, "word " * 2000)
    page.open(make([make.query(0, "line\n" * 500, proponents=[long]), make.query(1)]))
    page.click(".more")
    page.press(DOWN)
    assert selected(page) == "q0"
    assert page.js("return document.querySelector('#subject').tabIndex") == 0
    page.js("document.querySelector('#subject').focus()")
    page.press(DOWN)
    assert selected(page) == "q0"
    page.type("#filter", "word")
    page.press(DOWN)
    assert selected(page) == "q0"


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
    assert selected(page) == "q1"
    page.press(DOWN, DOWN, DOWN)
    assert selected(page) == "q11"
    page.press(UP)
    assert selected(page) == "q10"
    assert page.texts("#status") == ["Query 11 of 12: 4 proponents, 3 opponents"]
    page.type("#search", "q3")
    assert page.shown("#list .id") == ["q3"]
    page.type("#search", "no such")
    assert page.shown("#list .id") == []
    assert page.shown("#nothing") == ["No query matches."]
    page.press(DOWN)
    assert selected(page) == "q10"


def test_a_long_text_expands(page, make):
    texts = ["word " * 200, "line\n" * 20, "x" * 1000, "just short " * 30, "x" + "\U0001f600" * 400]
    page.open(make([make.query(proponents=[make.sample(i, 1, text) for i, text in enumerate(texts)])]))
    starts = page.texts("#proponents .text")
    assert starts[0] == "word " * 63 + "word\u2026"
    assert starts[1] == "line\n" * 4 + "line\u2026"
    assert starts[2] == "x" * 320 + "\u2026"
    assert starts[3] == texts[3]
    assert starts[4] == "x" + "\U0001f600" * 159 + "\u2026"
    assert page.texts("#proponents .more")[:2] == ["Show all 1,000 characters", "Show all 100 characters"]
    assert len(page.all("#proponents .more")) == 4
    page.click("#proponents .more")
    assert page.texts("#proponents .text")[0] == texts[0]
    assert page.texts("#proponents .text")[1:] == starts[1:]
    button = page.all("#proponents .more")[0]
    assert (button.text, button.get_attribute("aria-expanded")) == ("Show less", "true")
    button.send_keys(ENTER)
    assert page.texts("#proponents .text") == starts
    assert button.get_attribute("aria-expanded") == "false"


def test_a_text_of_shared_words_alone_expands(page, make):
    text = "rates " * 40_000
    page.open(make([make.query(0, "rates", proponents=[make.sample(1, 1, text)])]))
    page.js("document.querySelector('.more').click()")  # a script has 30 s: quadratic time would take longer
    assert page.texts("#proponents .text") == [text]
    assert page.js("return document.querySelectorAll('mark').length") == 40_000


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_a_long_query_scrolls_to_its_end(page, make, size):
    page.device(size)
    page.open(make([make.query(0, "line\n" * 500), make.query(1)]))
    height = "const s = document.querySelector(arguments[0]); return [s.clientHeight, s.scrollHeight]"
    shown, whole = page.js(height, "#subject")
    assert shown < 500 < whole
    assert page.js(height, "#subject .text") == [whole, whole]
    page.click("#next")
    shown, whole = page.js(height, "#subject")
    assert shown == whole


def test_shared_words_are_marked_until_switched_off(page, make):
    text = (
        "Raise the RATES: interest, interested; caf\u00e9 e\u0301t\u00e9 \u4e0a\u8c03\u5229\u7387. "
        + "filler " * 80
        + "rates"
    )
    query = make.query(0, "the interest rates \u00e9t\u00e9 and \u5229\u7387", proponents=[make.sample(1, 1, text)])
    page.open(make([query, make.query(1, "and of the", proponents=[make.sample(2, 1, "and of the")])]))
    assert page.texts("mark") == ["RATES", "interest", "e\u0301t\u00e9", "\u5229\u7387"]
    assert page.texts("#proponents .text")[0].startswith(text[:100])
    page.click(".more")
    assert page.texts("mark") == ["RATES", "interest", "e\u0301t\u00e9", "\u5229\u7387", "rates"]
    assert page.texts("#proponents .text") == [text]
    button, clear = page.one("#shared"), "rgba(0, 0, 0, 0)"
    assert page.style("mark", "backgroundColor") != clear
    button.click()
    assert page.style("mark", "backgroundColor") == clear
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.style("mark", "backgroundColor") != clear
    assert button.get_attribute("aria-pressed") == "true"
    page.click("#next")
    assert page.texts("mark") == []
    assert page.shown("#shared") == []


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
    assert selected(page) == "q1"
    assert page.shown("#list a") == []
    assert page.shown("#sides .card .id") == ["row-150", "row-151", "row-152"]
    page.click(".tabs [data-side=proponents]")
    assert page.shown("#sides .card .id") == ["row-100", "row-101", "row-102", "row-103"]
    page.device("wide")
    assert len(page.shown("#sides .card .id")) == 7
    assert page.shown(".tabs, #menu") == []


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_is_shown_literally(page, make, name):
    text = HOSTILE[name]
    query = make.query(0, text, id=text, proponents=[make.sample(1, 1, text, id=text)], opponents=[])
    result = make([query, make.query(1, id="__proto__")], index=text)
    page.open({**result, "kind": text, "fisher": text}, title=text)
    literal = text.replace("\r", "\N{SYMBOL FOR CARRIAGE RETURN}")
    page.choose(1)
    page.choose(0)
    assert page.texts("#subject") == [literal]
    if page.all("#proponents .more"):
        page.click("#proponents .more")
    assert page.texts("#proponents .text") == [literal]
    for selector in ("h2", "#proponents .card .id", "#list li:first-child .id"):
        assert page.texts(selector) == [literal[:200]]
    assert page.texts("h1") == [text.replace("\r", "\n")]
    assert page.texts("dd")[0] == text.replace("\r", "\n")
    own = "html head meta link title style body aside header h1 dl div dt dd bdi button nav input ol li a span main article"
    own += " h2 p section h3 b i mark script noscript"
    assert set(page.js("return [...document.querySelectorAll('*')].map((n) => n.localName)")) <= set(own.split())
    assert page.js("return window.ran") is None
    assert page.js("return document.scripts.length") == 2
    for width in (1400, 900, 420, 320):
        page.device((width, 900))
        assert page.js("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_control_characters_have_pictures(page, make):
    page.open(make([make.query(0, "a\0b\x1bc\x7fd\r\ne\tf")]))
    assert page.texts("#subject") == ["a\u2400b\u241bc\u2421d\ne\tf"]


def test_each_line_starts_on_its_own_side(page, make):
    page.open(make([make.query(0, "\u05e9\u05dc\u05d5\u05dd\nabc")]))
    text = page.one("#subject .text")
    code = "const r = document.createRange(), t = arguments[0].firstChild; r.setStart(t, arguments[1]);"
    code += "r.setEnd(t, arguments[1] + 3); const b = r.getBoundingClientRect(); return [b.left, b.right]"
    assert page.js(code, text, 0)[1] == pytest.approx(text.location["x"] + text.size["width"], abs=1)
    assert page.js(code, text, 5)[0] == pytest.approx(text.location["x"], abs=1)


def test_images_keep_their_pixels(page, make):
    small, photo = make.image(8, 6), make.image(300, 200)
    both = make.query(1, "text", small, [make.sample(3, 1, "text", photo)], [make.sample(4, -1)])
    page.open(make([make.query(0, None, small, [make.sample(i, 1, None, small) for i in range(3)], []), both]))
    assert len(page.all("#proponents .gallery .card img")) == 3
    assert page.style("#proponents img", "imageRendering") == "pixelated"
    assert page.style("#subject img", "imageRendering") == "pixelated"
    page.wait("document.querySelector('#proponents img').complete")
    assert page.js("const i = document.querySelector('#proponents img'); return [i.naturalWidth, i.naturalHeight]") == [
        6,
        8,
    ]
    assert page.one("#subject img").size["width"] == 160
    assert page.one("#subject img").get_attribute("alt") == "Image of q0"
    page.click("#next")
    page.wait("getComputedStyle(document.querySelector('#proponents img')).imageRendering === 'auto'")
    assert page.texts("#proponents .text") == ["text"]
    assert not page.all("#proponents .gallery")
    assert page.texts("#opponents .card .soft") == ["Neither text nor image is known."]
    assert len(page.all("#list img")) == 2


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([12345.6, 100.0, -3.0], ["+12,346", "+100", "-3"]),
        ([31.25, 0.5, 0.004], ["+31.3", "+0.5", "+4.00e-3"]),
        ([0.00012, 5e-324], ["+1.20e-4", "+4.94e-324"]),
        ([1e300, 0.0], ["+1.00e300", "0.00e0"]),
        ([0.0, -0.0], ["0.00", "0.00"]),
    ],
)
def test_scores_line_up(page, make, scores, shown):
    page.open(make([make.query(proponents=[make.sample(i, x) for i, x in enumerate(scores)], opponents=[])]))
    assert page.texts("#proponents .score") == [text.replace("-", "\N{MINUS SIGN}") for text in shown]
    exact = [float(score.get_attribute("title")) for score in page.all("#proponents .score")]
    assert exact == scores
    kinds = [bar.get_attribute("class") for bar in page.all("#proponents .bar i")]
    assert kinds == [("", "positive", "negative")[(score > 0) - (score < 0)] for score in scores]
    assert page.shown("#opponents .empty") == ["None."]


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_selected_query_is_copied(page, make, clipboard):
    nasty = make.query(0, "".join(HOSTILE.values()) + "\0\ud800", None, [make.sample(3, 1 / 3, None, make.image(2, 2))])
    page.open(make([nasty, make.query(1)]))
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.js("window.real = navigator.clipboard")
    if not clipboard:
        page.js("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    for query in (nasty, make.query(1)):
        page.click("#copy")
        page.wait("document.querySelector('#copy').textContent === 'Copied'")
        assert json.loads(page.driver.execute_async_script("window.real.readText().then(arguments[0])")) == query
        assert page.js("return document.activeElement.id") == "copy"
        page.press(DOWN)


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
    assert selected(page) == "q700"
    place, box = page.one("[aria-current]").location["y"], page.one("#list")
    assert box.location["y"] <= place <= box.location["y"] + box.size["height"]
    assert len(page.all("#list a")) == 1000
    assert len(page.all(".card")) == 40
    page.type("#search", "query 99")
    assert len(page.shown("#list a")) == 11
    page.press(DOWN)
    assert selected(page) == "q99"
    assert len(page.all(".card")) == 40


def test_nothing_else_is_asked_of_a_server(page, make, server, tmp_path):
    (tmp_path / "a.html").write_text(query_page(make([make.query(0, None, make.image(2, 2)), make.query(1)])))
    page.visit(f"{server.address}/a.html")
    page.press(DOWN)
    assert selected(page) == "q1"
    assert server.asked == ["/a.html"]


def test_the_policy_stops_markup_that_got_in(page, make, server, tmp_path):
    address = server.address
    markup = f"<script>{RUN}</script><img src='{address}/a.png' onerror='{RUN}'><style>p {{ color: red }}</style>"
    markup += (
        f"<link rel=stylesheet href='{address}/a.css'><iframe src='{address}/a.html'></iframe><base href='{address}'>"
    )
    text = query_page(make(2))
    (tmp_path / "b.html").write_text(text.replace("<main>", markup + "<main>"))
    page.visit((tmp_path / "b.html").as_uri())
    assert selected(page) == "q0"
    assert page.js("return window.ran") is None
    assert page.style("#notice", "color") != "rgb(255, 0, 0)"
    assert page.js("return document.baseURI").startswith("file:")
    assert server.asked == []
    assert sum("Content Security Policy" in message for message in page.complaints()) >= 6
    sink = "try { document.body.innerHTML = '<b>'; return 'set'; } catch (error) { return error.name; }"
    assert page.js(sink) == "TypeError"
    assert page.complaints()
    assert all("/a." in url or "frame" in url for url in page.requests())
    page.open(make(1))
