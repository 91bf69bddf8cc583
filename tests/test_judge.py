"""The machine's verdict on two answers: a model's against plain transformers, a server's over a real socket, a reward's."""

import json
import math
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import BadInput, RunFailed
from align.models.roles import Bases
from align.rewards import judge_server
from align.rewards.judge import Question, build_judge, check_judge, combined, letter_ids
from align.rewards.judge_server import Cache, Reply, letter_in, probability_of, retry_after
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


# ------------------------------------------------------------------------------------------------------------ a server


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            number = len(self.server.seen)
        status, payload, headers = self.server.respond(body, number)
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@contextmanager
def serving(respond):
    """A server on this machine that answers with `respond(body, number of the request)`: status, payload, headers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.lock, server.respond = [], threading.Lock(), respond
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge_server, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def says(text, top=None):
    """A chat completion of 10 tokens, with log-probabilities of its one token where `top` gives them."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        listed = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}}, {}


def shows_first(body, text):
    """Whether `text` is the answer that this request shows first."""
    content = body["messages"][0]["content"].partition("[Answer A]")[2]
    return content.index(text) < content.index("[Answer B]")


def server_settings(server, **changes):
    return JudgeSettings(**({"use": "server", "url": server.url, "model": "m", "max_retries": 2} | changes))


def ask(server, questions, cache=None, **changes):
    judge = build_judge(server_settings(server, **changes), None, cache=cache)
    return judge(questions), judge


def test_a_server_says_how_sure_it_is(tmp_path):
    def respond(body, number):
        is_first = shows_first(body, "a red cup")
        return says("A", {"A": 0.6, " A": 0.2, "B": 0.1, "the": 0.05}) if is_first else says("B", {"B": 0.7, "A": 0.3})

    question = Question(ASKED, "a red cup", "bad blue")
    with serving(respond) as server:
        verdicts, judge = ask(server, [question], cost_per_million_tokens=3.0)
        assert verdicts[0].probability == pytest.approx((0.8 / 0.9 + 0.7) / 2.0) and not verdicts[0].is_flipped
        assert judge.tokens == 20 and judge.cost == pytest.approx(6e-5)
        swapped, _ = ask(server, [Question(ASKED, "bad blue", "a red cup")])
        assert mirrored(verdicts, swapped)
        path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "m" and body["temperature"] == 0 and body["logprobs"] is True
    assert "please give me a red cup" in body["messages"][0]["content"]


def test_a_server_without_logprobs_is_taken_at_its_letter():
    def respond(body, number):
        if "logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported"}}, {}
        return says("**A**" if shows_first(body, "a red cup") else "the second, I think")

    with serving(respond) as server:
        verdicts, _ = ask(server, [Question(ASKED, "a red cup", "bad blue")])
    assert verdicts[0].probability == (1.0 + 0.5) / 2.0 and not verdicts[0].is_flipped


def test_whoever_is_shown_first_wins_is_flipped():
    with serving(lambda body, number: says("A")) as server:
        verdicts, _ = ask(server, QUESTIONS)
    assert all(v.probability == 0.5 and v.is_flipped for v in verdicts)


def test_letters_in_replies():
    cases = {
        "A": "A", " B\n": "B", "**B**": "B", "(A)": "A", "A. Answer B is rude.": "A", "Answer B": "B", "B\n\nA is rude": "B",
        "The better answer is A": "A", "A is better than B": None, "neither": None, "": None, "Bad": None, "AB": None,
    }  # fmt: skip
    assert {text: letter_in(text) for text in cases} == cases
    unlisted = [{"token": "▁B", "logprob": math.log(0.9), "top_logprobs": []}]
    assert probability_of("B", unlisted) == 0.0 and probability_of("B", []) == 0.0
    later = [
        {"token": "Answer", "logprob": 0.0},
        {"token": " B", "logprob": math.log(0.6), "top_logprobs": [{"token": " A", "logprob": math.log(0.2)}]},
    ]
    assert probability_of("Answer B", later) == pytest.approx(0.25)


def test_a_server_that_never_names_a_letter_is_no_judge(monkeypatch):
    monkeypatch.setattr(judge_server, "ENOUGH", 4)
    with (
        serving(lambda body, number: says(None)) as server,
        pytest.raises(RunFailed, match="none of 4 replies of m names"),
    ):
        ask(server, QUESTIONS[:2])


def test_a_busy_server_is_asked_again():
    failures = {
        1: (429, {"error": "slow down"}, {"Retry-After": "0.3"}),
        2: (503, b"<html>down</html>", {}),
        3: (200, b"not json", {}),
        4: (200, {"error": {"message": "overloaded"}}, {}),
    }
    with serving(lambda body, number: failures.get(number) or says("A")) as server:
        start = datetime.now(UTC)
        verdicts, judge = ask(server, QUESTIONS[:1], max_retries=4)
        assert (datetime.now(UTC) - start).total_seconds() >= 0.3  # as long as the server asked for
        assert len(server.seen) == 2 + len(failures)
    assert verdicts[0].is_flipped and judge.tokens == 20


def test_what_a_server_may_ask_to_wait():
    assert retry_after(None) == 0.0 and retry_after("7") == 7.0 and retry_after("soon") == 0.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50.0 < retry_after(later) <= 60.0


def test_a_server_that_stays_down_ends_the_run_with_a_reason(tmp_path):
    with serving(lambda body, number: (500, {"error": "out of memory"}, {})) as server:
        with pytest.raises(RunFailed, match=r"failed 3 times: HTTP 500: .*out of memory.*run again"):
            ask(server, QUESTIONS)
        url = server.url
    with pytest.raises(RunFailed, match="failed 1 times: .*refused"):
        build_judge(JudgeSettings(use="server", url=url, model="m", max_retries=0), None, cache=None)(QUESTIONS[:1])
    slow = threading.Event()
    with serving(lambda body, number: slow.wait(5) or says("A")) as server:
        with pytest.raises(RunFailed, match="timed out"):
            ask(server, QUESTIONS[:1], max_retries=0, timeout=0.1)
        slow.set()


@pytest.mark.parametrize(
    "status, message", [(401, "lets nobody in"), (404, "has no model m"), (400, "refuses the request")]
)
def test_what_asking_again_cannot_mend_is_refused_at_once(status, message, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    with serving(lambda body, number: (status, {"error": "wrong sk-secret-1\nx"}, {})) as server:
        with pytest.raises(BadInput, match=message) as caught:
            ask(server, QUESTIONS[:1], api_key_env="JUDGE_KEY")
        assert len(server.seen) <= 2  # of each question once
    assert "sk-secret" not in str(caught.value) and "***" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_asked_twice(tmp_path):
    cache = tmp_path / "stage" / "judge.jsonl"

    def respond(body, number):
        return says("A", {"A": 0.9, "B": 0.1})

    with serving(respond) as server:
        first, judge = ask(server, [*QUESTIONS, *QUESTIONS], cache)
        assert len(server.seen) == 2 * len(QUESTIONS) and judge.tokens == 10 * len(server.seen)
        again, resumed = ask(server, QUESTIONS, cache)
        assert len(server.seen) == 2 * len(QUESTIONS)
        assert again == first[: len(QUESTIONS)] and resumed.tokens == judge.tokens  # as of a run in one go
        resumed(QUESTIONS)
        assert resumed.tokens == judge.tokens
        ask(server, QUESTIONS[:1], cache, model="another")
        assert len(server.seen) == 2 * len(QUESTIONS) + 2
    assert len(cache.read_text().splitlines()) == len(server.seen)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_server, "CONCURRENT", 1)
    cache = tmp_path / "judge.jsonl"
    is_up = threading.Event()

    def respond(body, number):
        return says("A") if is_up.is_set() or number <= 4 else (500, {}, {})

    with serving(respond) as server:
        with pytest.raises(RunFailed):
            ask(server, QUESTIONS, cache, max_retries=0)
        assert len(cache.read_text().splitlines()) == 4
        with cache.open("ab") as file:
            file.write(b'{"key": "torn')  # a kill in the middle of a line
        is_up.set()
        asked = len(server.seen)
        verdicts, judge = ask(server, QUESTIONS, cache)
        assert len(server.seen) - asked == 6 and len(verdicts) == 5 and judge.tokens == 100
        ask(server, QUESTIONS, cache)
        assert len(server.seen) - asked == 6  # the line after the torn one is whole


def test_a_cache_passes_over_what_is_no_reply(tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text(
        '{"key": "a", "probability": NaN, "tokens": 1}\n[1]\n{"key": "b", "probability": 0.5, "tokens": 3}\n\n'
    )
    assert Cache(path).replies == {"b": Reply(0.5, 3)}


def test_the_key_is_in_the_header_and_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1\n")
    cache = tmp_path / "judge.jsonl"
    with serving(lambda body, number: says("A")) as server:
        ask(server, QUESTIONS, cache, api_key_env="JUDGE_KEY")
        for _, headers, body in server.seen:
            assert headers["Authorization"] == "Bearer sk-secret-1" and "sk-secret" not in json.dumps(body)
    assert "sk-secret" not in cache.read_text() + "".join(capsys.readouterr())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    with serving(lambda body, number: says("A")) as other:
        target = {"Location": f"{other.url}/elsewhere?key=1"}
        refused = pytest.raises(BadInput, match=f"`judge.url`: .* redirects to {other.url}/elsewhere, ")
        with serving(lambda body, number: (status, {}, target)) as server, refused:
            ask(server, QUESTIONS[:1], api_key_env="JUDGE_KEY")
        assert other.seen == []


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
