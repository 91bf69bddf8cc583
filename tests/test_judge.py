"""The machine's verdict on two answers: a model's against plain transformers, a reward's. (A server's: test_judge_server.py.)"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import BadInput
from align.models.roles import Bases
from align.rewards.judge import Question, build_judge, check_judge, combined, letter_ids
from align.settings import JudgeSettings, Model
from tests import tiny

ASKED = ({"role": "user", "content": "please give me a red cup"},)
LONGER = (*ASKED, {"role": "assistant", "content": "bad"}, {"role": "user", "content": "please"})
QUESTIONS = [
    Question(ASKED, "a red cup thanks", "bad blue"),
    Question(ASKED, "bad", "a red red red red hat thanks please"),
    Question(LONGER, "the lamp", "the cup"),
    Question("give me the lamp", "the lamp", "good good good"),
    Question(ASKED, "a red cup thanks", "the lamp"),
]
SWAPPED = [Question(q.prompt, q.b, q.a, q.columns) for q in QUESTIONS]
TEMPLATE = "{{ prompt }} please {{ a }} the {{ b }} A B"  # words that the tiny model knows
PLAIN = "please A or B : "


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """The tiny model with A and B among its words, and a question in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WORDS", [*tiny.WORDS, "A", "B", "User:", "Assistant:"])
        folder = tiny.make_base(tmp_path_factory.mktemp("lettered"), seed=2)
    (folder / "question.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def bases(lettered):
    return Bases(Model(base=str(lettered)), torch.device("cpu"))


@pytest.fixture(scope="module")
def settings(lettered):
    return JudgeSettings(question=str(lettered / "question.jinja"))


def same(one, other):
    return all(
        a.probability == pytest.approx(b.probability, abs=1e-6) and a.is_flipped == b.is_flipped
        for a, b in zip(one, other, strict=True)
    )


def mirrored(one, other):
    """Whether the second verdicts are the first with a and b exchanged."""
    return all(
        a.probability == pytest.approx(1.0 - b.probability, abs=1e-6) and a.is_flipped == b.is_flipped
        for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------- a model


def read(prompt):
    """How the judge is shown a prompt, written down a second time."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join({"user": "User: ", "assistant": "Assistant: "}[m["role"]] + m["content"] for m in prompt)


def slowly(folder, question):
    """P(the first is better) with a first, and with b first: one pass each in float64, nothing of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    first = []
    for a, b in ((question.a, question.b), (question.b, question.a)):
        text = f"<s> <user> {read(question.prompt)} please {a} the {b} A B <end> <assistant>"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        letters = logits[[tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]]
        first.append(float(letters.softmax(0)[0]))
    return first


def test_a_model_is_asked_in_both_orders(lettered, bases, settings):
    verdicts = build_judge(settings, bases, cache=None)(QUESTIONS)
    flips = set()
    for question, verdict in zip(QUESTIONS, verdicts, strict=True):
        a_first, b_first = slowly(lettered, question)
        assert verdict.probability == pytest.approx((a_first + 1.0 - b_first) / 2.0, abs=1e-5)
        assert verdict.is_flipped == ((a_first > 0.5) == (b_first > 0.5))
        flips.add(verdict.is_flipped)
    assert len({round(v.probability, 3) for v in verdicts}) == len(verdicts)  # it does look at the answers
    assert flips == {True, False}  # both kinds were seen


def test_exchanging_the_answers_mirrors_the_verdict(bases, settings):
    judge = build_judge(settings, bases, cache=None)
    assert mirrored(judge(QUESTIONS), judge(SWAPPED))


def test_the_batch_changes_nothing(bases, settings, monkeypatch):
    judge = build_judge(settings, bases, cache=None)
    together = judge(QUESTIONS)
    alone = [judge([question])[0] for question in QUESTIONS]
    monkeypatch.setattr("align.models.budget.reading_tokens", lambda model, asked: 50)
    narrow = build_judge(settings, bases, cache=None)(QUESTIONS)
    assert same(together, alone) and same(together, narrow)
    assert judge([]) == []


def test_another_model_judges_in_its_own_words_and_its_tokens_count(base, lettered, bases, settings):
    there = Bases(Model(base=str(base)), torch.device("cpu"))
    judge = build_judge(
        settings.model_copy(update={"model": str(lettered), "cost_per_million_tokens": 2.0}), there, cache=None
    )
    assert same(judge(QUESTIONS[:2]), build_judge(settings, bases, cache=None)(QUESTIONS[:2]))
    count = sum(
        len(f"<s> <user> {read(q.prompt)} please {q.a} the {q.b} A B <end> <assistant>".split()) for q in QUESTIONS[:2]
    )
    assert judge.tokens == 2 * count and judge.cost == pytest.approx(4e-6 * count)


def test_ours_is_the_question_where_none_is_given(bases):
    judge = build_judge(JudgeSettings(), bases, cache=None)
    verdict = judge([Question("a", "red", "blue")])[0]
    assert 0.0 < verdict.probability < 1.0


def test_a_model_that_cannot_tell_the_letters_apart_is_refused(base):
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    with pytest.raises(BadInput, match="^`pairwise_judge`: the model's tokenizer makes A and B the same token"):
        build_judge(JudgeSettings(), bases, cache=None, key="pairwise_judge")


def test_a_question_that_the_model_cannot_hold_is_refused(bases, settings):
    with pytest.raises(BadInput, match="^`pairwise_judge`: a question has .* tokens, and the model takes 128"):
        build_judge(settings, bases, cache=None, key="pairwise_judge")([Question(ASKED, "red " * 200, "blue")])


def test_letters_follow_the_text_or_what_the_template_opens_answers_with(bases):
    tokenizer = AutoTokenizer.from_pretrained(bases.settings.base)
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    thinking = tiny.TEMPLATE.replace(
        "m['content'] + ' <end>'", "('good ' if m['role'] == 'assistant' else '') + m['content'] + ' <end>'"
    )
    tokenizer.chat_template = thinking  # every answer opens with a word of the template's own, as Qwen3's with <think>
    ids, letters = letter_ids(tokenizer, "please")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<user>", "please", "<end>", "<assistant>", "good"]
    assert letters == (a, b)
    tokenizer.chat_template = None
    for text in ("please give", "please give\n"):
        assert letter_ids(tokenizer, text) == (tokenizer(text)["input_ids"], (a, b))


def test_orders_that_contradict_each_other_are_unsure():
    for a_first, b_first, probability, is_flipped in (
        (0.9, 0.2, 0.85, False),
        (0.9, 0.8, 0.55, True),
        (0.1, 0.3, 0.4, True),
        (1.0, 0.0, 1.0, False),
        (0.5, 1.0, 0.25, False),
        (0.5, 0.5, 0.5, False),
    ):
        verdict = combined(a_first, b_first)
        assert verdict.probability == pytest.approx(probability) and verdict.is_flipped is is_flipped


# ---------------------------------------------------------------------------------------------------------- a function


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def colour(prompts, completions, completion_ids, colour, factor=1.0, **kw):\n"
        "    assert all(len(p) == 1 for p in prompts) and all(ids[-1] == 3 for ids in completion_ids)\n"
        "    return [factor * c[0]['content'].split().count(x) for c, x in zip(completions, colour)]\n"
        "def one(completions, **kw):\n    return [1.0 if 'red' in str(c) else None for c in completions]\n"
        "def length(completions, per):\n    return [len(c) / per for c in completions]\n"
    )
    return path


def test_a_reward_is_a_judge(own, base):
    bases = Bases(Model(base=str(base)), torch.device("cpu"))
    questions = [
        Question(ASKED, "red red red", "red", {"colour": "red"}),
        Question(list(ASKED), "blue", "blue cup", {"colour": "blue"}),
    ]
    chosen = JudgeSettings(use=f"{own}:colour", scale=2.0, arguments={"factor": 3.0})
    judge = build_judge(chosen, bases, cache=None)
    verdicts = judge(questions)
    assert verdicts[0].probability == pytest.approx(1.0 / (1.0 + math.exp(-3.0))) and verdicts[1].probability == 0.5
    assert not any(v.is_flipped for v in verdicts) and judge([]) == [] and judge.tokens == 0
    swapped = judge([Question(q.prompt, q.b, q.a, q.columns) for q in questions])
    assert mirrored(verdicts, swapped)
    unsure = build_judge(JudgeSettings(use=f"{own}:one"), bases, cache=None)
    assert unsure([Question("give me", "red", "blue")])[0].probability == 0.5  # it says nothing of the other
    sharp = build_judge(JudgeSettings(use=f"{own}:length", scale=1e-6, arguments={"per": 1}), bases, cache=None)
    assert [v.probability for v in sharp([Question("a", "red", "a"), Question("a", "a", "red")])] == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- at the door

SERVER = {"use": "server", "url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use": "modle"}, "`judge.use: modle` is none of .*did you mean `model`"),
        ({"scale": 2.0}, "`judge.scale` has no meaning with `use: model`"),
        ({"url": "http://x/v1"}, "`judge.url` has no meaning"),
        ({"model": "no/such/folder"}, "`judge.model`: no/such/folder is neither a folder nor a Hub id"),
        ({"model": "no/such/folder"}, "; name a folder that save_pretrained wrote$"),
        ({"model": "{folder}"}, "holds neither a model nor an adapter"),
        ({"question": "{folder}/askk.jinja"}, "`judge.question`: .* cannot be read; did you mean `.*ask.jinja`"),
        ({"question": "{folder}/latin.jinja"}, "cannot be read"),
        ({"question": "{folder}/open.jinja"}, "open.jinja:2: not Jinja"),
        ({"question": "{folder}/half.jinja"}, "does not show {{ b }}"),
        ({"question": "{folder}/other.jinja"}, "asks for `prompts`, which is not there; did you mean `prompt`"),
        ({"question": "{folder}/unsafe.jinja"}, "cannot be rendered: .*unsafe"),
        ({"question": "{folder}/broken.jinja"}, "cannot be rendered"),
        (SERVER | {"url": "ftp://host/v1"}, "`judge.url`: ftp://host/v1 is no http or https address"),
        (SERVER | {"url": "127.0.0.1:8000"}, "is no http or https address"),
        (SERVER | {"url": "http://host:port/v1"}, "`judge.url` is no address"),
        (SERVER | {"url": "https://me:sk-secret@host/v1"}, "`judge.url` holds more than an address"),
        (SERVER | {"url": "https://host/v1?key=sk-secret"}, "`judge.url` holds more than an address"),
        (SERVER | {"api_key_env": "NO_SUCH_KEY"}, "`judge.api_key_env`: .*NO_SUCH_KEY is not set"),
        (SERVER | {"api_key_env": "BAD_KEY"}, "BAD_KEY holds characters that no key has"),
        (SERVER | {"arguments": {"x": 1}}, "`judge.arguments` has no meaning with `use: server`"),
        ({"use": "{own}:nothing"}, "`judge`: .*has no `nothing`"),
        ({"use": "{own}:length", "arguments": {"per": 1, "pre": 2}}, "takes no argument `pre`; did you mean `per`"),
        ({"use": "{own}:length", "arguments": {"weight": 2}}, "`judge.arguments.weight` is no argument"),
        ({"use": "{own}:length", "arguments": {"per": 1}, "question": "q.jinja"}, "`judge.question` has no meaning"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_the_door(values, message, own, tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_KEY", "sk-secret\né")
    files = {
        "ask": TEMPLATE,
        "open": "{{ prompt }}\n{{ a",
        "half": "{{ prompt }} {{ a }}",
        "other": TEMPLATE + "{{ prompts }}",
        "unsafe": TEMPLATE + "{{ a.__class__.__mro__ }}",
        "broken": TEMPLATE + "{{ a + 1 }}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jinja").write_text(text)
    (tmp_path / "latin.jinja").write_bytes(b"{{ prompt }} \xe9 {{ a }} {{ b }}")
    filled = {
        key: value.replace("{folder}", str(tmp_path)).replace("{own}", str(own)) if isinstance(value, str) else value
        for key, value in values.items()
    }
    with pytest.raises(BadInput, match=message) as caught:
        check_judge(JudgeSettings(**filled), "judge")
    assert "sk-secret" not in str(caught.value)


def test_what_can_be_passes_the_door(own, lettered, settings, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    check_judge(JudgeSettings(), "judge")
    check_judge(settings.model_copy(update={"model": str(lettered)}), "judge")
    check_judge(JudgeSettings(model="owner-that-is-no-folder/name"), "judge")
    check_judge(JudgeSettings(**SERVER, api_key_env="JUDGE_KEY", timeout=5.0), "judge")
    check_judge(JudgeSettings(use=f"{own}:length", arguments={"per": 2}, scale=3.0), "judge")
