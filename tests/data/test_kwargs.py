"""`model.chat_template_kwargs`: written into the template, they render as if each row had given them."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from align.data import Prompt, encode_prompt, unread
from align.data.kwargs import check_kwargs, parted, with_kwargs
from align.errors import BadInput
from tests.data.test_trl_templates import NAMES, ROWS, example, tokenizer
from tests.families import CHATML, FAMILIES, tokenizer_of

SWITCHED = (
    "{{- greeting }}{% if enable_thinking is defined and enable_thinking is false %}{{ 'off ' }}{% endif %}"
    "{{ effort | default('much') }} {{ words | default(['a']) | join('|') }}\n" + CHATML
)
GIVEN = {
    "enable_thinking": False,
    "effort": 'é "low" \\ #} %} {{ x }}\n',
    "words": ["b", "c", {"d": None, "e": True, "f": 1.5e-7}],
}


def rendered(tokenizer: Any, **kwargs: Any) -> str:
    messages = [{"role": "user", "content": "What is two plus two?"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "\n  {% if 1 %}x{% endif %}\n", "  {% if 1 %}\n  y{% endif %}", "{#- b -#}\n"]
)
def test_it_renders_as_if_they_were_given(start: str, tmp_path: Any) -> None:
    own = tokenizer_of(FAMILIES["chatml"])
    own.chat_template = start + SWITCHED
    expected, other = rendered(own, **GIVEN), rendered(own, **GIVEN | {"effort": "high"})
    thoughtful = rendered(own, **GIVEN | {"enable_thinking": True})
    assert len({expected, other, thoughtful, rendered(own)}) == 4
    own.chat_template = with_kwargs(start + SWITCHED, GIVEN)
    assert rendered(own) == rendered(own, effort=None) == expected  # null says nothing, as in a row
    assert (rendered(own, effort="high"), rendered(own, enable_thinking=True)) == (other, thoughtful)
    own.save_pretrained(tmp_path)
    assert rendered(AutoTokenizer.from_pretrained(tmp_path)) == expected
    assert parted(own.chat_template) == (GIVEN, start + SWITCHED)


@pytest.mark.parametrize("name", NAMES)
def test_the_real_templates_render_as_they_did(name: str) -> None:
    """A key that none of them reads changes nothing, and one that some read, what it changes where a row gives it."""
    own, source = tokenizer(name), tokenizer(name).chat_template
    rows = [example(row) for row in ROWS.values()]

    def every(source: str, **kwargs: Any) -> list[str]:
        found = []
        for row in rows:
            messages = [dict(turn) for turn in (*row.prompt, *row.completion)]
            for text in (False, True):
                how = {"tokenize": False, "add_generation_prompt": text, "chat_template": source}
                try:
                    found.append(own.apply_chat_template(messages, **how, **kwargs, **row.template))
                except Exception as error:
                    found.append(str(error))
        return found

    assert every(with_kwargs(source, {"nothing": 1})) == every(source)
    assert every(with_kwargs(source, {"enable_thinking": False})) == every(source, enable_thinking=False)


def test_those_that_are_there_are_kept_and_replaced() -> None:
    once = with_kwargs(CHATML, {"a": 1, "b": 2})
    assert with_kwargs(once, {}) == with_kwargs(once, {"b": 2}) == once != with_kwargs(CHATML, {"a": 1})
    assert parted(with_kwargs(once, {"b": 3, "c": 4})) == ({"a": 1, "b": 3, "c": 4}, CHATML)
    assert with_kwargs(CHATML, {"b": 2, "a": 1}) == once and with_kwargs(CHATML, {}) == CHATML
    for damaged in (once.replace("= 1", "= 3"), once.replace('"a": 1', '"a": '), once.replace('"a": 1', '"a": NaN')):
        assert parted(damaged) == ({}, damaged)  # somebody else's, whatever it says


def test_a_row_that_gives_some_wins_by_key() -> None:
    own = tokenizer_of(FAMILIES["chatml"])
    own.chat_template = with_kwargs(SWITCHED, {"enable_thinking": False, "effort": "low"})
    asked: Any = ({"role": "user", "content": "no"},)
    begins = own.decode(encode_prompt(own, Prompt(asked, {}, "x:1", {"effort": "high"})))
    assert begins.startswith("off high a")


BAD = {
    "tokenize": (False, "`model.chat_template_kwargs.tokenize` is not for a recipe to say"),
    "eos_token": ("a", "`model.chat_template_kwargs.eos_token` is not for a recipe to say"),
    "tools": ([{}], "`model.chat_template_kwargs.tools` is for a row to say: give it as a column `tools`"),
    "documents": ([{}], "`model.chat_template_kwargs.documents` is for a row to say"),
    "chat_template_kwargs": ({}, "`model.chat_template_kwargs.chat_template_kwargs` is for a row to say"),
    "a-b": (1, "`model.chat_template_kwargs.a-b` is no name that a template could read"),
    "enable_thinking": (None, "`model.chat_template_kwargs.enable_thinking` is null, which says nothing"),
    "enable_thinkng": (False, "enable_thinkng` is nothing that the chat template reads; did you mean `enable_thinking`?"),
    "colour": ("red", "colour` is nothing that the chat template reads; take it out, or name a template that does"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_recipe_cannot_say(name: str) -> None:
    value, expected = BAD[name]
    with pytest.raises(BadInput) as caught:
        check_kwargs({name: value}, with_kwargs(SWITCHED, {"colour": "blue"}))
    assert expected in str(caught.value)


def test_what_the_template_does_not_read_is_told() -> None:
    """Of a base on the Hub, whose template is not known beforehand."""
    own = tokenizer_of(FAMILIES["chatml"])
    own.chat_template = with_kwargs(SWITCHED, {"enable_thinking": False, "colour": "blue"})
    (said,) = unread(own, [example(ROWS["one turn"])])
    assert said.startswith(
        "`model.chat_template_kwargs` has keys that the chat template does not read"
    ) and said.endswith(": `colour`")
