"""`loss_on`: which turns of a demonstration carry loss; a row's own marks win."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.data import Demonstration, encode_demonstration, load
from align.errors import BadInput
from align.settings import DemonstrationData, SftSettings
from tests.data.test_trl_templates import runs
from tests.families import CHATML, FAMILIES, Family, tokenizer_of

Q, LATE = ({"role": "user", "content": text} for text in ("why", "and then"))
A, B = ({"role": "assistant", "content": text} for text in ("so", "no"))
S = {"role": "system", "content": "be brief"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "it rains"}
TEMPLATE = CHATML.replace(
    "m['content'] +", "m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') +"
)
IM = ("<|im_start|>", "<|im_end|>")
MARKED = TEMPLATE.replace("{{ '<|im_start|>' + m['role']", "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ '<|im_start|>' + m['role']").replace("{% endfor %}", "{% endif %}{% endfor %}").replace(r"<|im_start|>assistant\n' }}{% endif %}", r"<|im_start|>assistant\n<think>' }}{% endif %}")  # fmt: skip


def off(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "train": False}


def on(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "train": True}


def loaded(folder: Path, row: dict[str, Any], loss_on: str, **more: Any) -> Demonstration:
    (folder / "x.jsonl").write_text(json.dumps(row) + "\n")
    data = DemonstrationData(train=str(folder / "x.jsonl"), loss_on=loss_on, **more)  # type: ignore[arg-type]
    return load(data, "demonstrations").train[0]


LONG = {"messages": [S, Q, CALL, RESULT, A, LATE, B]}
WHOLE = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nlook<|im_end|>"
REST = "so<|im_end|>\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
LEARNT: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "answers": (LONG, "answers", ["look<|im_end|>", "so<|im_end|>", "no<|im_end|>"]),
    "the last": (LONG, "last_answer", ["no<|im_end|>"]),
    "all but results": (LONG, "all_but_tool_results", [WHOLE, REST]),
    "a row without tools": ({"messages": [Q, A]}, "all_but_tool_results", ["<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"]),
    "a prompt of its own": ({"prompt": [Q, B, Q], "completion": [A]}, "answers", ["so<|im_end|>"]),
    "a prompt of its own, the last": ({"prompt": [Q], "completion": [A, LATE, B]}, "last_answer", ["no<|im_end|>"]),
    "a prompt of its own, all": ({"prompt": [Q], "completion": [A]}, "all_but_tool_results", ["<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"]),
    "a mark against the last": ({"messages": [Q, on(A), LATE, off(B)]}, "last_answer", ["so<|im_end|>"]),
    "a mark for another": ({"messages": [Q, on(A), LATE, B]}, "last_answer", ["so<|im_end|>", "no<|im_end|>"]),
    "an answer that is marked": ({"messages": [Q, off(A), LATE, B]}, "all_but_tool_results", ["<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"]),
    "a question that is marked": ({"messages": [off(Q), A, LATE, B]}, "all_but_tool_results", ["so<|im_end|>\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"]),
    "a marked prompt of its own": ({"prompt": [off(Q)], "completion": [A]}, "all_but_tool_results", ["so<|im_end|>"]),
    "the last, marked, of all": ({"messages": [Q, A, LATE, off(B)]}, "all_but_tool_results", ["<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\n"]),
    "a system message of its own": ({"messages": [Q, off(A), LATE, B], "system": "be brief"}, "answers", ["no<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["as text", "by marks"])
@pytest.mark.parametrize("name", LEARNT)
def test_what_carries_loss(name: str, template: str, tmp_path: Path) -> None:
    row, loss_on, expected = LEARNT[name]
    tokenizer = tokenizer_of(Family(template, IM, "<|im_end|>"))
    assert runs(tokenizer, encode_demonstration(tokenizer, loaded(tmp_path, row, loss_on), 999)) == expected


def test_the_tokens_are_the_same_whatever_is_learnt(tmp_path: Path) -> None:
    for family in FAMILIES.values():
        tokenizer = tokenizer_of(family)
        row = {"messages": [Q, A, LATE, B]}
        found = [
            encode_demonstration(tokenizer, loaded(tmp_path, row, loss_on), 999)
            for loss_on in ("answers", "last_answer", "all_but_tool_results")
        ]
        assert len({each.input_ids for each in found}) == 1
        assert all(found[2].loss_mask)


def test_where_it_has_no_meaning(tmp_path: Path) -> None:
    plain = {"prompt": "why", "completion": "so"}
    for loss_on in ("last_answer", "all_but_tool_results"):
        with pytest.raises(
            BadInput, match=rf"x\.jsonl:1: `loss_on: {loss_on}` is of messages, and this row is plain text"
        ):
            loaded(tmp_path, plain, loss_on)
    assert loaded(tmp_path, plain, "answers").loss_on == "answers"
    with pytest.raises(BadInput, match="no demonstrations are left to train on .* 1 bad rows skipped"):
        loaded(tmp_path, plain, "last_answer", on_bad_row="skip")
    mixed = loaded(tmp_path, {"messages": [off(S), Q, A]}, "all_but_tool_results")
    with pytest.raises(BadInput, match=r"x\.jsonl:1: of the turns before an answer some are marked not to be learnt"):
        encode_demonstration(tokenizer_of(FAMILIES["chatml"]), mixed, 999)


def test_pairs_and_prompts_have_none() -> None:
    with pytest.raises(ValidationError, match=r"data\.loss_on"):
        from align.settings import RewardSettings

        RewardSettings(stage="reward", output="a", model={"base": "b"}, data={"train": "c", "loss_on": "answers"})  # type: ignore[arg-type]
    assert SftSettings.model_fields["data"].annotation is DemonstrationData


def test_marks_that_part_an_answer_choose_none(tmp_path: Path) -> None:
    parted = MARKED.replace("{{ m['content'] + (", "{{ m['content'] }}{% endgeneration %}: {% generation %}{{ (")
    tokenizer = tokenizer_of(Family(parted, IM, "<|im_end|>"))
    row = {"messages": [Q, {**CALL, "content": "wait"}, RESULT, A]}
    every = encode_demonstration(tokenizer, loaded(tmp_path, row, "answers"), 999)
    assert runs(tokenizer, every) == ["wait", "look<|im_end|>", "so", "<|im_end|>"]
    for loss_on in ("last_answer", "all_but_tool_results"):
        with pytest.raises(
            BadInput, match=r"x\.jsonl:1: the chat template's \{% generation %\} marks part an answer in two"
        ):
            encode_demonstration(tokenizer, loaded(tmp_path, row, loss_on), 999)
