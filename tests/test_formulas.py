"""Formulas in Markdown: kept whole for the page's script, never money, never one in which something goes unseen."""

import re

import pytest

pytest.importorskip("nh3", reason="the labelling page's extra is not installed")

from align.feedback.page.mathematics import LENGTH
from align.feedback.page.rendering import CLASSES, rendered


def formulas(text):
    return re.findall(r'<code class="math">(.*?)</code>', rendered(text)["html"], re.DOTALL)


FOUND = {
    "in a line": (r"a \(x_1*y*\), $a_1$ and $b$.", [r"\(x_1*y*\)", "$a_1$", "$b$"]),
    "for itself": ("text:\n\\[\nx\n- y\n= z\n\\]\nafter", ["\\[\nx\n- y\n= z\n\\]"]),
    "dollars for itself": ("$$\n# a\n\\\\\n$$", ["$$\n# a\n\\\\\n$$"]),
    "in a quote and a list": ("> $$\n> a\n> $$\n\n- $$\n  b\n  $$", ["$$\na\n$$", "$$\nb\n$$"]),
    "two beside each other": ("$$x$$ and\n$$y$$", ["$$x$$", "$$y$$"]),
    "in a table": ("| a |\n|---|\n| $x$ |", ["$x$"]),
    "signs of HTML": ("$a<b$", ["$a&lt;b$"]),
    "money": ("From $5 to $6, $5/$6, US$5 and US$6, $ 5 $, $HOME/$USER.", []),
    "escaped": (r"\$5$ and `$x$`", []),
    "code": ("    $$x$$\n\n```\n$$\ny\n$$\n```", []),
    "without an end": ("\\[\nx\n\n\\]\n\n$$y", []),
    "too long": (f"\\({'x' * (LENGTH + 1)}\\)", []),
    "as long as may be": (f"\\({'x' * LENGTH}\\)", [f"\\({'x' * LENGTH}\\)"]),
    "harmless commands": (
        r"$\left(\lambda\right) \leftarrow \delta \quad 50\%$",
        [r"$\left(\lambda\right) \leftarrow \delta \quad 50\%$"],
    ),
}
UNSEEN = [
    r"\phantom{x}", r"\hphantom{x}", r"\color{white} x", r"\textcolor{#fff}{x}", r"\colorbox{red}{x}", r"\rlap{x}", r"\mathllap{x}",
    r"\smash{x}", r"\kern-9em x", r"\mkern1mu x", r"\hskip1em x", r"\hspace{-3em}x", r"\raisebox{9em}{x}", r"\rule{9em}{9em}",
    r"\def\a{b}", r"\gdef\a{b}", r"\newcommand{\a}{b}", r"\let\a\b", r"\href{a}{b}", r"\includegraphics{a}", r"\htmlStyle{a}{b}",
    "a % hidden", r"a \\% hidden", r"a \\[-3em] b", r"a\!\!\!\! b", r"\@secondoftwo{x}{y}", r"\mathchoice{a}{b}{c}{d}", r"\tiny x",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FOUND.values(), ids=FOUND)
def test_formulas_are_found(text, expected):
    assert formulas(text) == expected


@pytest.mark.parametrize("formula", UNSEEN)
def test_a_formula_that_could_hide_something_stays_as_written(formula):
    for text in (f"\\({formula}\\)", f"\\[\n{formula}\n\\]"):
        html = rendered(text)["html"]
        assert "<code>" in html and "math" not in html.replace(formula, "")


def test_code_names_known_languages_only():
    classes = {
        name
        for word in ("python", "c++", 'evil" onclick="x', "math", "PYTHON", "a b")
        for name in re.findall('class="(.*?)"', rendered(f"```{word}\nx\n```")["html"])
    }
    assert classes - {""} == {"language-python", "language-c++"} <= CLASSES
