"""What the query page shows: texts, whatever is in them, images and scores, and nothing from a network."""

from __future__ import annotations

import json

import pytest

from dropinf.cli.page import query_page

pytestmark = pytest.mark.browser

DOWN, ENTER = "\ue015", "\ue007"
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


def test_nothing_else_is_asked_of_a_server(page, make, server, tmp_path):
    (tmp_path / "a.html").write_text(query_page(make([make.query(0, None, make.image(2, 2)), make.query(1)])))
    page.visit(f"{server.address}/a.html")
    page.press(DOWN)
    assert page.selected() == "q1"
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
    assert page.selected() == "q0"
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
