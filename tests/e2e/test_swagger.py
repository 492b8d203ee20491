"""The documentation pages in a real browser that reaches nothing but this server."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from tests.servers import Running, make_settings, serving

PREFIX = "/bawabah"
PATIENCE_MILLISECONDS = 60_000
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No name is resolved, whatever asks for it.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

pytestmark = [pytest.mark.browser, pytest.mark.server]


class Docs:
    """A browser's tab at the documentation of a server; `outside` is what it asked of others."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.loaded: list[str] = []
        page.set_default_timeout(PATIENCE_MILLISECONDS)
        page.context.route("**/*", self._only_our_server)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda answer: self.loaded.append(answer.url))

    def _only_our_server(self, route: Route) -> None:
        address = route.request.url
        if address.startswith((f"{self.url}/", "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(address)
            route.abort()

    def open(self, path: str) -> None:
        """Go to a page."""
        self.page.goto(self.url + path)

    def operation(self, name: str) -> Locator:
        """The box of an operation, opened and ready to be tried out."""
        box = self.page.locator(f"[id^=operations-][id$=-{name}]")
        box.locator(".opblock-summary-control").click()
        box.get_by_role("button", name="Try it out").click()
        return box

    def execute(self, box: Locator) -> str:
        """Press Execute, and return what the page shows of the answer."""
        box.get_by_role("button", name="Execute").click()
        answer = box.locator(".live-responses-table")
        expect(answer).to_be_visible(timeout=PATIENCE_MILLISECONDS)
        return answer.inner_text()

    def execute_for_audio(self, box: Locator, *, model: str) -> str:
        """The same; it has to be a 200 that is offered as a file, a whole WAV of this model."""
        shown = self.execute(box)
        assert shown.split()[:3] == ["Code", "Details", "200"], shown
        assert "content-type: audio/wav" in shown
        assert f"x-model: {model}" in shown
        with self.page.expect_download() as download:
            box.locator(".live-responses-table a[download]").click()
        assert download.value.suggested_filename == "speech.wav"
        content = Path(download.value.path()).read_bytes()
        assert content[:4] == b"RIFF"
        assert int.from_bytes(content[4:8], "little") == len(content) - 8
        return shown

    def check_that_nothing_is_amiss(self) -> None:
        """No request left for another server, and no script failed."""
        assert self.outside == []
        assert self.errors == []


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Debian's Chromium, or any other on this machine."""
    found = [
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ]
    if not found:
        if os.environ.get("BAWABAH_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium on this machine, and BAWABAH_REQUIRE_BROWSER=1")
        _say_loudly(request.config, "NO CHROMIUM HERE: the tests in a browser are skipped")
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found[0], args=ARGUMENTS, headless=True
        )
        yield browser
        browser.close()


def _say_loudly(config: pytest.Config, text: str) -> None:
    """One line in the terminal, whatever pytest was told to show."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    assert capture
    assert reporter
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\n{text}", red=True, bold=True)


@contextmanager
def docs_of(browser: Browser, url: str) -> Iterator[Docs]:
    """A tab with nothing remembered; what it asked of others is checked at the end."""
    context = browser.new_context(
        viewport={"width": 1_300, "height": 1_600}, service_workers="block"
    )
    docs = Docs(context.new_page(), url)
    yield docs
    context.close()
    docs.check_that_nothing_is_amiss()


@pytest.fixture
def at_newcomers(browser: Browser, bare: Running) -> Iterator[Docs]:
    """The documentation of a server that has the embedded voice only."""
    with docs_of(browser, bare.url) as docs:
        yield docs


@contextmanager
def proxy(upstream: str, *, strips: bool) -> Iterator[str]:
    """Serve `upstream` under PREFIX, as nginx does: `proxy_pass http://host/` strips it."""
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404, "not under the prefix")
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.removeprefix(PREFIX) if strips else self.path
            connection = HTTPConnection(host, timeout=60)
            connection.request(self.command, path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())
            connection.close()

        do_GET = do_POST = _forward

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@pytest.fixture(scope="module")
def under_a_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that a proxy serves under ROOT_PATH."""
    settings = make_settings(tmp_path_factory.mktemp("under"), root_path=PREFIX)
    with serving(settings) as server:
        yield server


def fill(box: Locator, **values: str) -> None:
    """Type into the fields of a form."""
    for name, value in values.items():
        box.locator(f"tr[data-property-name={name}] input[type=text]").fill(value)


def choose_file(box: Locator, name: str, content: bytes) -> None:
    """Pick a file in a form."""
    box.locator(f"tr[data-property-name={name}] input[type=file]").set_input_files(
        {"name": "voice.wav", "mimeType": "audio/wav", "buffer": content}
    )


def test_generate_is_executed_with_its_example(at_newcomers: Docs) -> None:
    at_newcomers.open("/docs")
    box = at_newcomers.operation("generate")
    expect(box.locator("textarea")).to_have_value(
        '{\n  "text": "The quick brown fox jumps over the lazy dog."\n}'
    )
    shown = at_newcomers.execute_for_audio(box, model="hibari/heart")
    assert "x-model-fallback: openbmb/VoxCPM-0.5B; reason=unavailable" in shown


def test_clone_is_executed_with_a_file(browser: Browser, voxcpm: Running, recording: bytes) -> None:
    with docs_of(browser, voxcpm.url) as docs:
        docs.open("/docs")
        box = docs.operation("clone")
        choose_file(box, "prompt_wav", recording)
        fill(box, text="Hello there.", prompt_text="These words.", max_seconds="0.4")
        shown = docs.execute_for_audio(box, model="tiny/voxcpm-0.5b")
        assert "x-sample-rate: 16000" in shown


def test_clone_takes_its_voice_from_a_reference_too(
    browser: Browser, voxcpm: Running, recording: bytes
) -> None:
    """A file in the other field, none in the first, and every kind of field filled in."""
    with docs_of(browser, voxcpm.url) as docs:
        docs.open("/docs")
        box = docs.operation("clone")
        choose_file(box, "reference_wav", recording)
        fill(box, text="Hello there.", model="tiny/voxcpm2", style="softly", seed="7")
        fill(box, max_seconds="0.4", min_seconds="0.3", sample_rate="8000")
        shown = docs.execute_for_audio(box, model="tiny/voxcpm2")
        assert "x-seed: 7" in shown
        assert "x-sample-rate: 8000" in shown


def test_names_with_a_slash_and_errors_are_shown(at_newcomers: Docs) -> None:
    at_newcomers.open("/docs")
    model = at_newcomers.operation("show_model")
    model.locator("tr[data-param-name=name] input").fill("hibari/heart")
    shown = at_newcomers.execute(model)
    assert shown.split()[:3] == ["Code", "Details", "200"], shown
    assert '"name": "hibari/heart"' in shown

    generate = at_newcomers.operation("generate")
    generate.locator("textarea").fill('{"text": "   "}')
    shown = at_newcomers.execute(generate)
    assert shown.split()[:3] == ["Code", "Details", "400"], shown
    assert "application/problem+json" in shown
    assert '"type": "validation"' in shown


def test_redoc_renders_and_asks_nobody_else(at_newcomers: Docs) -> None:
    at_newcomers.open("/redoc")
    expect(at_newcomers.page.locator("h1").first).to_contain_text("Bawabah AI")
    expect(at_newcomers.page.get_by_text("/api/v1/text-to-speech/generate").first).to_be_attached()
    at_newcomers.page.wait_for_load_state("networkidle")


@pytest.mark.parametrize("strips", [True, False], ids=["stripped", "kept"])
def test_everything_works_behind_a_proxy_under_a_path(
    browser: Browser, under_a_path: Running, *, strips: bool
) -> None:
    """Whether or not the proxy takes the path away before it passes the request on."""
    with proxy(under_a_path.url, strips=strips) as url, docs_of(browser, url) as docs:
        docs.open("/docs")
        box = docs.operation("generate")
        assert f"{url}/openapi.json" in docs.loaded
        docs.execute_for_audio(box, model="hibari/heart")

        docs.open("/redoc")
        expect(docs.page.locator("h1").first).to_contain_text("Bawabah AI")
        docs.page.wait_for_load_state("networkidle")
        assert docs.page.request.get(f"{url}/").json()["docs"] == f"{PREFIX}/docs"
        assert all(address.startswith((f"{url}/", "blob:", "data:")) for address in docs.loaded)
