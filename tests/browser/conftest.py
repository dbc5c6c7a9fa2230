"""Chromium without a window, and a page opened in it that must neither complain nor reach for a network."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from matplotlib.image import imsave

from dropinf.cli.page import save_query_page
from tests.bounds import HOUR

ARGUMENTS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "disable-sync",
    "disable-component-update",
    "disable-background-networking",
    "no-first-run",
)
SIZES = {"wide": (1400, 1000), "narrow": (420, 900)}


@pytest.fixture(scope="session")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed", exc_type=ImportError)
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        reason = f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver"
        # In continuous integration these tests must run.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in ARGUMENTS:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    driver.command_executor.client_config.timeout = HOUR
    driver.set_script_timeout(HOUR)
    driver.set_page_load_timeout(HOUR)
    yield driver
    driver.quit()


class Page:
    """A query page in the browser, read through its DOM and driven by real clicks and keys."""

    def __init__(self, driver, folder):
        self.driver, self._folder, self._names, self.addresses = driver, folder, itertools.count(), []
        self.device()
        driver.get_log("browser")
        driver.get_log("performance")

    def device(self, size="wide", scheme="light", media=""):
        width, height = SIZES.get(size, size)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def open(self, result, hash="", title="Influence"):
        path = self._folder / f"page{next(self._names)}.html"
        save_query_page(result, path, title)
        self.visit(path.as_uri(), hash)

    def visit(self, address, hash=""):
        self.addresses.append(address)
        self.driver.get(address + hash)

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def click(self, selector, position=0):
        self.all(selector)[position].click()

    def choose(self, position):
        """Click another query of the list."""
        self._await_hash(lambda: self.click("#list a", position))

    def back(self):
        self._await_hash(self.driver.back)

    def _await_hash(self, act):
        self.js("window.moved = false; addEventListener('hashchange', () => (window.moved = true), { once: true })")
        act()
        self.wait("window.moved")

    def wait(self, condition):
        """Wait until the expression is true, or fail after an hour."""
        look = f"const look = (done) => ({condition}) ? done() : setTimeout(look, 10, done); look(arguments[0])"
        self.driver.execute_async_script(look)

    def type(self, selector, text):
        box = self.one(selector)
        box.clear()
        box.send_keys(text)

    def press(self, *keys):
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def selected(self):
        """The query that is shown, which the list marks."""
        (name,) = self.texts("h2")
        assert self.texts("#list a[aria-current=true] .id") == [name]
        return name

    def texts(self, selector):
        """The whole text of each element, shown or not."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector)

    def shown(self, selector):
        """The texts of the elements that take up room."""
        code = "return [...document.querySelectorAll(arguments[0])].filter((n) => n.checkVisibility()).map((n) => n.textContent)"
        return self.js(code, selector)

    def style(self, selector, name):
        return self.js("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)

    def luminance(self, selector, name):
        """The relative luminance of a colour, by WCAG 2."""
        channels = np.array([int(x) for x in re.findall(r"\d+", self.style(selector, name))[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(self, selector, name, ground):
        low, high = sorted((self.luminance(selector, name), self.luminance(ground, "backgroundColor")))
        return (high + 0.05) / (low + 0.05)

    def complaints(self):
        """What the console says: errors, and violations of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """What was asked for since the last call, but for the pages themselves and what they hold."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert asked, "the browser logs no request, not even the page's own"
        return [url for url in asked if not url.startswith("data:") and url.partition("#")[0] not in self.addresses]


@pytest.fixture
def page(driver, tmp_path):
    page = Page(driver, tmp_path)
    yield page
    assert page.complaints() == []
    assert page.requests() == []


def png(height, width):
    buffer = io.BytesIO()
    imsave(buffer, np.random.default_rng(0).random((height, width, 3)), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample(position, score, text=None, image=None, id=None):
    return {"position": position, "id": id or f"row-{position}", "score": score, "text": text, "image": image}


def make_query(number=0, text=None, image=None, proponents=None, opponents=None, id=None):
    if proponents is None:
        proponents = [sample(number * 100 + i, 0.4 / (i + 1), f"proponent {i} of query {number}") for i in range(4)]
    if opponents is None:
        opponents = [sample(number * 100 + 50 + i, -0.2 / (i + 1), f"opponent {i} of query {number}") for i in range(3)]
    query = {"id": id or f"q{number}", "text": text or f"the text of query {number}", "image": image}
    return {**query, "proponents": proponents, "opponents": opponents}


@pytest.fixture
def make():
    """Results: `make(n)` has n queries, `make([query, ...])` these, `make.query`, `make.sample` and `make.image` parts."""

    def result(queries=3, index="idx"):
        queries = [make_query(i) for i in range(queries)] if isinstance(queries, int) else queries
        return {
            "index": index,
            "samples": 512,
            "kind": "influence",
            "fisher": "block, damping=auto",
            "queries": queries,
        }

    result.query, result.sample, result.image = make_query, sample, png
    return result


class Server:
    """A web server on this machine that notes what it was asked for."""

    def __init__(self, folder):
        self.asked, noted = [], self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, format, *arguments):
                noted.asked.append(self.path)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.close()
