r"""Formulas in Markdown: `\(x\)` and `$x$` in a line, `\[x\]` and `$$x$$` for themselves, kept from Markdown.

They become `<code class="math">` with the TeX as it was written; the page's script sets them with KaTeX, in the browser
of whoever reads them, where a formula that takes long holds up nobody else. One in which something could go unseen, by
its colour, size or place, because TeX drops it, or because it defines what it means, is left as it was written.
"""

import re
from collections.abc import Callable
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

LENGTH = 1_000  # characters of a formula
STEPS = 5  # what looking for the end of one costs
CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
INLINE = re.compile(
    rf"\\\(.{{1,{LENGTH}}}?\\\)|\\\[.{{1,{LENGTH}}}?\\\]|\$\$[^$]{{1,{LENGTH}}}\$\$"
    # one dollar may be money: no blank inside it, nothing written on to it outside
    rf"|(?<![\w$\\])\$(?!\s)[^$\n]{{0,{LENGTH}}}?[^\s$\\]\$(?![\w$])",
    re.DOTALL,
)
UNSEEN = re.compile(
    r"(?<!\\)(?:\\\\)*%"  # a comment
    r"|(?:\\!\s*){3}"  # back over what stands before
    r"|\\\\\s*\["  # a distance between rows, which may be negative
    r"|\\(?:[a-z]*phantom|[a-z]*colou?r[a-z]*|[a-z]*lap|smash|[a-z]*kern|[a-z]*skip|[a-z]*space|raisebox|rule|tiny"
    r"|vcenter|[a-z]*def|[a-z]*let|[a-z]*newcommand|providecommand|global|long|char|label|mathchoice|TextOrMath"
    r"|[a-z]*message|show|includegraphics|html[A-Za-z]*|href|url|oii+nt)(?![A-Za-z])"
    r"|\\@"  # macros of KaTeX's own
)


def add_formulas(markdown: MarkdownIt, spend: Callable[[Any, int], None]) -> None:
    """Teaches it formulas. `spend` is called with the parser's state and what a look at one costs."""

    def in_line(state: StateInline, silent: bool) -> bool:
        if state.src[state.pos] not in "\\$":
            return False
        spend(state, STEPS)
        found = INLINE.match(state.src, state.pos, state.posMax)
        if found is None:
            return False
        if not silent:
            state.push("formula", "code", 0).content = found[0]
        state.pos = found.end()
        return True

    def alone(state: StateBlock, start: int, end: int, silent: bool) -> bool:
        if state.is_code_block(start) or not (found := _lines_of(state, start, end, spend)):
            return False
        if not silent:
            text, state.line = found
            token = state.push("formula_block", "code", 0)
            token.content, token.map = text, [start, state.line]
        return True

    markdown.inline.ruler.before("escape", "formula", in_line)
    markdown.block.ruler.before("fence", "formula_block", alone, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.renderer.rules.update(formula=_shown, formula_block=_shown_alone)  # type: ignore[attr-defined]


def _lines_of(state: StateBlock, start: int, end: int, spend: Callable[[Any, int], None]) -> tuple[str, int] | None:
    """A formula that begins with this line and ends with one of those that follow without a gap; the line after it."""
    first = state.bMarks[start] + state.tShift[start]
    closing = CLOSING.get(state.src[first : first + 2])
    if closing is None or closing == "\\)":
        return None
    text = ""
    for line in range(start, end):
        spend(state, 1)
        if state.isEmpty(line) or state.sCount[line] < state.blkIndent:
            return None
        text = f"{text}\n{state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip()}".lstrip()
        if len(text) > LENGTH or closing in text[2:-2]:
            return None
        if len(text) > 4 and text.endswith(closing):
            return text, line + 1
    return None


def _shown(tokens: Any, index: int, options: Any, env: Any) -> str:
    text = tokens[index].content
    kind = "" if UNSEEN.search(text) else ' class="math"'
    return f"<code{kind}>{escape(text)}</code>"


def _shown_alone(tokens: Any, index: int, options: Any, env: Any) -> str:
    return f"<p>{_shown(tokens, index, options, env)}</p>\n"
