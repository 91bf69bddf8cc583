"""What models and users wrote, made fit for a page: Markdown without a way out of it, and nothing hidden.

Answers may be hostile. HTML in them stays text, images are not fetched, and there are no links at all: where a link
leads is written out, since an annotator must judge it and need not go there. What the Markdown renderer makes is then
cut down to a few tags without attributes.

A few hundred characters can ask for a million cells, so the work is counted and not the answer alone: `STEPS` of the
parser, and what is made. The same answer is always past the bounds or never, on whatever machine. Past them it is shown
as it was written, with a word; past `VIEW` bytes its beginning is, with how much is missing.
"""

from functools import lru_cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.parser_block import ParserBlock
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from align.data.conversations import words_of
from align.feedback.page.invisible import with_hidden_shown
from align.feedback.page.mathematics import add_formulas

TAGS = {"p", "br", "hr", "strong", "em", "s", "u", "blockquote", "ul", "ol", "li", "pre", "code"}
TAGS |= {"h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"}
LANGUAGES = "bash c c++ console cpp cs csharp css diff go html java javascript js json kotlin kt lua perl php py"
LANGUAGES += " python r rb rs ruby rust sh shell sql swift ts typescript xml yaml yml"  # that the page's script colours
CLASSES = {"math", *(f"language-{name}" for name in LANGUAGES.split())}
LENGTH = 65_536  # characters that are read as Markdown
STEPS = 6_000  # of the parser; less than a tenth of a second
NESTING = 20  # of quotes and lists
VIEW = 400_000  # bytes of HTML of one view; an answer has two
ADDRESS = 2_048  # characters of an address that is normalised, so that a host's name shows its letters' scripts
SLICE = 8_192  # characters that are escaped at a time
MESSAGES = 200  # of a conversation that are shown


class TooMuch(Exception):
    """Markdown that takes more work than a page has time for."""


@lru_cache(maxsize=128)  # a pair is rendered when it is prefetched and again when it is in front
def rendered(text: str) -> dict[str, str]:
    """Markdown as HTML (`html`), and the text as it was written (`raw`), as HTML too: each `VIEW` bytes and a word."""
    written, count = _as_written(text)
    if count < len(text):
        cut = _word(f"Too long to be shown: the first {count:,} of {len(text):,} characters, as they were written.")
        return {"html": f"{cut}\n<pre>{written}</pre>", "raw": f"{cut}\n{written}"}
    html = _as_markdown(text) if len(written) <= VIEW // 2 else None
    if html is None:
        html = f"{_word('Too much to be shown as Markdown: here it is as it was written.')}\n<pre>{written}</pre>"
    return {"html": html, "raw": written}


def conversation(prompt: Any) -> list[dict[str, str]]:
    """A prompt's messages, each with its role and its content as `rendered` gives it.

    Together they are bounded as an answer is. The last ones, which are answered, are always there; where earlier ones
    are not, a first message says how many.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    shown: list[dict[str, str]] = []
    characters, size = 0, 0
    for message in reversed(messages):
        content = words_of(message | {"content": _content(message["content"])})
        characters += len(content)
        if shown and (characters > 2 * LENGTH or len(shown) == MESSAGES):
            break
        views = rendered(content)
        size += sum(len(view.encode()) for view in views.values())
        if shown and size > 2 * VIEW:
            break
        shown.append({"role": str(message["role"])[:40], **views})
    if missing := len(messages) - len(shown):
        word = _word(f"Too much to be shown: the {missing:,} earlier messages are not shown.")
        shown.append({"role": "", "html": word, "raw": word})
    return shown[::-1]


def _word(sentence: str) -> str:
    """What the page itself says beside an answer, which can hold no `mark` of its own."""
    return f"<mark>{sentence}</mark>"


def _characters(text: str) -> str:
    """The text with halves of pairs, which are no characters, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as_written(text: str) -> tuple[str, int]:
    """The text as HTML, at most `VIEW` bytes of it, and how many of its characters those are."""
    parts, start, left = [], 0, VIEW
    while start < len(text):
        end = min(start + SLICE, len(text))
        line_end = text.rfind("\n", start, end) + 1  # where no run of hidden characters is torn
        end = line_end if start < line_end and end < len(text) else end
        part = with_hidden_shown(escape(_characters(text[start:end]), quote=False))
        left -= len(part.encode())
        if left < 0:
            break
        parts.append(part)
        start = end
    return "".join(parts), start


def _as_markdown(text: str) -> str | None:
    """The text as HTML; None where it is too long, takes too much work, or becomes too much."""
    if len(text) > LENGTH:
        return None
    try:
        html = with_hidden_shown(markdown(_characters(text)))
    except TooMuch:
        return None
    return html if len(html.encode()) <= VIEW else None


def markdown(text: str) -> str:
    """Safe HTML of Markdown: no tags but `TAGS`, and no attributes but a list's first number and code's `CLASSES`.

    Raises:
        TooMuch: it takes more than `STEPS`, or is nested deeper than `NESTING`, where the parser leaves out the rest.
    """
    html, allowed = _MARKDOWN.render(text), {"code": CLASSES}
    return nh3.clean(html, tags=TAGS, attributes={"ol": {"start"}}, allowed_classes=allowed, link_rel=None)


def _content(content: Any) -> str:
    """The text of a message, which in some formats is a list of parts."""
    if isinstance(content, list):
        return "\n\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)


def _link_open(tokens: Any, index: int, options: Any, env: Any) -> str:
    env.setdefault("targets", []).append((str(tokens[index].attrs["href"]), tokens[index].info))
    return "<u>"


def _link_close(tokens: Any, index: int, options: Any, env: Any) -> str:
    href, kind = env["targets"].pop()
    return "</u>" if kind == "auto" else f"</u> (<code>{escape(href)}</code>)"


def _spend(env: Any, steps: int = 1) -> None:
    env["steps"] = env.get("steps", 0) + steps
    if env["steps"] > STEPS:
        raise TooMuch


class _CountedBlocks(StateBlock):
    """Every token costs a step: a table makes thousands in one go."""

    def push(self, ttype: str, tag: str, nesting: Any) -> Token:
        _spend(self.env)
        return super().push(ttype, tag, nesting)


class _Blocks(ParserBlock):
    def parse(self, src: str, md: MarkdownIt, env: Any, outTokens: list[Token]) -> list[Token] | None:
        state = _CountedBlocks(src, md, env, outTokens)
        self.tokenize(state, state.line, state.lineMax)
        return state.tokens


def _count_block(state: Any, *where: Any) -> bool:
    """The first rule of all, which never applies: it is asked at every block, and at every line of one."""
    _spend(state.env)
    if state.level >= NESTING:
        raise TooMuch
    return False


def _count_inline(state: Any, silent: bool) -> bool:
    """The same at every place in a line, also where the parser only looks ahead."""
    _spend(state.env, 20 if state.src[state.pos] == "<" else 1)  # an address is taken apart and put together again
    return False


def _set_headings(state: StateCore) -> None:
    """Headings below those of the page, none more than one deeper than the one before."""
    headings = [token for token in state.tokens if token.type in ("heading_open", "heading_close")]
    levels, before = sorted({token.tag for token in headings}), 2
    for token in headings:
        before = min(3 + levels.index(token.tag), before + 1, 6) if token.type == "heading_open" else before
        token.tag = f"h{before}"


def _new_markdown() -> MarkdownIt:
    made = MarkdownIt()
    made.block = _Blocks()
    made.configure("commonmark", {"html": False, "breaks": True, "maxNesting": NESTING + 2})
    made.enable(["table", "strikethrough"])
    made.disable(["image", "html_block", "html_inline", "reference"])  # a reference would be read and not be seen
    # `alt`: those that ask at each line whether it ends them
    made.block.ruler.before("table", "count", _count_block, {"alt": ["paragraph", "blockquote", "list"]})
    made.inline.ruler.before("text", "count", _count_inline)
    normalised = made.normalizeLink
    made.normalizeLink = lambda url: normalised(url) if len(url) <= ADDRESS else url  # type: ignore[method-assign]
    made.renderer.rules.update(link_open=_link_open, link_close=_link_close)  # type: ignore[attr-defined]
    add_formulas(made, lambda state, steps: _spend(state.env, steps))
    made.core.ruler.push("headings", _set_headings)
    return made


_MARKDOWN = _new_markdown()
