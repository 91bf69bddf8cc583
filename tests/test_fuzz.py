"""Whatever a user brings ends well or in one line: no traceback, no hang, nothing written. Seeded, in one process.

What is brought is made of what is sound, with values swapped, keys misspelt, rows bent and bytes lost.
`ALIGN_FUZZ=full` brings 4,300 such things; without it, the first third of each kind.
"""

import copy
import csv
import io
import json
import os
import random
import signal
import string
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from align.data import load
from align.data.formats import Prompt
from align.errors import BadInput, RunFailed
from align.loop.rounds import load_loop
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.rewards import Answers, build_rewards
from align.settings import Data, Reward
from tests.test_bad_input import ROOT, SOUND, build, inside, listing

SECONDS = 10.0  # of one item, before it counts as hanging
IS_FULL = os.environ.get("ALIGN_FUZZ") == "full"
NUM_RECIPES, NUM_OVERRIDES, NUM_FILES, NUM_REWARDS = (2000, 1000, 1000, 300) if IS_FULL else (700, 350, 350, 100)

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**70, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "~", "~/x", "~nobody_here/x", "a\0b", "\u202e", "é" * 200, "a" * 300, "a/" * 3000, "[b]x[/b]", "../.."),
    *("${output}", "${nope}", "${", "${here:x}", "${oc.env:HOME}", "???", "1e400", "yes", "2024-01-01", "-", "0x10"),
    *("model", "data/sft.jsonl", "data", "runs/sft", "runs/reward", "fns.py:brevity", "fns.py", "org/name", "nf4"),
    *("out", "x.yaml", "photos/cat.jpg", "/sys/x", "http://h/x", "learned", "cpu", "https://", "a:b", ":", "{}", "[1"),
    *(
        [],
        {},
        [[]],
        {"a": {}},
        ["x"] * 30,
        [None],
        [{}],
        {"": 1},
        {"from": None},
        {"kind": "lora"},
        {"use": "fns.py:x"},
    ),
]


class Hangs(BaseException):
    """An item took too long."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault_of(act: Callable[[], object]) -> str:
    """Nothing where `act` ends well or with a line for the user; else where it came to grief."""
    try:
        with no_longer_than(SECONDS):
            act()
    except (BadInput, RunFailed) as error:
        return "" if str(error).strip() and "\n" not in str(error) else f"not one line: {str(error)[:300]!r}"
    except Hangs as error:
        return str(error)
    except (BaseException, ExceptionGroup) as error:  # SystemExit of a user's function too
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} at {place.filename}:{place.lineno}"
    return ""


def told(faults: dict[str, str]) -> str:
    """The first item of each kind of fault."""
    kinds = {fault.split(":")[0] + fault.rpartition(" at ")[2]: (item, fault) for item, fault in faults.items()}
    return f"{len(faults)} faults\n" + "\n".join(f"{fault}\n    {item[:600]}" for item, fault in kinds.values())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    build(tmp_path)
    with inside(tmp_path):
        yield tmp_path


def shipped() -> list[Any]:
    paths = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "accelerate"]
    assert len(paths) >= 24
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


def places_in(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested values."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    return [found for key in keys for found in ((values, key), *places_in(values[key]))]


def misspelt(key: Any, rng: random.Random) -> Any:
    text = str(key)
    cut = rng.randrange(len(text) + 1)
    return rng.choice(
        (text[:cut] + text[cut + 1 :], text[:cut] + rng.choice(string.printable) + text[cut:], rng.choice(ODD[:40]))
    )


def bent(values: Any, rng: random.Random) -> Any:
    """A copy of nested values with one to three things changed."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        found = places_in(values)
        if not found:
            break
        container, key = rng.choice(found)
        how = rng.randrange(6)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict) and (name := misspelt(key, rng)).__hash__ is not None:
            container[name] = container.pop(key)
        elif how == 2:
            container[key] = rng.choice(([container[key]], {"a": container[key]}, str(container[key])))
        elif how == 3 and rng.random() < 0.1:
            for _ in range(rng.choice((5, 50))):  # (deeper: the door's own tests)
                container[key] = [container[key]]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return values


def with_lost_letters(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        cut = rng.randrange(len(text) + 1)
        text = rng.choice(
            (
                text[:cut] + text[cut + rng.randint(1, 6) :],
                text[:cut] + rng.choice(string.printable + "\ufeff\u2028é\x07") + text[cut:],
                text[:cut]
                + rng.choice(("*a", "&a ", "!!binary ", "!x ", "---\n", "- ", ": ", "<<: ", "${", "\t", "{", "]"))
                + text[cut:],
                text[:cut],
            )
        )
    return text


def test_recipes(place: Path) -> None:
    rng, sources, faults = random.Random(17), [*shipped(), *SOUND.values(), *SOUND.values()], {}
    before = listing(place)
    for _ in range(NUM_RECIPES):
        values = bent(rng.choice(sources), rng)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        text = with_lost_letters(text, rng) if rng.random() < 0.3 else text
        Path("fuzzed.yaml").write_text(text, encoding="utf-8", errors="replace")
        is_loop = isinstance(values, dict) and "num_rounds" in values
        act = (lambda: load_loop("fuzzed.yaml")) if is_loop else (lambda: check_recipe(load_recipe("fuzzed.yaml")))
        if fault := fault_of(act):
            faults[text] = fault
        Path("fuzzed.yaml").unlink()
    assert not faults, told(faults)
    assert listing(place) == before


def test_overrides(place: Path) -> None:
    rng, faults = random.Random(18), {}
    before = listing(place)
    paths = {
        name: [*_dotted(values), "train.learning_rate", "seed", "launch", "track.wandb_project"]
        for name, values in SOUND.items()
    }
    for _ in range(NUM_OVERRIDES):
        name = rng.choice(list(SOUND))
        key = rng.choice(paths[name])
        key = misspelt(key, rng) if rng.random() < 0.3 else key + rng.choice(("", "", ".x", "[0]", "[99]", ".0", "."))
        value = rng.choice(ODD)
        text = value if isinstance(value, str) else json.dumps(value)
        text = with_lost_letters(text, rng) if rng.random() < 0.3 else text
        override = f"{key}{rng.choice(('=', '=', '=', '==', ' = ', ''))}{text}"
        if fault := fault_of(lambda: check_recipe(load_recipe(f"{name}.yaml", [override]))):  # noqa: B023
            faults[f"{name} {override}"] = fault
    assert not faults, told(faults)
    assert listing(place) == before


def _dotted(values: Any, prefix: str = "") -> list[str]:
    found = []
    for key in list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        name = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}".lstrip(".")
        found += [name, *_dotted(values[key], name)]
    return found


USER, BOT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [
        {"messages": [USER, BOT]},
        {"prompt": "1 + 1?", "completion": "2"},
        {"prompt": [USER], "completion": [BOT], "tools": [{"name": "f"}]},
        {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}], "system": "s"},
        {"instruction": "add", "input": "1", "output": "2"},
        {"text": "1 + 1 = 2"},
    ],
    "preferences": [
        {"prompt": "1?", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [{**BOT, "content": "3"}], "margin": 0.5},
        {"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "3"}], "weight": 2, "label": 0.7},
    ],
    "prompts": [{"prompt": "1?"}, {"prompt": [USER], "answer": "2"}, {"messages": [USER]}, {"question": "1?"}],
}
ODD_CELLS: list[Any] = [
    *ODD[:16],
    "",
    " ",
    "\ud800",
    "\x00",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [USER] * 3,
    "[]",
    "{}",
]


def test_data(place: Path) -> None:
    rng, faults = random.Random(19), {}
    (place / "fuzzed").mkdir()
    before = listing(place)
    for number in range(NUM_FILES):
        kind, ending = rng.choice(list(ROWS)), rng.choice(("jsonl", "jsonl", "json", "csv", "parquet"))
        rows = [_bent_row(rng.choice(ROWS[kind]), rng) for _ in range(rng.randint(0, 6))]
        content = _written(rows, ending, rng)
        if rng.random() < 0.4:
            content = _with_lost_bytes(content, rng)
        path = Path("fuzzed") / f"{number}.{ending}"
        path.write_bytes(content)
        values: dict[str, Any] = {"train": {"path": str(path), "weight": rng.choice((1, 1, 0.3, 3))}}
        values |= {"validation_split": rng.choice((0, 0.5)), "on_bad_row": rng.choice(("error", "skip"))}
        if fault := fault_of(lambda: load(Data.model_validate(values), kind)):  # type: ignore[call-overload]  # noqa: B023
            faults[f"{kind} {ending} {values} {content[:500]!r}"] = fault
        path.unlink()
    assert not faults, told(faults)
    assert listing(place) == before


def _bent_row(row: dict[str, Any], rng: random.Random) -> Any:
    if rng.random() < 0.4:
        return row
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 2)):
        found = places_in(row)
        if not found:
            break
        container, key = rng.choice(found)
        how = rng.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[str(misspelt(key, rng))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_CELLS))
    return row if rng.random() < 0.95 else rng.choice(ODD_CELLS)


def _written(rows: list[Any], ending: str, rng: random.Random) -> bytes:
    if ending == "csv":
        file = io.StringIO()
        cells = [
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
            for row in rows
            if isinstance(row, dict)
        ]
        writer = csv.DictWriter(file, sorted({str(key) for row in cells for key in row}))
        writer.writeheader()
        writer.writerows(cells)
        return file.getvalue().encode("utf-8", "surrogatepass")
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), sink)
        except Exception:  # what pyarrow itself does not write: some other bytes
            return b"PAR1" + rng.randbytes(40) + b"PAR1"
        return sink.getvalue()
    if ending == "json":
        return json.dumps(rng.choice((rows, {"data": rows}, rows[:1]))).encode()
    return "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.9) for row in rows).encode("utf-8", "surrogatepass")


def _with_lost_bytes(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        cut = rng.randrange(len(content) + 1)
        odd = rng.choice(
            (b"\xff", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n\n", b'"', b"{", b"[" * 5000, b"NaN", b"1e999", b",")
        )
        content = rng.choice(
            (content[:cut], content[:cut] + content[cut + rng.randint(1, 9) :], content[:cut] + odd + content[cut:])
        )
    return content


GIVEN = (
    *("[1.0] * n", "[None] * n", "[float('nan')] * n", "[float('inf')] * n", "[1] * (n + 1)", "[]", "None", "5", "1.5"),
    *(
        "'words'",
        "b'bytes'",
        "{}",
        "{i: 1.0 for i in range(n)}",
        "set(range(n))",
        "(1.0 for _ in range(n))",
        "object()",
    ),
    *(
        "['a'] * n",
        "[[1.0]] * n",
        "[[1.0, 2.0]] * n",
        "[{}] * n",
        "[True] * n",
        "['1.5'] * n",
        "[10**400] * n",
        "[1j] * n",
    ),
    *("__import__('numpy').ones(n)", "__import__('numpy').ones((n, 2))", "__import__('numpy').float32(1)", "range(n)"),
    *(
        "tuple([0.5] * n)",
        "len",
        "Odd()",
        "[Odd()] * n",
        "map(float, [1] * n)",
        "later()",
        "[later() for _ in range(n)]",
    ),
)
RAISED = (
    *(
        "raise ValueError('one\\ntwo\\nthree')",
        "raise KeyError('answer')",
        "raise SystemExit(3)",
        "raise KeyboardInterrupt2",
    ),
    *(
        "import sys; sys.exit('bye')",
        "assert False",
        "1 / 0",
        "raise Exception",
        "raise StopIteration",
        "f()",
        "import nowhere",
    ),
    *(
        "raise ExceptionGroup('many', [ValueError('a'), TypeError('b')])",
        "raise MemoryError",
        "open('nowhere')",
        "quit()",
    ),
    *(
        "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'r')",
        "raise Strange",
        "raise TimeoutError",
        "raise GeneratorExit",
    ),
)
SIGNATURES = (
    *("prompts, completions, **kwargs", "completions, **columns", "*, prompts, completions, completion_ids", "**k"),
    *(
        "completions, answer",
        "completions, answer=None",
        "completions, target=3, **k",
        "*a, **k",
        "completions, /, **k",
        "",
        "prompts",
    ),
    *("completions, trainer_state, **k", "completions, log_metric", "completions, log_extra, **k"),
)
SOURCE = """
import asyncio
class Odd:
    def __float__(self): raise RuntimeError("no number")
    def __len__(self): raise TypeError("no length")
    def __repr__(self): raise ValueError("no words")
class Strange(BaseException): pass
async def later(): return [1.0, 1.0, 1.0]
{is_async}def f({signature}):
    n = 3
    {body}
"""


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_reward_functions(place: Path) -> None:
    rng, faults = random.Random(20), {}
    (place / "fuzzed").mkdir()
    before = listing(place)
    prompts = [Prompt(prompt, {"answer": "2"}, f"p.jsonl:{i}") for i, prompt in enumerate(("1?", "2?", [USER]), 1)]
    answers = Answers(prompts, [[1]] * 3, ["2", "", "3"], [[2], [], [3]])
    for number in range(NUM_REWARDS):
        body = rng.choice(RAISED) if rng.random() < 0.35 else f"return {rng.choice(GIVEN)}"
        is_async = "async " if rng.random() < 0.2 else ""
        source = SOURCE.format(is_async=is_async, signature=rng.choice(SIGNATURES), body=body)
        path = Path("fuzzed") / f"reward_{number}.py"
        path.write_text(source)
        values: dict[str, Any] = {"use": f"{path}:f"} | ({"target": 3} if rng.random() < 0.2 else {})

        def act(values: dict[str, Any] = values) -> None:
            totals, _ = build_rewards([Reward.model_validate(values)], None)(answers)  # type: ignore[arg-type]
            assert len(totals) == 3 and all(isinstance(total, float) for total in totals)

        if fault := fault_of(act):
            faults[source[source.index("async def later") + 45 :]] = fault
        path.unlink()
    assert not faults, told(faults)
    assert listing(place) == before
