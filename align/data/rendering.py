"""What a chat template may take. It is a program that came with a model: in a sandbox, and here within limits of time,
memory and output, so that a loop without an end, or a text that doubles itself, is one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.limits import TookTooLong, within

if TYPE_CHECKING:
    from jinja2 import nodes

GENERATION = ("generation", "endgeneration")  # marks what an assistant has written; transformers' own tag
SECONDS = 10.0  # for one conversation, of which a template needs a ten thousandth
MEMORY = 512 * 2**20  # bytes beyond what the process has; it also bounds the single steps that nothing breaks off
LONGEST = 16 * 2**20  # characters that it may write
STATM = Path("/proc/self/statm")
HAS_STATM = STATM.is_file()


class Unbounded(Exception):
    """A template that goes past a limit; says which."""


@lru_cache(maxsize=16)
def parsed(source: str) -> "nodes.Template | None":
    """A template as jinja's tree; None of one that cannot be read, which rendering says."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {GENERATION[0]}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements((f"name:{GENERATION[1]}",), drop_needle=True)

    try:
        return ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).parse(source)
    except TemplateSyntaxError:
        return None


@lru_cache(maxsize=16)
def names_in(source: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """What a template asks of messages (`message.x`, `message['x']`, `'x' in message`), and the arguments it takes;
    None of one that cannot be read, which rendering says."""
    from jinja2 import meta, nodes

    tree = parsed(source)
    if tree is None:
        return None
    asked = {node.attr for node in tree.find_all(nodes.Getattr)}
    asked |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(asked), frozenset(meta.find_undeclared_variables(tree))


def rendered(tokenizer: Any, conversation: list[Any], **how: Any) -> Any:
    """`apply_chat_template` within the limits.

    Raises:
        Unbounded: it goes past one. In another thread than the main one, where no signal arrives, time has no limit.
    """
    with _memory(), _seconds():
        given = tokenizer.chat_template
        for source in given.values() if isinstance(given, dict) else [given]:
            _check_powers(str(source))
        try:
            found = tokenizer.apply_chat_template(conversation, **how)
        except MemoryError:
            raise Unbounded(f"takes more than {MEMORY // 2**20} MiB of memory") from None
    if isinstance(found, str) and len(found) > LONGEST:
        raise Unbounded(f"writes {len(found):,} characters, and {LONGEST:,} are the most")
    return found


@lru_cache(maxsize=16)
def _check_powers(source: str) -> None:
    """A power of whole numbers is one step of Python's, which nothing can break off."""
    from jinja2 import nodes

    tree = parsed(source)
    if tree is not None and any(True for _ in tree.find_all(nodes.Pow)):
        raise Unbounded("computes powers (`**`), which may take any time")


@contextmanager
def _seconds() -> Iterator[None]:
    try:
        with within(SECONDS):
            yield
    except TookTooLong as error:
        raise Unbounded(str(error)) from None


@contextmanager
def _memory() -> Iterator[None]:
    """Of data, where the kernel says how much the process has (Linux): address space that is only kept free, as CUDA
    and the allocator keep it, is not counted."""
    if not HAS_STATM:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(STATM.read_bytes().split()[5]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    is_lower = before[0] == resource.RLIM_INFINITY or limit < before[0]
    try:
        if is_lower:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, before)
