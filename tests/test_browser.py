"""The labelling page in a real browser: a person's session by keyboard, hostile answers, two people at once.

With ALIGN_SCREENSHOTS set, pictures of the page are left in the temporary folder, align_page_*.png.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="the labelling page's extra is not installed")

import httpx
from playwright.sync_api import expect, sync_playwright

from align.feedback.page.rendering import CLASSES
from align.feedback.store import Store
from tests.test_page import make_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

HOSTILE = [
    "<script>window.__xss = 1; alert(1)</script>",
    "<ScRiPt src=http://evil.example/x.js></sCrIpT>",
    "<scr<script>ipt>window.__xss=1</scr</script>ipt>",
    "<img src=x onerror=window.__xss=1>",
    "<img src='http://evil.example/pixel.png'>",
    '<svg onload="window.__xss=1"><animate onbegin=window.__xss=1 attributeName=x></svg>',
    "<svg><script href=data:,window.__xss=1 /></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.__xss=1></style></mglyph></table></mtext></math>",
    "<iframe srcdoc='<script>parent.__xss=1</script>'></iframe>",
    "<iframe src=javascript:parent.__xss=1></iframe>",
    "<object data=data:text/html,<script>parent.__xss=1</script>></object><embed src=http://evil.example/e>",
    "<body onload=window.__xss=1><input autofocus onfocus=window.__xss=1>",
    "<details open ontoggle=window.__xss=1>x</details><video><source onerror=window.__xss=1></video>",
    "<a href=javascript:window.__xss=1>click</a> <a href='http://evil.example'>away</a>",
    "<form action=http://evil.example><button formaction=javascript:window.__xss=1>ok</button></form>",
    "<style>body{background:url(http://evil.example/css)} @import 'http://evil.example/i.css';</style>",
    "<link rel=stylesheet href=http://evil.example/l.css><meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example/><p style='background:url(http://evil.example/s)'>styled</p>",
    "<div style='position:fixed;inset:0;z-index:99'>over all</div>",
    "[link](javascript:window.__xss=1) [link](JaVaScRiPt:alert(1)) [l](java\tscript:alert(1))",
    "[link](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==) [v](vbscript:msgbox(1))",
    "[link](&#106;avascript:window.__xss=1) [x](\x01javascript:window.__xss=1)",
    "![pixel](http://evil.example/pixel.png) ![x](data:image/svg+xml,<svg/onload=alert(1)>)",
    '![x](x "onerror=window.__xss=1") ![a](http://evil.example/"onerror="window.__xss=1)',
    "[ref]: javascript:window.__xss=1\n\n[click][ref] ![pic][ref] <javascript:window.__xss=1>",
    '[a](<http://evil.example/"onmouseover=window.__xss=1 x=">) <http://evil.example/?q=`>',
    "```<script>window.__xss=1</script>\n</code></pre><script>window.__xss=1</script>\n```",
    "`</code><script>window.__xss=1</script>` **<b onclick=window.__xss=1>x</b>**",
    "{{ 7 * 7 }} {% for x in y %} ${window.__xss=1} #{7*7} <%= 7*7 %> {{constructor.constructor('__xss=1')()}}",
    '"}]}</script><script>window.__xss=1</script>{"a":["',
    "</div></section></main></body></html><script>window.__xss=1</script>",
    "<<<>>> <!-- <img src=x onerror=window.__xss=1> --> <![CDATA[<script>window.__xss=1</script>]]> <?php x ?>",
    "<div id=status>fake</div><input name=csrf><a id=csrf name=getElementById>clobber</a>",
    "\u202egnp.exe\u202c zero\u200bwidth \u2066isolate\u2069 \ufeffbom tag\U000e0041 null\x00 esc\x1b[31m bell\x07",
    "＜script＞window.__xss=1＜/script＞ \u2028window.__xss=1\u2029 %3Cscript%3E &lt;script&gt;alert(1)&lt;/script&gt;",
    "| a | b |\n|---|---|\n| <img src=x onerror=window.__xss=1> | [x](javascript:alert(1)) |",
    "> " * 60 + "<script>window.__xss=1</script>\n\n" + "[" * 300 + "](" * 300,
]
FORBIDDEN = "script, img, iframe, object, embed, svg, math, style, link, base, form, input, a, video, audio, meta"


MARKDOWN = (
    "Water boils when its **vapour pressure** equals the pressure around it. At sea level that is 100 °C.\n\n"
    "1. Heat makes molecules faster.\n2. More of them leave the surface.\n3. Bubbles form *inside* the liquid.\n\n"
    "| height | boils at |\n|---|---|\n| 0 m | 100 °C |\n| 3000 m | 90 °C |\n\n"
    "```python\ndef boiling(height):  # a rule of thumb\n    return 100 - height / 300\n```\n\n"
    "See [the table](https://example.org/t)."
)


class Server:
    """`align label` as people start it."""

    def __init__(self, folder, *arguments):
        words = [sys.executable, "-m", "align.cli", "label", str(folder), "--port", "0", *arguments]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.links, self.told, self.store = {}, [], Path(folder) / "store.db"
        for line in self.process.stdout:
            if found := re.match(r"labelling at (\S+)", line):
                self.at = found[1]
                return
            self.told.append(line)
            if found := re.fullmatch(r"(.+): (http\S+)\n", line):
                self.links[found[1]] = found[2]
        raise AssertionError(self.process.communicate()[1])

    def labels(self):
        store = Store(self.store)
        try:
            return store.labels(sources=("human",))
        finally:
            store.close()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        told = self.process.communicate(timeout=20)
        assert self.process.returncode == 0 and told == ("", "")


@contextlib.contextmanager
def serving(folder, *arguments):
    server = Server(folder, *arguments)
    try:
        yield server
        server.stop()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server for several tests, each with a person of its own."""
    folder = tmp_path_factory.mktemp("shared")
    plain = "It boils at 100 degrees.\u200b Always.\n\n> Trust me\u202e.\n\nSee https://example.org/" + "long" * 40
    make_store(folder / "store.db", 12, answers=[(MARKDOWN, plain)] * 12).close()
    with serving(folder, "--add", "ann", "--add", "bob", "--admin", "eve") as server:
        yield server


class Visit:
    """One person's browser, which keeps what must not happen: dialogs, complaints, requests to elsewhere."""

    def __init__(self, browser, server, name, **settings):
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.faults, self.requested = [], []
        self.page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.context.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(server.links[name])
        self.page.wait_for_url(f"{server.at}/")
        self.see()

    def see(self):
        expect(self.page.locator("#pair")).to_be_visible()

    def texts(self):
        return [self.page.locator(f"#{side} .raw").text_content() for side in ("left", "right")]

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def saved(self, text="Saved"):
        expect(self.page.locator("#status")).to_have_text(text)

    def picture(self, name):
        if os.environ.get("ALIGN_SCREENSHOTS"):
            self.page.screenshot(path=f"{tempfile.gettempdir()}/align_page_{name}.png")

    def close(self, server):
        hosts = {urlsplit(url).netloc for url in self.requested}
        assert len(self.requested) >= 5 and hosts == {urlsplit(server.at).netloc}
        self.context.close()
        assert self.faults == []


def answers_of(texts):
    """`first 3` on the left -> the pair's number, and the canonical name of the left answer."""
    side, number = texts[0].split()
    return int(number), {"first": "a", "second": "b"}[side]


def test_a_session_by_keyboard(browser, tmp_path):
    make_store(tmp_path / "store.db", 12).close()
    (tmp_path / "guidelines.md").write_text("# Guidelines\n\nPrefer the *true* one.")
    with serving(tmp_path, "--guidelines", str(tmp_path / "guidelines.md")) as server:
        visit = Visit(browser, server, "local")
        page, token = visit.page, server.links["local"].split("#")[1]
        assert token not in page.content() and not any(token in url for url in visit.requested)
        assert page.evaluate("history.length") <= 3 and "#" not in page.url
        expected = []
        for keys, outcome, strength in (("1", "left", None), ("5 2", "right", 3), ("t", "tie", None)):
            number, left = answers_of(visit.texts())
            visit.press(*keys.split())
            visit.saved()
            right = {"a": "b", "b": "a"}[left]
            expected.append((number, {"left": left, "right": right}.get(outcome, outcome), strength))
        visit.press("b", "s")  # at once: both pairs are in hand
        visit.saved()
        labels = server.labels()
        assert [(label.comparison_id - 1, label.outcome, label.strength) for label in labels[:3]] == expected
        assert [label.outcome for label in labels[3:]] == ["both_bad", "skip"]
        assert all(0 < label.seconds < 60 for label in labels)

        skipped, before = labels[-1], visit.texts()
        visit.press("u")
        visit.saved("Undone: answer it again")
        assert len(server.labels()) == 4 and answers_of(visit.texts())[0] == skipped.comparison_id - 1
        visit.press("c")
        page.keyboard.type("12tbsur? true, but curt")  # keys that would all do something
        assert len(server.labels()) == 4
        page.keyboard.press("Escape")
        visit.press("Control+t", "Alt+1", "Meta+2")
        page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 't', repeat: true}))")
        assert page.locator("#comment").input_value() == "12tbsur? true, but curt" and len(server.labels()) == 4
        visit.press("1")
        visit.saved()
        assert server.labels()[-1].comment == "12tbsur? true, but curt" and server.labels()[-1].outcome in "ab"
        assert visit.texts() == before and page.locator("#comment").input_value() == ""

        page.keyboard.type("?")
        expect(page.locator("#keys")).to_be_visible()
        visit.press("1", "t")
        page.keyboard.press("Escape")
        expect(page.locator("#keys")).to_be_hidden()
        assert visit.texts() == before and len(server.labels()) == 5
        visit.press("r")
        expect(page.locator("#left .raw")).to_be_visible()
        expect(page.locator("#left .rendered")).to_be_hidden()
        visit.press("r", "g")
        expect(page.get_by_text("Prefer the true one.")).to_be_visible()
        visit.picture("guidelines")
        page.reload()
        visit.see()
        assert visit.texts() == before  # the same pair again
        expect(page.locator("#counts")).to_have_text("5 of 12 · 5 by you")
        for _ in range(7):
            visit.press("t")
            visit.saved()
            expect(page.locator("#notice")).not_to_have_text("Loading …")
        expect(page.locator("#notice")).to_contain_text("Nothing is left to label for now. This page")
        visit.press("1")
        assert len(server.labels()) == 12
        page.goto(f"{server.at}/admin")
        expect(page.get_by_text("12 of 12 labels")).to_be_visible()
        visit.picture("admin")
        visit.close(server)


def test_hostile_answers_stay_inert(browser, tmp_path):
    assert len(HOSTILE) >= 30
    answers = [(text, HOSTILE[-1 - i]) for i, text in enumerate(HOSTILE)]
    store = make_store(tmp_path / "store.db", len(HOSTILE), answers=answers)
    role = [{"role": "<img src=x onerror=window.__xss=1>", "content": "\n\n".join(HOSTILE)}]
    prompt = store.add_prompts([(role, {})], "train")[0]
    ids = store.add_candidates(7, "p", {}, [(prompt, 0, "one"), (prompt, 1, "two")])
    last = store.add_comparisons(7, [(prompt, *ids, "random")])
    store.set_comparisons({last[0]: {"route": "human", "wanted": 1, "position": 999}})
    store.close()
    with serving(tmp_path) as server:
        visit = Visit(browser, server, "local")
        page, seen = visit.page, 0
        page.evaluate("addEventListener('securitypolicyviolation', (e) => (window.__violation = e.blockedURI))")
        while page.locator("#pair").is_visible():
            assert page.locator("#pair").locator(FORBIDDEN).count() == 0
            attributes = "[...document.querySelectorAll('#pair .text *')].flatMap((e) => e.getAttributeNames())"
            assert set(page.evaluate(attributes)) <= {
                "start",
                "class",
                "dir",
                "tabindex",
            }  # the last two are the script's
            classes = page.evaluate("[...document.querySelectorAll('#pair .text *')].map((e) => e.className)")
            assert set(classes) <= {""} | CLASSES
            for element in page.locator("#left .rendered u").all()[:3]:
                element.click(force=True)
            assert "\u202e" not in page.locator("#pair").text_content()
            visit.press("r", "r", "t")
            visit.saved()
            expect(page.locator("#notice")).not_to_have_text("Loading …")
            seen += 1
        assert seen == len(HOSTILE) + 1 and page.url == f"{server.at}/"
        assert page.evaluate("[window.__xss, window.__violation]") == [None, None]
        assert page.locator("#status").text_content() == "Saved"
        visit.close(server)


def test_two_people_share_no_pair_and_a_lease_that_ran_out_is_anothers(browser, tmp_path):
    make_store(tmp_path / "store.db", 5).close()
    with serving(tmp_path, "--add", "ann", "--add", "bob", "--lease-seconds", "3") as server:
        ann, bob = Visit(browser, server, "ann"), Visit(browser, server, "bob")
        first = ann.texts()
        seen = {answers_of(first)[0]}, {answers_of(bob.texts())[0]}
        for visit, mine in zip((ann, bob), seen, strict=True):
            visit.press("t")  # the second of each hand is theirs too
            visit.saved()
            mine.add(answers_of(visit.texts())[0])
        assert not seen[0] & seen[1]
        ann.page.wait_for_timeout(3500)  # longer than a lease: heartbeats keep it
        kept = ann.texts()
        bob.press("t", "t")
        bob.saved()
        expect(bob.page.locator("#notice")).to_contain_text("Nothing is left")
        ann.close(server)  # the browser is closed; its pairs come back when the lease runs out
        bob.page.wait_for_timeout(3500)
        bob.page.reload()
        bob.see()
        assert answers_of(bob.texts())[0] == answers_of(kept)[0]
        bob.close(server)


def test_who_has_nothing_left_is_told_that_others_have(browser, tmp_path):
    make_store(tmp_path / "store.db", 2, wanted=2).close()
    with serving(tmp_path) as server:
        visit = Visit(browser, server, "local")
        for key in ("1", "2"):
            visit.press(key)
            visit.saved()
        expect(visit.page.locator("#notice")).to_contain_text("Labels that other people have to give: 2.")
        visit.close(server)


def test_more_pairs_in_hand_than_a_heartbeat_takes_are_all_kept(browser, tmp_path):
    make_store(tmp_path / "store.db", 12).close()
    with serving(tmp_path) as server:
        visit, beats = Visit(browser, server, "local"), []
        for key, told in (("t", "Saved"), ("u", "Undone: answer it again")):
            for _ in range(9):
                visit.press(key)
                visit.saved(told)
        before = visit.texts()
        visit.page.on("response", lambda said: beats.append(said) if said.url.endswith("/api/heartbeat") else None)
        with visit.page.expect_response(lambda _: len(beats) == 2):
            visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        asked = [beat.request.post_data_json["items"] for beat in beats]
        assert [len(items) for items in asked] == [8, 3] and [beat.json()["held"] for beat in beats] == asked
        assert visit.texts() == before
        visit.close(server)


def test_without_a_connection_the_answer_waits(browser, shared):
    visit = Visit(browser, shared, "ann")
    visit.context.set_offline(True)
    visit.press("1")
    visit.saved("Not saved, trying again …")
    before = len(shared.labels())
    visit.context.set_offline(False)
    visit.saved()
    assert len(shared.labels()) == before + 1
    visit.faults = [fault for fault in visit.faults if "ERR_INTERNET_DISCONNECTED" not in fault]
    visit.close(shared)


def test_the_live_server_refuses_strangers_and_a_spent_link(browser, shared):
    visit = Visit(browser, shared, "bob")
    assert [(c["httpOnly"], c["sameSite"]) for c in visit.context.cookies()] == [(True, "Strict")]
    cookies = {c["name"]: c["value"] for c in visit.context.cookies()}
    csrf = visit.page.locator("meta[name=csrf]").get_attribute("content")
    good = {"Origin": shared.at, "X-CSRF-Token": csrf}
    with httpx.Client(base_url=shared.at, cookies=cookies) as client:
        assert client.post("/api/next", json={}, headers=good).status_code == 200
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
        for wrong in ({"Origin": "http://evil.example"}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "0" * 64}):
            assert client.post("/api/next", json={}, headers=good | wrong).status_code == 403
        assert client.post("/api/next", json={}, headers={"X-CSRF-Token": csrf}).status_code == 403
        response = client.get("/")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers
    with httpx.Client(base_url=shared.at) as client:
        assert client.post("/api/next", json={}, headers=good).status_code == 401
        assert client.post("/api/next", content=(b"x" * 1024 for _ in range(100)), headers=good).status_code == 413
    stranger = browser.new_context()
    page = stranger.new_page()
    page.goto(shared.links["bob"])
    expect(page.locator("#status")).to_contain_text("used or replaced")
    assert page.url == f"{shared.at}/enter"
    stranger.close()
    visit.close(shared)


def test_it_fits_desktop_and_phone(browser, shared):
    visit = Visit(browser, shared, "eve", viewport={"width": 390, "height": 844}, has_touch=True)
    visit.page.get_by_role("button", name="Tie").tap()
    visit.saved()
    sizes = {"phone": (390, 844), "small": (360, 640), "desktop": (1280, 800), "wide": (1440, 900)}
    for name, (width, height) in sizes.items():
        visit.page.set_viewport_size({"width": width, "height": height})
        visit.page.emulate_media(color_scheme="dark" if name in ("small", "wide") else "light")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [visit.page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
        assert (boxes[0]["x"] == boxes[1]["x"]) == (width < 768)
        visit.picture(name)
    visit.press("c")
    visit.picture("comment")
    visit.press("Escape", "?")
    visit.picture("keys")
    visit.press("Escape")
    visit.close(shared)
