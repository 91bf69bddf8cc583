"""Reward functions of the user's: whatever they give or do is a number a row, or one line that says what is wrong."""

import copy
import json
import math
import sys

import pytest
from wandb.sdk.lib.exit_hooks import ExitHooks

from align.data.formats import Prompt
from align.errors import BadInput, RunFailed
from align.rewards import Answers, build_rewards, check_columns, check_reward, means_of
from align.settings import EvaluateSettings, PpoSettings, Reward, ScoreSettings

HEAD = """\
import asyncio, decimal, fractions, functools, itertools, sys
import numpy as np
import pandas as pd
import torch
"""
PROMPT = ({"role": "user", "content": "give me a cup"},)


def answers(*texts, columns=None, prompt=PROMPT):
    prompts = [Prompt(prompt, dict(columns or {}), f"data.jsonl:{number}") for number in range(1, len(texts) + 1)]
    return Answers(prompts, [[1, 2]] * len(texts), list(texts), [[4, 3]] * len(texts))


@pytest.fixture
def mine(tmp_path):
    """Writes a file of the user's; returns the mix of the functions named."""

    def write(body, *uses, **arguments):
        path = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
        path.write_text(HEAD + body)
        return build_rewards([Reward(use=f"{path}:{use}", **arguments) for use in uses or ("f",)], None)

    return write


NAN = math.nan
SERVED = {  # what a function of two answers returns -> its scores
    "a list": ("[1.0, 2.0]", [1.0, 2.0]),
    "a tuple": ("(1, 2)", [1.0, 2.0]),
    "whole numbers": ("[1, -2]", [1.0, -2.0]),
    "yes and no": ("[True, False]", [1.0, 0.0]),
    "None": ("[None, 1.0]", [NAN, 1.0]),
    "NaN": ("[float('nan'), 1.0]", [NAN, 1.0]),
    "an array": ("np.array([1.0, 2.0])", [1.0, 2.0]),
    "an array of whole numbers": ("np.array([1, 2])", [1.0, 2.0]),
    "an array of objects": ("np.array([None, 2], dtype=object)", [NAN, 2.0]),
    "numpy's numbers": ("[np.float32(1), np.bool_(True)]", [1.0, 1.0]),
    "a tensor": ("torch.tensor([1.0, 2.0])", [1.0, 2.0]),
    "a tensor in 16 bits": ("torch.tensor([1.0, 2.0], dtype=torch.bfloat16)", [1.0, 2.0]),
    "a tensor on a graph": ("torch.ones(2, requires_grad=True) * 2", [2.0, 2.0]),
    "tensors of one number": ("[torch.tensor(1.0), torch.tensor(2)]", [1.0, 2.0]),
    "arrays of one number": ("[np.array(1.0), np.array(2)]", [1.0, 2.0]),
    "a series": ("pd.Series([1.0, 2.0], index=[7, 9])", [1.0, 2.0]),
    "a generator": ("(float(i) for i in range(2))", [0.0, 1.0]),
    "a map": ("map(float, '12')", [1.0, 2.0]),
    "values": ("{'a': 1.0, 'b': 2.0}.values()", [1.0, 2.0]),
    "decimals": ("[decimal.Decimal('1.5'), decimal.Decimal(2)]", [1.5, 2.0]),
    "fractions": ("[fractions.Fraction(1, 2), 2]", [0.5, 2.0]),
    "a future": ("asyncio.sleep(0, [1.0, 2.0])", [1.0, 2.0]),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_number_a_row_is_served(name, mine):
    given, expected = SERVED[name]
    _, parts = mine(
        f"def f(completions, **kw):\n    return {given}\ndef one(completions):\n    return [1.0, 1.0]\n", "f", "one"
    )(answers("red", "blue"))
    assert parts["f"] == pytest.approx(expected, nan_ok=True)


ALONG = {  # what a function of two answers of two tokens returns -> their scores, and what each token has of them
    "lists": ("[[1.0, 0.5], [0.0, -2.0]]", [1.5, -2.0], [[2.0, 1.0], [0.0, -4.0]]),
    "an array, and a number": ("[np.array([1, 2]), 7]", [3.0, 7.0], [[2.0, 4.0], []]),
    "a tensor, and nothing": ("[torch.tensor([1.0, 2.0]), None]", [3.0, NAN], [[2.0, 4.0], []]),
    "in a future": ("asyncio.sleep(0, [[1.0, 0.5], 3])", [1.5, 3.0], [[2.0, 1.0], []]),
}


@pytest.mark.parametrize("name", ALONG)
def test_a_number_a_token_is_served(name, mine):
    given, scores, earned = ALONG[name]
    own = f"def f(completions, **kw):\n    return {given}\n"
    mix = mine(f"{own}def one(completions):\n    return [1.0, 1.0]\n", "f", "one", weight=2.0)
    told = mix.told(answers("red", "blue"))
    assert told.parts["f"] == pytest.approx(scores, nan_ok=True) and told.earned == earned
    assert told.totals == [2.0 + 2.0 * (0.0 if math.isnan(score) else score) for score in scores]
    assert copy.deepcopy(told.parts["f"])[0].tokens == told.parts["f"][0].tokens


def test_what_two_functions_give_a_token_adds_up(mine):
    both = "def f(completion_ids):\n    return [[i, 1.0] for i, _ in enumerate(completion_ids)]\n"
    mix = mine(f"{both}def g(completion_ids):\n    return [[10.0, 20.0], 5.0]\n", "f", "g")
    assert mix.told(answers("red", "blue")).earned == [[10.0, 21.0], [1.0, 1.0]]


REFUSED = {  # -> what the line says
    "nothing": ("None", "gave None for 2 answers; it must return a list of 2 numbers"),
    "a number": ("1.0", r"gave 1.0 \(float\) for 2 answers"),
    "an array of no axis": ("np.array(1.0)", "gave array"),
    "a column": ("np.ones((2, 1))", r"gave ndarray of shape \(2, 1\) for 2 answers"),
    "a row": ("np.ones((1, 2))", r"gave ndarray of shape \(1, 2\)"),
    "a matrix": ("torch.ones(2, 2)", r"gave Tensor of shape \(2, 2\)"),
    "a frame": ("pd.DataFrame({'a': [1.0, 2.0]})", r"gave DataFrame of shape \(2, 1\)"),
    "text": ("'ab'", r"gave 'ab' \(str\) for 2 answers"),
    "bytes": ("b'ab'", r"gave b'ab' \(bytes\)"),
    "a mapping": ("{0: 1.0, 1: 2.0}", r"gave \{0: 1.0, 1: 2.0\} \(dict\)"),
    "a set": ("{1.0, 2.0}", r"\(set\)"),
    "words": ("['good', 'bad']", r"gave 'good' \(str\) for the answer to data.jsonl:1; a score is a finite number"),
    "numbers as text": ("[1.0, '2.0']", r"gave '2.0' \(str\) for the answer to data.jsonl:2"),
    "too few along it": (
        "[2.0, [1.0]]",
        r"gave 1 numbers along the answer to data.jsonl:2, which has 2 tokens; give one for each of its",
    ),
    "too many along it": ("[torch.ones(3), 0]", "gave 3 numbers along the answer to data.jsonl:1, which has 2 tokens"),
    "none along it": ("[[], 0]", "gave 0 numbers along the answer to data.jsonl:1"),
    "pairs": ("[(1.0, 'why'), (2.0, 'why')]", r"gave 'why' \(str\) for a token of the answer to data.jsonl:1"),
    "None along it": ("[0, [1.0, None]]", "gave None for a token of the answer to data.jsonl:2; what a token earns"),
    "infinity along it": ("[0, [1.0, float('inf')]]", "gave inf .float. for a token of the answer to data.jsonl:2"),
    "deeper than tokens": ("[0, [[1.0], [2.0]]]", r"gave \[1.0\] \(list\) for a token"),
    "too few": ("[1.0]", "gave 1 scores for 2 answers"),
    "none": ("[]", "gave 0 scores for 2 answers"),
    "too many": ("[1.0] * 3", "gave 3 scores for 2 answers"),
    "a generator of too few": ("(x for x in [1.0])", "gave 1 scores for 2 answers"),
    "a generator without end": ("itertools.repeat(1.0)", "gave 2 and more scores for 2 answers"),
    "infinity": ("[1.0, float('inf')]", r"gave inf \(float\) for the answer to data.jsonl:2"),
    "less than any number": ("np.array([-np.inf, 0])", "gave .*inf.* for the answer to data.jsonl:1"),
    "a number too large": ("[10**400, 1]", "for the answer to data.jsonl:1"),
    "more than 32 bits hold": ("[1e300, 1]", "gave 1e.300 for the answer to data.jsonl:1: no finite number in float32"),
    "complex": ("[1j, 2.0]", r"gave 1j \(complex\)"),
    "numpy's complex": ("np.array([1j, 2.0])", r"\(complex128\)"),
    "a function": ("f", r"\(function\) for 2 answers"),
    "what cannot be shown": ("Odd()", "gave an object of type Odd"),
    "an object a row": ("[Odd(), Odd()]", "gave an object of type Odd for the answer to data.jsonl:1"),
    "NaN for all": ("[float('nan')] * 2", "no reward applies to the answer to data.jsonl:1"),
    "no reward for one": ("[1.0, None]", "no reward applies to the answer to data.jsonl:2"),
    "an asynchronous generator": ("later()", "gave .*later.* for 2 answers"),
}
ODD = "class Odd:\n    def __repr__(self):\n        raise ValueError('no')\nasync def later():\n    yield 1.0\n"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_a_row_is_one_line_that_names_the_function(name, mine):
    given, says = REFUSED[name]
    mix = mine(f"{ODD}def f(completions, **kw):\n    return {given}\n")
    with pytest.raises(RunFailed, match=says) as caught:
        mix(answers("red", "blue"))
    assert "\n" not in str(caught.value) and ("`f`" in str(caught.value) or "no reward" in says)


RAISED = {
    "an error": ("raise ValueError('no such thing')", "ValueError: no such thing"),
    "without words": ("raise ValueError", ": ValueError$"),
    "of many lines": ("raise RuntimeError('one\\n two\\n\\nthree')", "RuntimeError: one two three"),
    "a key": ("return {}['answer']", "KeyError: 'answer'"),
    "an assertion": ("assert False", ": AssertionError$"),
    "that cannot say itself": ("raise Mute", ": Mute$"),
    "the end of the program": ("sys.exit(0)", "SystemExit: 0"),
    "an exit with words": ("sys.exit('done')", "SystemExit: done"),
    "an exit without a code": ("raise SystemExit", ": SystemExit"),
    "without end": ("return f(completions)", "RecursionError"),
    "an error of no kind": ("raise type('Strange', (BaseException,), {})('no')", "Strange: no"),
    "many at once": ("raise ExceptionGroup('many', [ValueError('a'), TypeError('b')])", "ExceptionGroup: many .2 sub"),
    "a task given up": ("raise asyncio.CancelledError", "CancelledError"),
    "deep in a library": ("np.linalg.inv(np.zeros((2, 2)))", "LinAlgError: Singular matrix"),
    "from a generator": ("yield 1.0; raise OSError(2, 'gone')", "FileNotFoundError: .*gone"),
}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("name", RAISED)
def test_what_a_function_raises_is_one_line_with_its_place(name, kind, mine, tmp_path):
    body, says = RAISED[name]
    if "yield" in body and kind != "def":
        return
    call = "await " if kind != "def" and "f(completions)" in body else ""
    lines = (
        f"class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n{kind} f(completions, **kw):\n    "
    )
    mix = mine(lines + body.replace("return f", f"return {call}f") + "\n")
    with pytest.raises(RunFailed, match=says) as caught:
        mix(answers("red", "blue"))
    place = f"the reward `f` failed ({tmp_path}/mine0.py:{HEAD.count(chr(10)) + 5}): "
    assert str(caught.value).startswith(place) and "\n" not in str(caught.value)


def test_an_exit_of_a_task_within_is_a_line_too_and_the_loop_lives_on(mine, monkeypatch):
    monkeypatch.setattr(sys, "exit", sys.exit)  # and so put back afterwards
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    ExitHooks().hook()  # wandb's way between, as in a run that it follows
    body = (
        "async def stop():\n    sys.exit(3)\n"
        "async def f(completions, **kw):\n    return await asyncio.gather(stop(), stop(), asyncio.sleep(60))\n"
        "async def one(completions, **kw):\n    return [1.0]\n"
    )
    with pytest.raises(RunFailed, match=r"`f`.* failed .*mine0.py:6\): SystemExit: 3"):
        mine(body, "f", "one")(answers("red"))
    assert mine(body, "one")(answers("red"))[0] == [1.0]


def test_ctrl_c_passes(mine):
    with pytest.raises(KeyboardInterrupt):
        mine("def f(completions, **kw):\n    raise KeyboardInterrupt\n")(answers("red"))


def test_the_place_is_shown_as_the_recipe_names_the_file(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("def low(texts):\n    return 1 / 0\n")
    (tmp_path / "own.py").write_text(
        "from helper import low\n\ndef f(completions, **kw):\n    return low(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunFailed, match=r"the reward `f` failed \(own.py:4\): ZeroDivisionError"):
        build_rewards([Reward(use="own.py:f")], None)(answers("red"))
    with pytest.raises(RunFailed, match=r"the reward `low` failed \(.*helper.py:2\)"):
        build_rewards([Reward(use="helper:low", texts=["a"])], None)(answers("red"))
    monkeypatch.delitem(sys.modules, "helper")


# ------------------------------------------------------------------------------------------------- asynchronous rewards

LIMITED = """
limit = asyncio.Semaphore(1)
loops, order = [], []
async def f(completions, **kw):
    async def one(text):
        async with limit:
            await asyncio.sleep(0.001)
            return float(len(text))
    loops.append(asyncio.get_running_loop())
    return await asyncio.gather(*[one(c[0]["content"]) for c in completions])
class Later:
    async def __call__(self, completions, **kw):
        loops.append(asyncio.get_running_loop())
        async with limit:
            return [1.0 for _ in completions]
later = Later()
bound = functools.partial(f, unused=1)
async def first(completions, **kw):
    order.append("first begins")
    await asyncio.sleep(0.01)
    order.append("first ends")
    return [1.0 for _ in completions]
async def second(completions, **kw):
    order.append("second begins")
    await asyncio.sleep(0)
    order.append("second ends")
    return [1.0 for _ in completions]
def plain(completions, **kw):
    order.append("plain")
    return [1.0 for _ in completions]
def hands_on(completions, **kw):
    return f(completions)
"""


def test_asynchronous_rewards_share_one_loop_over_the_whole_run(mine):
    mix = mine(LIMITED, "f", "later", "bound", "hands_on")
    for _ in range(3):
        totals, parts = mix(answers("red", "a cup"))
        assert totals == [10.0, 16.0] and list(parts) == ["f", "later", "bound", "hands_on"]
    other = mine(LIMITED, "f")
    other(answers("red"))
    loops = [loop for each in (mix, other) for loop in each.terms[0][2]._function.__globals__["loops"]]
    assert len(loops) == 13 and len(set(map(id, loops))) == 1


def test_they_run_at_the_same_time_after_the_others(mine):
    mix = mine(LIMITED, "first", "second", "plain")
    assert list(mix(answers("red"))[1]) == ["first", "second", "plain"]
    order = mix.terms[0][2]._function.__globals__["order"]
    assert order == ["plain", "first begins", "second begins", "second ends", "first ends"]


def test_where_one_fails_the_others_are_stopped(mine):
    body = (
        "left = []\nasync def f(completions, **kw):\n    raise ValueError('no')\n"
        "async def slow(completions, **kw):\n    try:\n        await asyncio.sleep(60)\n    finally:\n        left.append(1)\n"
    )
    mix = mine(body, "f", "slow")
    with pytest.raises(RunFailed, match="the reward `f` failed .*: ValueError: no"):
        mix(answers("red"))
    assert mix.terms[1][2]._function.__globals__["left"] == [1]


# ------------------------------------------------------------------------------------------------------ TRL's arguments


def test_the_state_and_the_logs_of_a_trainer_are_lent(mine):
    mix = mine(
        "def f(completions, trainer_state, log_metric, log_extra, **kw):\n"
        "    log_metric('share', len(completions) / 4)\n    log_metric('share', torch.tensor(1.0))\n"
        "    log_extra('length', [len(c[0]['content']) for c in completions])\n"
        "    for c in completions:\n        log_extra('what', [float('nan') if 'red' in str(c) else np.float32(0.5)])\n"
        "    return [trainer_state.global_step / trainer_state.max_steps + trainer_state.epoch] * len(completions)\n"
    )
    mix.journal.step, mix.journal.num_steps, mix.journal.epoch = 3, 4, 1.5
    told = mix.told(answers("red", "blue"))
    assert told.totals == [2.25, 2.25] and told.logged == {"share": [0.5, 1.0]}
    assert told.extra == [{"length": 3, "what": "nan"}, {"length": 4, "what": 0.5}]
    json.dumps(told.extra, allow_nan=False)
    state = mix.journal.lent()["trainer_state"]
    assert state.is_world_process_zero and state.log_history == [] and copy.deepcopy(state).global_step == 3
    assert mix.told(answers()).logged == {} and mix.told(answers()).extra == []  # taken, and a process without rows


def test_every_call_counts_once_in_what_is_logged():
    assert means_of([{"a": [1.0, 3.0]}, {"a": [5.0], "b": [4.0]}, {}]) == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    "call, says",
    [
        ("log_extra('a', [1])", "log_extra.`a`. was given 1 values for 2 answers"),
        ("log_extra('score', [1, 2])", "the reward `f` failed .*`score` already; choose another name"),
        ("log_extra('a', 1)", "TypeError"),
        ("log_metric('a', 'many')", "ValueError"),
        ("log_metric('a')", "TypeError"),
    ],
)
def test_what_cannot_be_logged_is_one_line(call, says, mine):
    mix = mine(f"def f(completions, log_metric, log_extra):\n    {call}\n    return [1.0, 1.0]\n")
    with pytest.raises(RunFailed, match=says):
        mix.told(answers("red", "blue"))


def test_a_function_may_do_what_it_likes_to_its_arguments(mine):
    mix = mine(
        "def f(prompts, completions, completion_ids, tags, words, **kw):\n"
        "    assert prompts[0][0]['content'] == 'give me a cup' and tags == [['a'], ['a']] and words == ['x']\n"
        "    prompts[0][0]['content'] = ''; completions[0][0]['content'] = ''; completion_ids[0].clear()\n"
        "    tags[0].append('b'); words.append('y'); prompts.clear(); completions.clear()\n"
        "    return [1.0, 2.0]\n",
        words=["x"],
    )
    given = answers("red", "blue", columns={"tags": ["a"]})
    for _ in range(2):
        assert mix(given)[0] == [1.0, 2.0]
    assert given.prompts[0].columns == {"tags": ["a"]} and given.texts[0] == "red" and given.ids[0] == [4, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_only_a_function_may_say_that_it_does_not_apply(value, mine):
    mix = mine("def f(completions, **kw):\n    return [1.0] * len(completions)\n")
    mix.terms.append(("learned", 1.0, lambda given: [1.0, value]))
    with pytest.raises(
        RunFailed, match="the reward `learned` gave .* for the answer to data.jsonl:2: no finite number"
    ):
        mix(answers("red", "blue"))


# ------------------------------------------------------------------------------------------------------------ at the door


def stage(kind, folder, **values):
    cls = {"ppo": PpoSettings, "evaluate": EvaluateSettings, "score": ScoreSettings}[kind]
    common = {"stage": kind, "model": {"base": "base"}, "output": "out"}
    if kind != "score":
        common |= {"prompts": {"train": "prompts.jsonl"}}
    if kind == "evaluate":
        common |= {
            "policies": {"a": None, "b": None},
            "compare": [["a", "b"]],
            "rewards": [{"use": f"{folder}/own.py:any"}],
        }
    return cls(**common | values)


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(
        "import functools\n"
        "def right(completions, solution, **kw): pass\n"
        "def bare(completions, solution): pass\n"
        "def worlds(completions, environments, **kw): pass\n"
        "def state(completions, trainer_state, log_metric, log_extra): pass\n"
        "def any(prompts, completions, answer=None, *, solution='x', **kw): pass\n"
        "part = functools.partial(right, solution='x')\n"
        "class Right:\n    def __call__(self, completions, solution, **kw): pass\n"
        "called, method = Right(), Right().__call__\n"
        "def by_place(prompts, completions, /): pass\n"
        "async def yields(completions, **kw):\n    yield 1.0\n"
    )
    return tmp_path


OF_EVALUATE = " of evaluate"
ROWS = [Prompt(PROMPT, {"answer": "1", "solutions": ["2"]}, "p:1"), Prompt(PROMPT, {"answer": None}, "p:2")]


@pytest.mark.parametrize("name", ["right", "bare", "called", "method", "worlds"])
@pytest.mark.parametrize("place", ["rewards[0]", f"rewards[0]{OF_EVALUATE}", "beside.x", "pairwise_judge", "judge"])
def test_an_argument_that_no_row_has_is_refused(name, place, own):
    use = {"use": f"{own}/own.py:{name}"}
    settings = {
        "rewards[0]": lambda: stage("ppo", own, rewards=[use]),
        f"rewards[0]{OF_EVALUATE}": lambda: stage("evaluate", own, rewards=[use]),
        "beside.x": lambda: stage("evaluate", own, beside={"x": use}),
        "pairwise_judge": lambda: stage("evaluate", own, pairwise_judge=use),
        "judge": lambda: stage("score", own, candidates="c", judge=use),
    }[place]()
    argument = "environments" if name == "worlds" else "solution"
    hint = "did you mean `solutions`" if argument == "solution" else "they have: answer, solutions"
    where = f"to `{place}.arguments`" if place in ("pairwise_judge", "judge") else "beside `use:`"
    with pytest.raises(BadInput) as caught:
        check_columns(settings, ROWS)
    says = str(caught.value)
    assert (
        says.startswith(
            f"`{place.removesuffix(OF_EVALUATE)}`: `{name}` needs the argument `{argument}`; add `{argument}:` {where}"
        )
        and hint in says
    )


@pytest.mark.parametrize("name, given", [("any", {}), ("part", {}), ("state", {}), ("right", {"solution": "x"})])
def test_what_has_a_default_or_is_supplied_is_no_column(name, given, own):
    settings = stage("ppo", own, rewards=[{"use": f"{own}/own.py:{name}"} | given])
    check_reward(settings.rewards[0], "rewards[0]")
    assert check_columns(settings, ROWS) == []


def test_a_column_that_some_rows_have_is_said_and_none_for_the_others(own, mine):
    rows = [Prompt(PROMPT, {"solution": "1"}, "p:1"), Prompt(PROMPT, {}, "p:2"), Prompt(PROMPT, {}, "p:3")]
    settings = stage("ppo", own, rewards=[{"use": f"{own}/own.py:right"}, {"use": "learned", "from": "x"}])
    assert check_columns(settings, rows) == ["2 of 3 prompts have no `solution`: `right` is given None"]
    mix = mine("def f(completions, solution):\n    return [0.0 if s is None else 1.0 for s in solution]\n")
    assert mix(Answers(rows, [[1]] * 3, ["a"] * 3, [[3]] * 3))[0] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "name, says",
    [
        ("by_place", "takes `prompts` by position only"),
        ("yields", "yields its scores asynchronously; let it return a list"),
        ("Right", "is not a function"),
    ],
)
def test_what_is_no_reward_is_refused(name, says, own):
    with pytest.raises(BadInput, match=says):
        check_reward(Reward(use=f"{own}/own.py:{name}"), "rewards[0]")
