"""The pages and the README say what the code says: links lead somewhere, recipes are taken, messages are real."""

import ast
import html
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf

from align.cli import app
from align.cli_people import feedback
from align.keys import families, keys_of
from align.schema import recipe_schema

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"^\*\*(`+) ?(.+?) ?\1\*\*$", re.MULTILINE)  # a message, on a line of its own
HOLE = "…"  # what of a message differs
OTHER_HOST = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
FETCHES = {"script": ("src",), "link": ("href",), "img": ("src",)}
# a figure in a page was measured: rows of these stand, word for word, where the command that measured them is told
COPIED = {"README.md": "docs/pages/*.md", "docs/pages/methods.md": "recipes/*/README.md"}


def read(path):
    return path.read_text(encoding="utf-8")


def anchors_of(path):
    """As code forges and the site make them of headings."""
    heads = re.findall(r"^#+ (.+)$", FENCED.sub("", read(path)), re.MULTILINE)
    return {
        re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.*?\)", r"\1", head)).lower()) for head in heads
    }


def said():
    return "\n".join(map(read, PAGES))


def test_the_readme_is_one_page():
    assert len(PAGES) >= 13
    assert len(read(README).splitlines()) <= 120


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_relative_links_lead_to_a_file_and_a_heading(path):
    links = [link for link in LINK.findall(FENCED.sub("", read(path))) if "://" not in link]
    assert len(links) >= {README: 15}.get(path, 0)
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.name != "keys.md":  # whose headings are made when the site is built
            assert anchor in anchors_of(target), link


def test_what_the_pages_name_of_the_repository_is_there():
    named = set(re.findall(r"(?<![\w/.])(?:recipes|scripts|tests)/[\w/.-]*\w", said()))
    assert len(named) >= 25
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("page", "where"), COPIED.items())
def test_a_table_that_stands_twice_is_the_same_twice(page, where):
    rows = [line for line in read(ROOT / page).splitlines() if re.match(r"\| .*\d\.\d", line)]
    source = "\n".join(read(path) for path in sorted(ROOT.glob(where)))
    assert len(rows) >= 7
    assert [row for row in rows if row not in source] == []


def test_recipes_in_the_pages_are_taken():
    takes = Draft7Validator(recipe_schema())
    told = [(path, block) for path in [README, *PAGES] for block in YAML.findall(read(path))]
    recipes = [(path, block) for path, block in told if re.search(r"^(stages?|num_rounds):", block, re.MULTILINE)]
    assert len(recipes) >= 7
    for path, block in recipes:
        faults = [error.message for error in takes.iter_errors(OmegaConf.to_container(OmegaConf.create(block)))]
        assert faults == [], f"{path.name}: {block}"


def test_every_command_is_named():
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands += [f"feedback {command.name}" for command in feedback.registered_commands]
    assert len(commands) >= 20
    text = re.sub(r"(feedback \w+) (?:\\?\|) (\w+)", lambda found: f"{found[0]} align feedback {found[2]}", said())
    assert [each for each in commands if not re.search(rf"\balign {each}\b", text)] == []


@cache
def literals():
    """Every text in the code, what is put into it as a hole."""
    found = set()
    for path in sorted((ROOT / "align").rglob("*.py")):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.add(re.sub(f"{HOLE}+", HOLE, "".join(map(str, parts))))
    return found


def test_messages_are_quoted_as_the_code_has_them():
    quoted = [found[1] for found in QUOTED.findall(read(ROOT / "docs/pages/troubleshooting.md"))]
    assert len(quoted) >= 25
    assert len(set(quoted)) == len(quoted)
    assert [each for each in quoted if not any(each in text for text in literals())] == []
    assert [each for each in quoted if len(each.replace(HOLE, "")) < 10] == []


# ------------------------------------------------------------------------------------------------------------ the site


class Fetched(HTMLParser):
    """What a page has a browser fetch."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in FETCHES.get(tag, ()) and value is not None]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a broken link or anchor is an error."""
    for name in ("mkdocs", "material"):
        pytest.importorskip(name, reason=f"{name} is not installed: no site is built")
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs/mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_key_is_on_its_page(site):
    page = (site / "keys.html").read_text(encoding="utf-8")
    parts = dict(re.findall(r'<h2 id="([\w-]+)">(.*?)(?=<h2 id=|</article>)', page, re.DOTALL))
    assert list(parts) == list(families())
    total = 0
    for name in families():
        shown = [html.unescape(key) for key in re.findall(r"<tr>\s*<td><code>(.*?)</code></td>", parts[name])]
        assert shown == [key.path for key in keys_of(name)], name
        total += len(shown)
    assert total >= 500


def test_what_is_said_of_a_key_is_shown_whole(site):
    page = re.sub(r"<[^<>]*>", "", (site / "keys.html").read_text(encoding="utf-8"))
    text = " ".join(html.unescape(page).split())
    for name in families():
        for key in keys_of(name):
            meaning = " ".join(key.meaning.replace("`", "").split())
            assert meaning in text, f"{name}.{key.path}"


def test_no_page_asks_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        fetched = Fetched(page.read_text(encoding="utf-8")).found
        assert len(fetched) >= 3, page.name  # styles and scripts of its own
        assert [each for each in fetched if OTHER_HOST.match(each)] == [], page.name


def test_pictures_of_the_recipes_are_in_the_site(site):
    pictures = [each for page in site.glob("*.html") for each in Fetched(page.read_text(encoding="utf-8")).found]
    ours = {each for each in pictures if each.startswith("recipes/")}
    assert len(ours) >= 2
    assert [each for each in sorted(ours) if not (site / each).is_file()] == []
