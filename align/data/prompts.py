"""Which prompt a row states, and which answers to it: the same for every kind of example.

A row may state its prompt more than once (UltraChat has `prompt` beside `messages`, Alpaca has `text` beside
`instruction`): what it states must agree, and a conversation is taken before text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from align.data.beside import is_stated, read_system, with_system
from align.data.conversations import Message, Text, check_order, read_messages, read_string, read_text, says
from align.data.hints import QUESTIONS
from align.data.marks import plain_name
from align.data.transcripts import is_transcript, split_texts, without_prompt
from align.errors import BadInput

PROMPT_FIELDS = ("prompt", "messages", "conversations", "instruction")
WORDS = re.compile(r"[^\W_]+|[^\w\s]|_")
OF_ALPACA = ("input", "history")  # parts of the prompt beside `instruction`
ANSWER_FIELDS = ("messages", "conversations", "completion", "output", "text")


def stated_prompt(values: Mapping[str, Any], where: str) -> tuple[str, Text] | None:
    """(field, prompt) of the row, a conversation with its system message; None where no field states one.

    Raises:
        BadInput: a field is unsound, or two state prompts that do not agree.
    """
    fields = [field for field in PROMPT_FIELDS if field in values]
    found = [(field, _read_prompt(values, field, where)) for field in fields if is_stated(values[field])]
    found = found or [(field, _read_prompt(values, field, where)) for field in fields[:1]]
    if not found:
        return None
    # whose turn it is, and what came before, is said by a conversation alone
    field, prompt = next((each for each in found if not isinstance(each[1], str)), found[0])
    for other, text in found:
        if other != field and not _agree(prompt, text, is_exact="instruction" not in (field, other)):
            raise BadInput(f"{where}: `{field}` and `{other}` state two prompts that differ; keep one of them")
    _check_parts(values, prompt, where)
    return field, prompt


def prompt_and_answers(values: Mapping[str, Any], fields: tuple[str, ...], where: str) -> tuple[Text, list[Text]]:
    """The row's prompt, and the answers that stand in `fields`: all of them text, or all conversations.

    The prompt has its own field, or is what the answers open with. Answers that repeat it are returned without it.
    """
    answers = [read_text(values[field], where, field) for field in fields]
    if len({isinstance(answer, str) for answer in answers}) == 2:
        raise BadInput(f"{where}: one of {_named(fields)} is text and the other messages; write both alike")
    stated = stated_prompt(values, where)
    if isinstance(answers[0], str):
        return _beside_texts(values, stated, [str(answer) for answer in answers], where)
    turns = [cast("tuple[Message, ...]", answer) for answer in answers]
    if stated is None or (turns[0][0]["role"] != "assistant" and isinstance(stated[1], str)):
        # TRL reads UltraFeedback so: `prompt` is text, and both answers open with it as a turn
        prompt, turns = _split_turns(turns, fields, where)
        prompt = with_system(prompt, values, where)
        if stated is not None and not _agree(prompt, stated[1]):
            raise BadInput(f"{where}: `{stated[0]}` is not what {_named(fields)} open with; keep one of the two")
        return prompt, list(turns)
    opening = _as_turns(stated[1], values, where)
    return opening, [_without_turns(opening, answer) for answer in turns]


def _beside_texts(
    values: Mapping[str, Any], stated: tuple[str, Text] | None, answers: list[str], where: str
) -> tuple[Text, list[Text]]:
    if stated is None:
        _check_question(values, answers, where)
        if system := read_system(values, where):
            raise BadInput(
                f"{where}: `{system[0]}` stands beside text that holds its prompt; give `prompt` a field of its own, or"
                " write messages"
            )
        prompt, *rest = split_texts(answers[0], answers[-1], where)
        return prompt, list(rest)
    given = stated[1]
    if isinstance(given, str):
        answers = without_prompt(given, answers)
        if read_system(values, where) is None:
            return given, list(answers)
    prompt_turns = _as_turns(given, values, where)
    return prompt_turns, [(Message(role="assistant", content=a),) if a.strip() else a for a in answers]


def _check_question(values: Mapping[str, Any], answers: list[str], where: str) -> None:
    """Refuses answers that hold no prompt beside a field which is called like one: what they share is none."""
    if is_transcript(answers[0]):
        return
    for name, given in values.items():
        if plain_name(name) not in QUESTIONS or not isinstance(given, str) or not given.strip():
            continue
        if not all(_holds(answer, given) for answer in answers):
            raise BadInput(
                f"{where}: `prompt` is missing, and the answers do not repeat `{name}`; rename it to `prompt`, or"
                " drop it"
            )


def _as_turns(prompt: Text, values: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Text beside messages, or beside a system message, is a turn of the user's."""
    if not isinstance(prompt, str):
        return prompt
    return with_system((Message(role="user", content=prompt),), values, where)


def check_answers(values: Mapping[str, Any], taken: tuple[str, ...], whole: str, where: str) -> None:
    """Refuses a demonstration, `whole` as text, whose row states another one outside the fields `taken`."""
    for field in ANSWER_FIELDS:
        if field in taken or not is_stated(values.get(field)):
            continue
        other = as_text(read_text(values[field], where, field))
        if not (_holds(other, whole) if field == "text" else _holds(whole, other)):
            raise BadInput(f"{where}: {_named(taken)} and `{field}` state two answers that differ; keep one of them")


def as_text(text: Text) -> str:
    """A conversation's contents, a line each; text as it is."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _read_prompt(values: Mapping[str, Any], field: str, where: str) -> Text:
    """The prompt that stands in `field`, or that the conversation in `field` leads up to."""
    if field == "instruction":
        return _alpaca_prompt(values, where)
    if field == "prompt":
        prompt = read_text(values[field], where, field)
        if not isinstance(prompt, str):
            prompt = with_system(prompt, values, where)
        check_prompt(prompt, where, field)
        return prompt
    messages = with_system(read_messages(values[field], where, field), values, where)
    ends = "answer" if messages[-1]["role"] == "assistant" else "prompt"
    check_order(messages, where, field, after=None, ends=ends)
    return messages[:-1] if ends == "answer" else messages


def check_prompt(prompt: Text, where: str, field: str) -> None:
    """Refuses an empty prompt, and an unsound order of turns."""
    if not isinstance(prompt, str):
        check_order(prompt, where, field, after=None, ends="prompt")
    elif not prompt.strip():
        raise BadInput(f"{where}: `{field}` is an empty prompt; fill it, or leave the row out")


def _alpaca_prompt(values: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Alpaca's instruction and input as one user turn, after LLaMA-Factory's `history` of pairs."""
    instruction = read_string(values["instruction"], where, "instruction")
    if not instruction.strip():
        raise BadInput(f"{where}: `instruction` is an empty prompt; fill it, or leave the row out")
    given = read_string(values.get("input", ""), where, "input")
    turns: list[dict[str, Any]] = []
    history = values.get("history") or ()
    for pair in history if isinstance(history, (list, tuple)) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadInput(f"{where}: `history` must be a list of [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    turns.append({"role": "user", "content": question})
    return with_system(read_messages(turns, where, "history"), values, where)


def _check_parts(values: Mapping[str, Any], prompt: Text, where: str) -> None:
    """Refuses a part of Alpaca's prompt that stands beside one which does not take it up."""
    is_alpaca = "instruction" in values
    for field in (*OF_ALPACA, "context"):  # Dolly calls the input so
        given = values.get(field)
        if not is_stated(given) or (is_alpaca and field != "context") or (field == "context" and not is_alpaca):
            continue
        if not (isinstance(given, str) and _holds(as_text(prompt), given)):
            cure = "rename it to `input`" if is_alpaca else "write it into the prompt"
            raise BadInput(f"{where}: `{field}` is no part of the prompt that is read; {cure}, or drop it")


def _split_turns(
    answers: list[tuple[Message, ...]], fields: tuple[str, ...], where: str
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The longest shared opening that ends with a question is the prompt (of one answer: up to its first answer)."""
    shared, shortest = 0, min(len(answer) for answer in answers)
    while shared < shortest and all(says(answer[shared]) == says(answers[0][shared]) for answer in answers):
        if len(answers) == 1 and answers[0][shared]["role"] == "assistant":
            break
        shared += 1
    while shared and answers[0][shared - 1]["role"] not in ("user", "tool"):
        shared -= 1  # answers of several turns: the prompt may not end with an answer
    if not shared:
        raise BadInput(f"{where}: `prompt` is missing, and {_named(fields, ' and ')} share no opening turns; add it")
    if shared == shortest:
        short = next(field for field, answer in zip(fields, answers, strict=True) if len(answer) == shared)
        raise BadInput(f"{where}: `{short}` is an empty answer: it ends where the shared prompt ends; add a turn")
    return answers[0][:shared], [answer[shared:] for answer in answers]


def _without_turns(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """An answer that repeats the whole prompt first (with its system message or without), without it."""
    for opening in (prompt, prompt[1:]):
        is_system = len(opening) < len(prompt) and prompt[0]["role"] == "system"
        repeated = [says(turn) for turn in answer[: len(opening)]]
        if (opening is prompt or is_system) and opening and repeated == [says(turn) for turn in opening]:
            return answer[len(opening) :] or answer
    return answer


def _agree(taken: Text, other: Text, *, is_exact: bool = True) -> bool:
    """Whether a prompt says what the one that is taken says: nothing of it may be lost."""
    if isinstance(taken, str) or isinstance(other, str) or not is_exact:
        one, two = as_text(taken), as_text(other)
        return _holds(one, two) or _holds(two, one)
    if taken[0]["role"] == "system" != other[0]["role"]:
        taken = taken[1:]
    length = min(len(taken), len(other))
    return [says(turn) for turn in taken[:length]] == [says(turn) for turn in other[:length]]


def _holds(text: str, part: str) -> bool:
    """Whether every line of `part` stands in `text`, in order and as whole words, whatever the space between them."""
    words, position = _spaced(text), 0
    for line in part.splitlines():
        wanted = _spaced(line)
        if not wanted.strip():
            continue
        found = words.find(wanted, position)
        if found < 0:
            return False
        position = found + len(wanted) - 1
    return True


def _spaced(text: str) -> str:
    return f" {' '.join(WORDS.findall(text))} "


def _named(fields: tuple[str, ...], between: str = ", ") -> str:
    return between.join(f"`{field}`" for field in fields)
