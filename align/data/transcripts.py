"""Text that holds its prompt: where the prompt ends and the answer begins."""

from __future__ import annotations

import re
from collections.abc import Iterator

from align.errors import BadInput

ANSWER_OPENS = tuple(  # where a transcript's answer begins, the surest sign first
    re.compile(pattern)
    for pattern in (
        r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n"
        r"|<\|assistant\|>\n?|\[/INST\]",
        r"\n\nAssistant:",
        r"(?:^|\n)#+ ?(?:Response|Assistant|Answer|Output):?[ \t]*\n+",
        r"(?:^|\s)(?:Assistant|ASSISTANT):",
        r"(?:^|\n)(?:AI|Bot|GPT|Agent|Chatbot|Model|Response|Answer|A|TL;DR):",
        r"\s(?:AI|Bot|Response|Answer|A|TL;DR):",
    )
)
SURE = 4  # of the signs: those that nobody writes within an answer
WAITS = re.compile(r"[:>\]\n]\s*\Z")  # how a prompt ends that waits for its answer
MIN_WORDS = 3  # a shorter prompt may open an answer by chance: "Hello" and "Hello, you"
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # each letter is a word
LETTERS = rf"(?:(?![{NO_SPACES}])[\w\u0300-\u036f\u200d\ufe0f])+"
WORD = re.compile(rf"\d+(?:[.,:]\d+)+|{LETTERS}(?:['’-]{LETTERS})*|[{NO_SPACES}]")  # 3.14 and don't are one each


def without_prompt(prompt: str, answers: list[str]) -> list[str]:
    """Text answers without the prompt that all of them repeat; as they are where one does not, or may do so by chance.

    A prompt of fewer than three words counts as repeated only if it ends as one does that waits for an answer.
    """
    is_telling = WAITS.search(prompt) or len(WORD.findall(prompt)) >= MIN_WORDS
    rests = [_after(prompt, answer) for answer in answers] if is_telling else []
    whole = [rest for rest in rests if rest is not None]
    return whole if len(whole) == len(answers) else answers


def is_transcript(text: str) -> bool:
    """Whether a text says for certain where its answer opens."""
    return any(opens.search(text) for opens in ANSWER_OPENS[:SURE])


def _after(prompt: str, answer: str) -> str | None:
    """What follows the prompt in an answer that opens with it; None where it does not, or nothing follows."""
    if answer.startswith(prompt):
        cut = len(prompt)
    else:  # the same but for white space around it
        bare, start = prompt.strip(), len(answer) - len(answer.lstrip())
        if not bare or not answer.startswith(bare, start):
            return None
        cut = start + len(bare)
    rest = answer[cut:]
    if not rest.strip() or cut not in _between_words(answer):
        return None
    return rest.lstrip() if prompt[-1:].isspace() else rest


def split_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of two texts that open alike.

    The prompt ends where a transcript's last answer opens (two answers may begin alike); without such a sign after
    the last shared line, or question, or word: never inside a word, where TRL's shared prefix may end.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[: _boundary(chosen, rejected, shared)]
    if not prompt.strip():
        raise BadInput(
            f"{where}: `prompt` is missing, and `chosen` and `rejected` do not begin alike up to the end of a word;"
            " add it"
        )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _boundary(chosen: str, rejected: str, shared: int) -> int:
    for opens in ANSWER_OPENS:
        ends = [match.end() for match in opens.finditer(chosen[:shared])]
        if ends:
            return ends[-1]
    between = _between_words(chosen) & _between_words(rejected)
    cuts = [i for i in sorted(between) if 0 < i <= shared and chosen[i:].strip() and rejected[i:].strip()]
    lines = [i for i in cuts if chosen[i - 1] == "\n" and chosen[:i].strip()]
    questions = [i for i in cuts if chosen[i - 1 : i + 1] == "? " or chosen[i - 1] == "？"]
    cut = (lines or questions or cuts or [0])[-1]
    return cut if lines else len(chosen[:cut].rstrip(" "))


def _between_words(text: str) -> set[int]:
    """The places in a text that are not inside a word."""
    return set(range(len(text) + 1)) - set(_inside_words(text))


def _inside_words(text: str) -> Iterator[int]:
    for match in WORD.finditer(text):
        yield from range(match.start() + 1, match.end())
