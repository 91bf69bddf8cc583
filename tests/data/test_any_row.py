"""Whatever stands in a row, it is read, or refused in one line."""

import random
from typing import Any

import pytest

from align.data import Kind, Row, encode_demonstration, encode_pair, encode_prompt, parse, unread
from align.errors import BadInput
from tests.data.test_encode import make_tokenizer

NAMES = """
    messages conversations prompt completion instruction output input history context text chosen rejected system
    system_prompt tools documents chat_template_kwargs label kto_tag weight probability margin score_chosen
    score_rejected tie winner images functions is_bad loss_mask weights
"""
FIELDS = NAMES.split()
OF_TURNS = ["weight", "train", "mask", "masked", "label", "name", "tool_calls", "reasoning_content", "train_detail"]
TEXTS = [
    "",
    "a",
    "why?",
    "0",
    "false",
    "bad",
    "[]",
    "{}",
    "\ud83d",
    "1e999",
    "nan",
    "\x00",
    "天空",
    "a\nb",
    "Q: a\nA: b",
]
SCALARS = [None, True, False, 0, 1, -1, 0.5, 10**400, 2**63, float("nan"), float("inf")]
SOUND: list[dict[str, Any]] = [
    {"prompt": "why?", "completion": "so."},
    {"prompt": "why?", "chosen": "so.", "rejected": "no."},
    {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]},
    {},
]


def anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(SCALARS)
    if kind == 2:
        return [{"role": ("user", "assistant")[n % 2], "content": "a b"} for n in range(rng.randint(1, 5))]
    if kind == 3:
        return [turn(rng) for _ in range(rng.randint(0, 3))]
    if kind == 4:
        return [anything(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(["a", "role", "content", "tools"]): anything(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def turn(rng: random.Random) -> dict[str, Any]:
    role, content = rng.choice([("role", "content"), ("from", "value"), ("role", "value")])
    further = {name: rng.choice([*TEXTS, *SCALARS]) for name in rng.sample(OF_TURNS, rng.randint(0, 2))}
    said = {role: rng.choice(["user", "assistant", "system", "tool", "gpt", "x", None, 3])}
    return {**said, content: rng.choice([*TEXTS, *SCALARS]), **further}


@pytest.mark.parametrize("seed", range(4))
def test_a_row_of_anything(seed: int) -> None:
    rng, tokenizer = random.Random(seed), make_tokenizer()
    num_read = 0
    for _ in range(150):
        row = {name: anything(rng) for name in rng.sample(FIELDS, rng.randint(0, 5))} | rng.choice(SOUND)
        kinds: tuple[Kind, ...] = ("demonstrations", "preferences", "prompts")
        for kind in kinds:
            try:
                example: Any = parse(Row(row, "x:1"), kind)
                unread(tokenizer, [example])
                if kind == "demonstrations":
                    encode_demonstration(tokenizer, example, 99)
                elif kind == "preferences":
                    encode_pair(tokenizer, example, 99)
                else:
                    encode_prompt(tokenizer, example)
                num_read += 1
            except BadInput as error:
                assert "\n" not in str(error) and str(error).startswith("x:1: ")
    assert num_read > 20
