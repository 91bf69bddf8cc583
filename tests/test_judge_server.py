"""A judge behind a server, over a real socket: what it says, and all that it may do wrong."""

import http.client
import json
import math
import os
import random
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from align import servers
from align.errors import BadInput, RunFailed
from align.launch import run_stage
from align.launch_plan import plan
from align.replies import Replies
from align.resources import recipes_folder
from align.rewards import judge_server
from align.rewards.judge import Question, build_judge
from align.rewards.judge_server import Letter, Position, letter_in, probability_of
from align.settings import JudgeSettings

ROOT = Path(__file__).resolve().parents[1]
ASKED = ({"role": "user", "content": "please give me a red cup"},)
QUESTIONS = [Question(ASKED, f"a red cup, {number}", "bad blue") for number in range(5)]


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
    server.handle_error = lambda *request: None  # who has given up does not read the answer
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
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
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
        assert swapped[0].probability == pytest.approx(1.0 - verdicts[0].probability) and not swapped[0].is_flipped
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


def test_a_question_is_text_and_no_page():
    with serving(lambda body, number: says("A")) as server:
        ask(server, [Question(ASKED, "1 < 2 & <b>'so'</b>", 'a "cup"')])
    for _, _, body in server.seen:
        content = body["messages"][0]["content"]
        assert "1 < 2 & <b>'so'</b>" in content and 'a "cup"' in content


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
    unlisted = Position(token="▁B", logprob=math.log(0.9))
    assert probability_of("B", [unlisted]) == 0.0 and probability_of("B", []) == 0.0
    later = [
        {"token": "Answer", "logprob": 0.0},
        {"token": " B", "logprob": math.log(0.6), "top_logprobs": [{"token": " A", "logprob": math.log(0.2)}]},
    ]
    assert probability_of("Answer B", [Position.model_validate(each) for each in later]) == pytest.approx(0.25)


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
    asked = {None: 0.0, "7": 7.0, "soon": 0.0, "": 0.0, "-3": 0.0, "nan": 0.0, "inf": 600.0, "9" * 400: 600.0}
    assert {value: servers.retry_after(value) for value in asked} == asked
    assert servers.retry_after("Thu, 99 Jan 99999 00:00:00 GMT") == 0.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50.0 < servers.retry_after(later) <= 60.0


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


def test_a_damaged_line_of_the_cache_is_asked_again_with_a_word(tmp_path, capsys):
    path = tmp_path / "judge.jsonl"
    with serving(lambda body, number: says("A", {"A": 0.9, "B": 0.1})) as server:
        whole, judge = ask(server, QUESTIONS, path)
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == len(server.seen) == 10 and b'"probability": 0.9' in lines[0]
        lines[0] = lines[0].replace(b"0.9", b"0.8")  # a flipped bit: JSON still
        lines[3] = lines[3].replace(b'"tokens"', b'"tokenz"')
        lines[5] = lines[5].replace(b'"check"', b'"chack"')
        lines[7] = lines[7].replace(b"\n", b"*")  # two lines are one
        path.write_bytes(b"".join(lines))
        capsys.readouterr()
        again, resumed = ask(server, QUESTIONS, path)
        assert again == whole and resumed.tokens == judge.tokens == 100
        assert len(server.seen) == 10 + 5
    said = capsys.readouterr().out
    assert said == f"note: {path}: 4 lines are damaged (line 1, 4, 6, ...); what it held is asked again\n"


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "a", "probability": NaN, "tokens": 1}', '{"key": "a", "probability": 1.5, "tokens": 1}', "[1]", "null",
        '{"key": "a", "probability": 0.5, "tokens": -1}', '{"key": "a", "probability": 0.5, "tokens": 1e30}', "\\xff",
        '{"key": "a", "probability": 0.5, "tokens": 1, "more": 1}', '{"key": "a", "probability": 0.5}', "[" * 10_000,
    ],
)  # fmt: skip
def test_a_cache_takes_nothing_that_is_no_reply(line, tmp_path, capsys):
    path = tmp_path / "judge.jsonl"
    path.write_text(f'{line}\n{{"key": "b", "probability": 0.5, "tokens": 3}}\n\n')  # of an earlier version
    assert Replies(Letter, path).found == {"b": Letter(key="b", probability=0.5, tokens=3)}
    assert "a line is damaged (line 1)" in capsys.readouterr().out


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


# ------------------------------------------------------------------------------------------------ what a server may do


def with_top(**top):
    entry = {"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -0.1} | top]}
    return {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [entry]}}]}


@pytest.mark.parametrize(
    "payload, why",
    [
        (b'{"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 1e400}}', "usage.total_tokens"),
        ({"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": -1}}, "greater than or equal to 0"),
        ({"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": 10**12}}, "less than or equal to"),
        ({"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 1.5}}, "usage.total_tokens"),
        (with_top(logprob=0.5), "less than or equal to 0"),
        (json.dumps(with_top(logprob=float("nan"))).encode(), "finite number"),
        (json.dumps(with_top(logprob=float("-inf"))).encode(), "finite number"),
        (with_top(logprob=None), "valid number"),
        (with_top(token=7), "valid string"),
        ({"choices": []}, "choices"),
        ({"choices": "A"}, "choices"),
        ({"choices": [{"message": {"content": {"text": "A"}}}]}, "content"),
        ({"error": {"message": "overloaded sk-secret-1"}}, r"overloaded \*\*\*"),
        (b"[" * 100_000, "recursion"),
        (b"", "nothing"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
def test_numbers_that_cannot_be_are_no_answer(payload, why, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    cache = tmp_path / "judge.jsonl"
    refused = pytest.raises(RunFailed, match=f"failed 1 times: its response holds no answer.*{why}")
    with serving(lambda body, number: (200, payload, {})) as server, refused as caught:
        ask(server, QUESTIONS[:1], cache, max_retries=0, api_key_env="JUDGE_KEY")
    assert "sk-secret" not in str(caught.value) and len(str(caught.value)) < 700 and not cache.exists()


def test_what_float16_rounds_is_taken():
    with serving(lambda body, number: (200, with_top(logprob=1e-4), {})) as server:
        verdicts, _ = ask(server, QUESTIONS[:1])
    assert verdicts[0].probability == 0.5 and verdicts[0].is_flipped


@contextmanager
def speaking(speak):
    """A server that does `speak(connection)` with what asks it; the connection's own errors end that alone."""
    listener, threads = socket.create_server(("127.0.0.1", 0)), []

    def serve(connection):
        with connection, suppress(OSError):
            _read_whole_request(connection)
            speak(connection)

    def accept():
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join()


def _read_whole_request(connection):
    """What is left unread when a connection is closed resets it, and what was said before is lost."""
    with connection.makefile("rb") as file:
        headers = http.client.parse_headers(file) if file.readline() else {}
        file.read(int(headers.get("Content-Length", 0)))


def drips(start, piece=b"x"):
    def speak(connection):
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(0.02)

    return speak


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"


@pytest.mark.parametrize(
    "speak",
    [
        drips(HEAD + b"\r\n"),
        drips(HEAD + b"X-Slow: "),
        drips(b""),
        lambda connection: [*iter(lambda: connection.recv(65536), b"")],
    ],
    ids=["body", "header", "status line", "nothing"],
)
def test_a_request_is_bounded_as_a_whole(speak):
    with speaking(speak) as server:
        begun = time.monotonic()
        with pytest.raises(RunFailed, match=r"failed 2 times: timed out: no whole response in 0.3 s"):
            ask(server, QUESTIONS[:1], max_retries=1, timeout=0.3)
        assert time.monotonic() - begun < 2.0


@pytest.mark.parametrize(
    "speak, why",
    [
        (drips(HEAD.replace(b"100000", b"99999999") + b"\r\n", b"x" * 1_000_000), "longer than 4 MiB"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), "."),
        (lambda connection: connection.sendall(HEAD + b"\r\nhalf"), "without sending complete message"),
        (lambda connection: None, "without sending a response"),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 2_000_000 + b"\r\n\r\n"), "."),
    ],
)
def test_what_is_no_response_is_one_line(speak, why):
    with speaking(speak) as server, pytest.raises(RunFailed, match=f"failed 1 times: .*({why})") as caught:
        ask(server, QUESTIONS[:1], max_retries=0, timeout=10)
    assert len(str(caught.value)) < 500


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["asked to wait", "silent"])
def test_a_signal_ends_every_wait_at_once(kind, tmp_path):
    cache, begun = tmp_path / "judge.jsonl", time.monotonic()

    def beat():
        if time.monotonic() - begun > 0.3:
            raise Stop

    hung = threading.Event()

    def respond(body, number):
        if number <= 2:
            return says("A")
        if kind == "silent":
            hung.wait(10)
        return 429, {}, {"Retry-After": "500"}

    with serving(respond) as server:
        judge = build_judge(server_settings(server), None, cache=cache)
        with pytest.raises(Stop):
            judge(QUESTIONS, beat)
        assert time.monotonic() - begun < 2.0
        hung.set()
    assert len(cache.read_text().splitlines()) == 2  # what was answered is kept


def test_trying_has_an_end_that_no_server_can_move(monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_TRYING", 1.0)
    begun = time.monotonic()
    ended = pytest.raises(RunFailed, match="failed [23] times: HTTP 429")
    with serving(lambda body, number: (429, {}, {"Retry-After": "0.4"})) as server, ended:
        ask(server, QUESTIONS[:1], max_retries=10**6)
    assert time.monotonic() - begun < 2.0


def test_waiting_draws_none_of_the_runs_random_numbers():
    state = random.getstate()
    with serving(lambda body, number: says("A") if number > 3 else (503, {}, {})) as server:
        ask(server, QUESTIONS[:1], max_retries=5)
    assert random.getstate() == state


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_this_machine_is_reached_without_a_proxy(no_proxies, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    with serving(lambda body, number: says("A")) as server, serving(lambda body, number: says("A")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            ask(server, QUESTIONS[:1], api_key_env="JUDGE_KEY", url=url)
        assert len(server.seen) == 4 and proxy.seen == []
        ask(server, QUESTIONS[:1], url="http://judge.invalid/v1")
        assert len(proxy.seen) == 2  # others are


@pytest.mark.parametrize(
    "name, value", [("all_proxy", "gopher://me:sk-secret@host:1"), ("SSL_CERT_FILE", "/no/such/file")]
)
def test_an_environment_that_cannot_be_is_refused_before_any_work(name, value, no_proxies, monkeypatch):
    monkeypatch.setenv(name, value)
    chosen = JudgeSettings(use="server", url="https://judge.invalid/v1", model="m")
    with pytest.raises(
        BadInput, match="^`judge`: the environment names a proxy or a certificate that cannot"
    ) as caught:
        build_judge(chosen, None, cache=None)
    assert "sk-secret" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- several processes


def test_those_who_wait_for_the_one_that_judges_end_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def interrupt():
        end = time.monotonic() + 120
        while not (tmp_path / "1.pid").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGTERM)  # the one that waits

    thread = threading.Thread(target=interrupt)
    thread.start()
    launch = plan(str(recipes_folder() / "accelerate" / "ddp_cpu.yaml"))
    ended = run_stage(launch, [str(tmp_path)], tmp_path / "status", module="tests.helpers.slow_judge")
    thread.join()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ended.exit_code == 0 and told == [
        [[65, 14, [0, 1]], ["BadInput"], ["Stopped"]],
        [[0, None, [0, 1]], ["BadInput"], ["Stopped"]],
    ]
