"""What the site holds that no page says by hand: every key of a recipe, from the code, and the recipes' pictures."""

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of this checkout, installed or not

from align.keys import MUST, Key, families, keys_of  # noqa: E402

MARK = "<!-- keys -->"
OUTSIDE = re.compile(r"(!\[[^\]]*\])\(\.\./\.\./(recipes/[\w/.-]+\.png)\)")  # a picture, as a code forge finds it
CODE = re.compile(r"(`[^`]*`)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The recipes' pictures, which stand beside what they are of, are part of the site."""
    for path in sorted((ROOT / "recipes").rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "keys.md":
        if MARK not in markdown:
            raise ValueError(f"keys.md has no line {MARK}, in whose place the keys go")
        markdown = markdown.replace(MARK, all_keys())
    return OUTSIDE.sub(r"\1(\2)", markdown)


def all_keys() -> str:
    """A heading and a table for each stage, the loop, each method and each reward."""
    parts = []
    for name, (_, about) in families().items():
        rows = ["| key | default | may be | meaning |", "|---|---|---|---|", *map(_row, keys_of(name))]
        parts.append("\n".join([f"## {name}", "", about, "", *rows]))
    return "\n\n".join(parts)


def _row(key: Key) -> str:
    default = MUST if key.default == MUST else _code(key.default) if key.default else ""
    may_be = " or ".join(_choices(words) for words in key.range.split(" or ")) if " | " in key.range else key.range
    return f"| {_code(key.path)} | {default} | {may_be} | {_text(key.meaning)} |"


def _choices(words: str) -> str:
    return ", ".join(_code(word) for word in words.split(" | ")) if " | " in words else _text(words)


def _code(text: str) -> str:
    """As HTML: between backticks a bar would be read as a cell's end in some places, and its escape shown in others."""
    return f"<code>{_plain(text)}</code>"


def _plain(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")


def _text(text: str) -> str:
    """Words of the code, in which backticks alone are markup."""
    return "".join(_code(part[1:-1]) if part.startswith("`") else _plain(part) for part in CODE.split(text))
