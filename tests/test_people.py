"""The labelling page for whoever uses it: without eyes or mouse, in other scripts, with long answers, at any zoom."""

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="the labelling page's extra is not installed")

from playwright.sync_api import expect

from tests.test_browser import CHROMIUM, MARKDOWN, Visit, browser, serving
from tests.test_page import make_store

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
__all__ = ["browser"]

STORY = "\n\n".join(f"{i}. " + "Once upon a time there was a king who labelled. " * 6 for i in range(40))
PERSIAN = "می‌خواهم **PDF‌ها** را بخوانم.\n\n- یک\n- دو\n\n> نقل قول\n\nAn English paragraph.\n\n```\nx = 1\n```"
JAPANESE = "葛\U000e0100城市と直・骨・角を読む。👨‍👩‍👧"
MATHS = (
    "Roots of \\(x^2 - 5x + 6 = 0\\):\n\n\\[\nx_{1,2} = \\frac{5 \\pm \\sqrt{25 - 24}}{2}\n\\]\n\n"
    "with $\\vec{v}$ for $5 to $6, and $$\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}$$"
)
HOSTILE = "\n\n".join(
    f"\\({formula}\\)"
    for formula in (
        "\\frac{" * 160,
        "\\sqrt{" * 120 + "x" + "}" * 120,
        "{" * 490 + "}" * 490,
        "x" + "^{x" * 200 + "}" * 200,
        "\\begin{matrix}" + "&" * 900 + "\\end{matrix}",
        "\\left(" * 90 + "x" + "\\right)" * 90,
        "\\underbrace{" * 60 + "x" + "}" * 60,
        "<img src=x onerror=window.__xss=1>",
        "\\text{<script>window.__xss=1</script>}",
        "\\unknown{x}",
        "\\href{javascript:window.__xss=1}{x}",
        "\\phantom{secret}",
    )
)
CODE = "```js\nlet x = '</code><img src=x onerror=window.__xss=1>'; // \u202e\n```\n\n```py\ndef f(): # <b>\n    return 1\n```"
PAIRS = [
    ("چرا؟", PERSIAN, "I do not speak Persian."),
    ("なぜ?", JAPANESE, "क्‍ष"),
    ("Tell me a long story.", STORY, STORY[: len(STORY) // 2]),
    ("Explain.", MARKDOWN + "\n\n##### Deep\n\n" + "```\n" + "wide " * 80 + "\n```", "# Title\n\n### Deeper\n\ntext"),
    ("Solve.", MATHS, HOSTILE),
    ("More?", CODE, "two"),
    ("And more?", "three", "four"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    asked, answers = [pair[0] for pair in PAIRS], [pair[1:] for pair in PAIRS]
    make_store(folder / "store.db", len(PAIRS), asked=asked, answers=answers, wanted=9).close()
    (folder / "guidelines.md").write_text("# How\n\nPrefer the *true* one.\n\n### Why\n\n1. It is true.")
    people = [word for name in ("ann", "bob", "carl", "dora", "emil", "fred", "gina") for word in ("--add", name)]
    with serving(folder, *people, "--admin", "eve", "--guidelines", str(folder / "guidelines.md")) as started:
        yield started


def go_to(visit, question):
    """Labels until that pair is in front."""
    while visit.page.locator("#prompt .raw").text_content() != question:
        visit.press("t")
        visit.saved()
    visit.see()


def side_of(visit, answer):
    return "left" if visit.texts()[0] == answer else "right"


def focused(page):
    return page.evaluate("document.activeElement.id")


def until(page, expression):
    """Waits until an expression holds; Playwright's own waiting needs an eval that the page forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def test_axe_finds_nothing_on_any_page(browser, server):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    axe, visit = axe.Axe(), Visit(browser, server, "eve")
    page, found = visit.page, {}

    def look(where):
        violations = axe.run(page).response["violations"]
        found[where] = [(each["id"], [node["html"] for node in each["nodes"]]) for each in violations]

    for scheme, width in (("light", 1280), ("dark", 320)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 720})
        look(f"the page, {scheme} {width}")
        visit.press("g", "c", "Escape", "?")
        look(f"settings, {scheme} {width}")
        visit.press("Escape", "t")
        visit.saved()
    page.set_viewport_size({"width": 1280, "height": 720})
    while page.locator("#pair").is_visible():
        look(page.locator("#prompt .raw").text_content())
        visit.press("t")
        visit.saved()
        expect(page.locator("#notice")).not_to_have_text("Loading …")
    for path in ("", "admin", "enter", "nowhere"):
        page.goto(f"{server.at}/{path}")
        look(f"/{path}")
    page.goto(f"{server.at}/admin")
    page.emulate_media(color_scheme="dark")
    look("/admin, dark")
    assert {where: what for where, what in found.items() if what} == {}
    assert len(found) >= 11
    visit.faults = []  # the door and the page that is not there
    visit.close(server)


def test_a_new_pair_is_announced_and_is_where_the_keyboard_goes_on(browser, server):
    visit = Visit(browser, server, "ann")
    page, news = visit.page, visit.page.locator("#news")
    assert news.get_attribute("role") == "status" and focused(page) == ""
    first = news.text_content()
    assert first.startswith("A new pair: ") and "in answer 2." in first
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second way round
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.choice") == "left"
    for button in ("Tie", "Both bad"):
        page.get_by_role("button", name=button).focus()
        page.keyboard.press("Enter")
        visit.saved()
        assert focused(page) == "pair-name" and page.get_by_role("heading", name="Conversation").is_visible()
    assert news.text_content() != first
    page.keyboard.press("Tab")  # the conversation itself, then each answer: all can be scrolled with the arrows
    assert page.evaluate("document.activeElement.getAttribute('aria-labelledby')") == "name-left"
    visit.press("u")
    visit.saved("Undone: answer it again")
    assert focused(page) == "pair-name"
    visit.close(server)


def test_keys_can_be_switched_off_and_stay_off(browser, server):
    visit = Visit(browser, server, "bob")
    page, before = visit.page, visit.texts()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Single keys work").uncheck()
    page.get_by_role("button", name="Close").click()
    for _ in range(2):
        visit.press("1", "t", "b", "s", "u", "r", "g", "?")
        assert visit.texts() == before and not page.locator("#keys").is_visible()
        assert page.locator("[aria-keyshortcuts]").count() == 0 and not page.locator("#choices kbd").first.is_visible()
        assert page.locator("#status").text_content() == ""
        page.reload()
        visit.see()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Single keys work").check()
    page.keyboard.press("Escape")
    assert page.locator("[aria-keyshortcuts]").count() == 12
    visit.press("t")
    visit.saved()
    visit.close(server)


def test_long_answers_are_both_in_view_and_scroll_together_if_wished(browser, server):
    visit = Visit(browser, server, "carl")
    page = visit.page
    go_to(visit, "Tell me a long story.")
    tops = "[...document.querySelectorAll('.answers > section')].map((pane) => pane.scrollTop)"
    rooms = "[...document.querySelectorAll('.answers > section')].map((pane) => pane.scrollHeight - pane.clientHeight)"
    page.set_viewport_size({"width": 1280, "height": 800})
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight") and min(page.evaluate(rooms)) > 500
    page.locator("#left").hover()
    page.mouse.wheel(0, 400)
    until(page, f"{tops}[0] >= 300")
    assert page.evaluate(tops)[1] == 0
    for name in ("Answer 1", "Answer 2"):
        expect(page.get_by_role("heading", name=name)).to_be_in_viewport()
    visit.press("?")
    page.get_by_label("scroll together").check()
    visit.press("Escape")
    page.locator("#right").hover()
    page.mouse.wheel(0, 300)
    until(page, f"{tops}[1] >= 200")
    share = f"{tops}.map((top, i) => top / {rooms}[i])"
    until(page, f"Math.abs({share}[0] - {share}[1]) < 0.01")
    page.set_viewport_size({"width": 390, "height": 844})  # one above the other: the head says whose text it is
    page.evaluate("scrollTo(0, document.querySelector('#left').getBoundingClientRect().bottom - 300)")
    expect(page.get_by_role("heading", name="Answer 1")).to_be_in_viewport()
    visit.close(server)


def test_scripts_run_their_way(browser, server):
    visit = Visit(browser, server, "dora")
    page = visit.page
    go_to(visit, "چرا؟")
    side = f"#{side_of(visit, PERSIAN)} .rendered"
    directions = page.evaluate(
        f"[...document.querySelectorAll('{side} > *')].map((e) => [e.tagName, e.matches(':dir(rtl)')])"
    )
    assert directions == [["P", True], ["UL", True], ["BLOCKQUOTE", True], ["P", False], ["PRE", False]]
    assert page.locator(f"{side} mark").count() == 0 and "می‌خواهم" in page.locator(side).text_content()
    item, box = page.locator(f"{side} li").first.bounding_box(), page.locator(side).bounding_box()
    assert item["x"] + item["width"] < box["x"] + box["width"] - 20  # the bullets stand on the right
    go_to(visit, "なぜ?")
    side = f"#{side_of(visit, JAPANESE)} .rendered"
    assert page.locator(side).get_attribute("lang") == "ja" and page.locator("#pair mark").count() == 0
    visit.close(server)


def test_at_a_large_zoom_nothing_covers_the_text(browser, server):
    visit = Visit(browser, server, "emil", viewport={"width": 320, "height": 256})  # 1280 x 1024 at 400 %
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("getComputedStyle(document.querySelector('footer')).position") == "static"
    visit.close(server)


def test_formulas_are_set_and_code_is_coloured(browser, server):
    visit = Visit(browser, server, "fred")
    page = visit.page
    page.evaluate("addEventListener('securitypolicyviolation', (e) => (window.__violation = e.violatedDirective))")
    go_to(visit, "Solve.")
    side = f"#{side_of(visit, MATHS)} .rendered"
    expect(page.locator(f"{side} .katex")).to_have_count(4)
    assert page.locator(f"{side} .katex-display").count() == 2 and "for $5 to $6" in page.locator(side).text_content()
    until(page, "document.fonts.check('1em KaTeX_Math')")
    assert page.evaluate("[...document.fonts].some((f) => f.family === 'KaTeX_Math' && f.status === 'loaded')")
    other = f"#{'right' if 'left' in side else 'left'} .rendered"
    written = page.locator(f"{other} code").all_text_contents()
    assert any("phantom{secret}" in one for one in written) and any("\\unknown" in one for one in written)
    assert page.locator(f"{other} :is(a, img, script)").count() == 0
    go_to(visit, "More?")
    expect(page.locator("#pair .rendered .hljs-keyword").first).to_be_visible()
    coloured = page.locator("#pair .rendered pre > code").all_text_contents()
    assert coloured[1] == "def f(): # <b>\n    return 1\n" and "U+202E" in coloured[0]
    assert page.locator("#pair .rendered mark").count() == 1  # what is hidden stays shown: such code has no colours
    assert page.evaluate("[window.__xss, window.__violation]") == [None, None]
    visit.close(server)


def test_hostile_formulas_do_not_hold_up_the_page(browser, server):
    visit = Visit(browser, server, "gina")
    go_to(visit, "Tell me a long story.")
    visit.page.evaluate(
        "window.__longest = 0; new PerformanceObserver((list) => list.getEntries().forEach("
        "(e) => (window.__longest = Math.max(window.__longest, e.duration)))).observe({type: 'longtask', buffered: false})"
    )
    go_to(visit, "Solve.")
    until(visit.page, "document.querySelector('#pair .katex') !== null")
    visit.page.wait_for_timeout(100)
    depth = "(() => { let d = 0; for (let row = [document.body]; row.length; row = row.flatMap((e) => [...e.children])) d += 1; return d })()"
    assert visit.page.evaluate(depth) < 240  # a thousand bring the browser down
    assert visit.page.evaluate("window.__longest") < 3000  # milliseconds; a few hundred where nothing else runs
    visit.press("t")
    visit.saved()
    visit.close(server)
