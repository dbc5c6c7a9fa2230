"""The query page as text: what it refuses, and that nothing in the data can become markup. tests/browser clicks it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html import unescape

import numpy as np
import pytest

from dropinf.cli.page import query_page, save_query_page

IMAGE = "data:image/png;base64,iVBORw0KGgo="
HOSTILE = (
    "</script><script>alert(1)</script><!-- <script> & \" ' \u2028\u2029\0\x1b\ud800 \N{SNOWMAN}\N{GRINNING FACE} "
)


def make_result(**changes):
    def sample(position, score, text="some text", image=None):
        return {"position": position, "id": f"row-{position}", "score": score, "text": text, "image": image}

    query = {"text": "a query", "image": None, "proponents": [sample(3, 0.5), sample(1, 0.25)]}
    query["opponents"] = [sample(2, -1, None, IMAGE)]
    queries = [{"id": "q0", **query}, {"id": "q1", **copy.deepcopy(query)}]
    return {"index": "idx", "samples": 5120, "kind": "influence", "fisher": "block", "queries": queries, **changes}


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def restored(page):
    """The queries as they were given, from the page's data."""
    data = embedded(page)
    for query in data["queries"]:
        for side in ("proponents", "opponents"):
            query[side] = [{**data["rows"][row], "score": score} for score, row in query[side]]
    return data["queries"]


def test_the_data_is_whole_and_shared_samples_are_stored_once():
    result = make_result()
    page = query_page(result)
    assert restored(page) == result["queries"]
    assert [row["position"] for row in embedded(page)["rows"]] == [3, 1, 2]
    assert page.count(IMAGE) == 1


def test_samples_that_differ_are_kept_apart():
    result = make_result()
    result["queries"][1]["proponents"][0]["text"] = "another text"
    result["queries"][1]["opponents"][0]["image"] = None
    assert restored(query_page(result)) == result["queries"]
    assert len(embedded(query_page(result))["rows"]) == 5


def test_facts_are_shown():
    page = query_page(make_result(), title="My run")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd><bdi>(.*?)</bdi></dd>", page))
    assert facts == {"Index": "idx", "Samples": "5,120", "Score": "influence", "Fisher": "block"}
    assert "<title>My run</title>" in page
    assert "<h1>My run</h1>" in page


def test_no_text_becomes_markup():
    plain, result = query_page(make_result()), make_result(index=HOSTILE, kind=HOSTILE, fisher=HOSTILE)
    query = result["queries"][0]
    for item in (query, *query["proponents"], *query["opponents"]):
        item |= {"id": item["id"] + HOSTILE, "text": HOSTILE}
    page = query_page(result, title=HOSTILE)
    assert page.encode()
    assert restored(page) == result["queries"]
    assert "<!--" not in page
    assert re.findall(r"</?\w+", page) == re.findall(r"</?\w+", plain)
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert not re.search("[<>&\0-\x1f]", data)
    shown = unescape(re.search(r"<h1>(.*?)</h1>", page, re.S)[1])
    assert shown == HOSTILE.translate({0: "\N{SYMBOL FOR NULL}", 0x1B: "\N{SYMBOL FOR ESCAPE}", 0xD800: "\ufffd"})


def test_the_policy_admits_the_two_assets_alone():
    page = query_page(make_result())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    for directive, element in (("script-src", "<script>"), ("style-src", "<style>")):
        text = page.split(element)[1].split("</")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert "default-src 'none';" in policy
    assert "unsafe" not in policy
    assert not re.search(
        r"https?:|@import|url\(|\bsrc=|\bon\w+=|style=", page.split("<style>")[0] + page.split("</style>")[1]
    )


def with_words(*words, exact=0.75):
    """A result of which one sample has words."""
    result = make_result()
    result["queries"][1]["proponents"][0] |= {"words": list(words), "exact": exact}
    return result


def test_words_stand_beside_the_sample_that_queries_share():
    page = query_page(with_words(("some ", 0.5), ("text", 0.25), ("", 0)))
    data = embedded(page)
    assert data["queries"][1]["proponents"][0] == [0.5, 0, 0.75, [["some ", 0.5], ["text", 0.25], ["", 0.0]]]
    assert data["queries"][0]["proponents"][0] == [0.5, 0]
    assert len(data["rows"]) == 3


def test_words_become_no_markup():
    result = with_words((HOSTILE, -1), exact=-1)
    result["queries"][1]["proponents"][0]["text"] = HOSTILE
    page = query_page(result)
    assert re.findall(r"</?\w+", page) == re.findall(r"</?\w+", query_page(make_result()))
    assert embedded(page)["queries"][1]["proponents"][0][3] == [[HOSTILE, -1]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (with_words(("some", 1)), r"proponents\[0\].words are not those of its text"),
        (with_words("ab"), r"words\[0\]\[1\] is 'b'; it must be a finite number"),
        (with_words(("some text",)), r"words\[0\] is \('some text',\); it must be \[text, share\]"),
        (with_words((3, 1)), r"words\[0\] is \(3, 1\); it must be"),
        (with_words(("some text", float("nan"))), r"words\[0\]\[1\] is nan; it must be a finite number"),
        (with_words(("some text", 1), exact="1"), r"proponents\[0\].exact is '1'; it must be a finite number"),
    ],
)
def test_bad_words_are_named(result, message):
    with pytest.raises(ValueError, match=message):
        query_page(result)


def damaged(place, value):
    """A result in which one value is replaced, or left out where `value` is the class `KeyError`."""
    result = make_result()
    *path, last = place
    item = result
    for key in path:
        item = item[key]
    if value is KeyError:
        del item[last]
    else:
        item[last] = value
    return result


SAMPLE = ("queries", 1, "proponents", 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("index",), KeyError, r"result has no 'index'; it has 'samples', 'kind', 'fisher', 'queries'"),
        (("kind",), None, r"result.kind is None; it must be text"),
        (("samples",), -1, r"result.samples is -1; it must be a whole number, 0 or more"),
        (("samples",), 2.5, r"result.samples is 2.5; it must be a whole number"),
        (("queries",), [], r"queries is empty; a page needs at least one query"),
        (("queries",), "text", r"result.queries is 'text'; it must be a list"),
        (("queries", 1), [1], r"queries\[1\] is \[1\]; it must be an object with keys such as 'id'"),
        (("queries", 1), {}, r"queries\[1\] has no 'id'; it has no key"),
        (("queries", 1, "id"), 7, r"queries\[1\].id is 7; it must be text"),
        (("queries", 1, "id"), "q0", r"queries\[1\].id is 'q0', as is queries\[0\].id; each query needs its own"),
        (("queries", 1, "text"), KeyError, r"queries\[1\] has no 'text'; it has 'id', 'image', "),
        (("queries", 1, "opponents"), KeyError, r"queries\[1\] has no 'opponents'"),
        (("queries", 1, "image"), "a.png", r"queries\[1\].image is 'a.png'; it must be a data:image/ URI or None"),
        ((*SAMPLE, "position"), True, r"queries\[1\].proponents\[0\].position is True; it must be a whole number"),
        ((*SAMPLE, "text"), 3, r"queries\[1\].proponents\[0\].text is 3; it must be text"),
        ((*SAMPLE, "score"), KeyError, r"queries\[1\].proponents\[0\] has no 'score'; it has 'position', "),
        ((*SAMPLE, "score"), "0.5", r"proponents\[0\].score is '0.5'; it must be a finite number"),
        ((*SAMPLE, "score"), True, r"proponents\[0\].score is True; it must be a finite number"),
        ((*SAMPLE, "score"), float("nan"), r"proponents\[0\].score is nan; it must be a finite number"),
        ((*SAMPLE, "score"), float("-inf"), r"proponents\[0\].score is -inf; it must be a finite number"),
        pytest.param(
            (*SAMPLE, "score"), 10**400, r"proponents\[0\].score is 10+\.\.\.; it must be a finite number", id="huge"
        ),
        ((*SAMPLE, "image"), "https://a/b.png", r"proponents\[0\].image is 'https://a/b.png'; it must be a data:"),
        ((*SAMPLE, "image"), "data:text/html,<b>", r"proponents\[0\].image is 'data:text/html,<b>'; it must be"),
        ((*SAMPLE, "image"), "data:image/png", r"proponents\[0\].image is 'data:image/png'; it must be"),
        ((*SAMPLE, "image"), "data:image/png;base64,a b", r"proponents\[0\].image is .*; it must be"),
    ],
)
def test_bad_input_is_named(place, value, message):
    with pytest.raises(ValueError, match=message):
        query_page(damaged(place, value))


@pytest.mark.parametrize(
    "image", [None, IMAGE, "data:image/svg+xml;charset=utf-8;base64,AAAA", "data:image/svg+xml,%3Csvg%3E"]
)
def test_images_that_a_browser_can_show_are_taken(image):
    page = query_page(damaged((*SAMPLE, "image"), image))
    assert restored(page)[1]["proponents"][0]["image"] == image


def test_numbers_of_numpy_are_taken():
    result = damaged((*SAMPLE, "score"), np.float32(0.1))
    result["queries"][1]["proponents"][0]["position"] = np.int64(9)
    sample = restored(query_page(result))[1]["proponents"][0]
    assert sample["score"] == float(np.float32(0.1))
    assert sample["position"] == 9


def test_saving_makes_the_folder_and_leaves_one_file(tmp_path):
    path = tmp_path / "new" / "page.html"
    save_query_page(make_result(), path, title=HOSTILE)
    assert path.read_bytes().decode("utf-8") == query_page(make_result(), title=HOSTILE)
    assert list(path.parent.iterdir()) == [path]


def test_a_bad_result_leaves_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="queries is empty"):
        save_query_page(make_result(queries=[]), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
