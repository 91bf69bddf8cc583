"""The user's own files: whatever they do is one line that says where."""

import pytest

from align.data import Row, parse
from align.errors import BadInput, RunFailed
from align.plugins import load_object, told, users_code

BODIES = {
    "raise ValueError('one\\n two')": "ValueError: one two",
    "raise ValueError": "ValueError",
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit('over')": "SystemExit: over",
    "return f(row)": "RecursionError",
    "return row['answer']": "KeyError: 'answer'",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_format_function_that_fails_is_one_line_with_its_row(body, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"import sys\ndef f(row):\n    {body}\n")
    with pytest.raises(BadInput) as caught:
        parse(Row({"q": "why?"}, "x.jsonl:7"), "prompts", f"{path}:f")
    assert str(caught.value).startswith(f"x.jsonl:7: format function `f` raised {BODIES[body]}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("raises", [BadInput, RunFailed])
def test_a_call_that_fails_is_one_line_with_its_place(body, raises, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"import sys\ndef f(row):\n    {body}\n")
    reference = f"{path}:f"
    with pytest.raises(raises) as caught, users_code(reference, what="what it is", raises=raises):
        load_object(reference)({})
    assert str(caught.value).startswith(f"what it is failed ({path}:3): {BODIES[body]}")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_ours_and_ctrl_c_pass():
    for error in (BadInput("a"), RunFailed("b"), KeyboardInterrupt(), TimeoutError("c")):
        with pytest.raises(type(error)) as caught, users_code("own.py:f", what="f", passes=(TimeoutError,)):
            raise error
        assert caught.value is error


def test_an_error_is_told_in_a_line_whatever_it_says():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    assert (
        told(Mute()) == "Mute" and told(ValueError(" \n ")) == "ValueError" and told(KeyError("a")) == "KeyError: 'a'"
    )
    assert len(told(ValueError("many words " * 400))) <= 200
