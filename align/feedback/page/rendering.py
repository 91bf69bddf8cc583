"""What models and users wrote, made fit for a page: Markdown without a way out of it, and nothing hidden.

Answers may be hostile. HTML in them stays text, images are not fetched, and there are no links at all: where a link
leads is written out, since an annotator must judge it and need not go there. What the Markdown renderer makes is then
cut down to a few tags without attributes.
"""

from functools import lru_cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt

from align.feedback.page.invisible import with_hidden_shown

TAGS = {"p", "br", "hr", "strong", "em", "s", "u", "blockquote", "ul", "ol", "li", "pre", "code"}
TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"}


@lru_cache(maxsize=512)  # a pair is rendered when it is prefetched and again when it is in front
def rendered(text: str) -> dict[str, str]:
    """Markdown as HTML (`html`), and the text as it was written (`raw`), as HTML too."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no character
    return {"html": with_hidden_shown(markdown(text)), "raw": with_hidden_shown(escape(text, quote=False))}


def conversation(prompt: Any) -> list[dict[str, str]]:
    """A prompt's messages, each with its role and its content as `rendered` gives it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": str(m["role"]), **rendered(_content(m["content"]))} for m in messages]


def markdown(text: str) -> str:
    """Safe HTML of Markdown: no tags but `TAGS`, and only the first number of a list as an attribute."""
    return nh3.clean(_MARKDOWN.render(text), tags=TAGS, attributes={"ol": {"start"}}, link_rel=None)


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


def _new_markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    made.disable(["image", "html_block", "html_inline", "reference"])  # a reference would be read and not be seen
    made.renderer.rules.update(link_open=_link_open, link_close=_link_close)  # type: ignore[attr-defined]
    return made


_MARKDOWN = _new_markdown()
