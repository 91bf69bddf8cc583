"""The labelling page without a browser: who gets in, what is refused, what the page never learns."""

import csv
import io
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the labelling page's extra is not installed")
pytest.importorskip("nh3", reason="the labelling page's extra is not installed")
pytest.importorskip("httpx2", reason="starlette's test client needs httpx2")

from starlette.testclient import TestClient

from align.errors import BadInput
from align.feedback.page import command
from align.feedback.page.rendering import conversation, rendered
from align.feedback.page.security import BODY_LIMIT, Buckets, Seal
from align.feedback.page.server import create_app
from align.feedback.queue import Queue, shown_order
from align.feedback.store import Store

AT = "http://127.0.0.1:8765"
SECRETS = {  # what a store knows of a pair and the page must not
    "score": 0.123457,
    "policy": "policy-xyzzy",
    "pairing": "best_worst",
    "reason": "uncertainty",
    "column": "column-xyzzy",
}


def make_store(path, count=6, *, answers=None, asked=None, **columns):
    """A store with pairs for people; the texts name their pair and their canonical side."""
    store = Store(path, create=True)
    asked = asked or [f"question {i}" for i in range(count)]
    prompts = store.add_prompts([(question, {"gold": SECRETS["column"]}) for question in asked], "train")
    texts = answers or [(f"first {i}", f"second {i}") for i in range(count)]
    draws = [(prompt, draw, texts[i][draw]) for i, prompt in enumerate(prompts) for draw in (0, 1)]
    ids = store.add_candidates(7, SECRETS["policy"], {"temperature": 1.0}, draws)
    store.set_scores({key: [SECRETS["score"]] for key in ids})
    rows = [(prompt, ids[2 * i], ids[2 * i + 1], SECRETS["pairing"]) for i, prompt in enumerate(prompts)]
    pairs = store.add_comparisons(7, rows)
    routed = {"route": "human", "wanted": 1, "reason": SECRETS["reason"], "propensity": SECRETS["score"]} | columns
    store.set_comparisons({pair: {"position": i, **routed} for i, pair in enumerate(pairs)})
    return store


class Page:
    """A store, its page, and people who have signed in."""

    def __init__(self, folder, count=6, **settings):
        self.store = make_store(folder / "store.db", count, **settings.pop("store", {}))
        self.queue = Queue(self.store, **settings.pop("queue", {}))
        self.app = create_app(self.queue, **settings)
        self.clients = []

    @classmethod
    def of(cls, queue):
        """The page of a queue that is there."""
        made = cls.__new__(cls)
        made.store, made.queue, made.app, made.clients = queue.store, queue, create_app(queue), []
        return made

    def client(self):
        client = TestClient(self.app, base_url=AT, headers={"Origin": AT}, raise_server_exceptions=False)
        self.clients.append(client)
        return client

    def person(self, name, *, is_admin=False):
        client = self.client()
        client.token = self.queue.invite(name, is_admin=is_admin)
        assert client.post("/api/enter", json={"token": client.token}).status_code == 200
        found = re.search(r'name="csrf" content="([0-9a-f]+)"', client.get("/").text)
        client.headers["X-CSRF-Token"] = found[1]
        client.id = next(person.id for person in self.store.annotators() if person.name == name)
        return client


@pytest.fixture
def page(tmp_path):
    made = Page(tmp_path)
    yield made
    close(made)


def close(made):
    for client in made.clients:
        client.close()
    made.store.close()


def items(client):
    return client.post("/api/next", json={}).json()["items"]


def answer(client, item, choice="tie", key="key-12345", **more):
    return client.post("/api/submit", json={"item": item["id"], "key": key, "choice": choice, **more})


def error_of(response, status):
    assert response.status_code == status, response.text
    sentence = response.json()["error"]
    assert sentence[0].isupper() and sentence.endswith((".", ")")) and "Traceback" not in sentence
    assert "content-security-policy" in response.headers
    return sentence


# ------------------------------------------------------------------------------------------------------------ signing in


def test_a_link_is_exchanged_once_for_a_cookie_that_scripts_and_other_sites_cannot_use(page):
    token = page.queue.invite("ann")
    client = page.client()
    response = client.post("/api/enter", json={"token": token})
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie and "Secure" not in cookie
    assert token not in cookie and response.json() == {}
    assert client.get("/").status_code == 200
    assert error_of(page.client().post("/api/enter", json={"token": token}), 401).startswith("This link has been used")
    fresh = Page.client(page)
    fresh.cookies.set("align-8765", token)  # a link's token is no session, spent or not
    assert fresh.get("/").status_code == 401
    fresh.cookies.set("align-8765", page.queue.invite("bob"))
    assert fresh.get("/").status_code == 401


def test_two_browsers_that_open_one_link_at_once_do_not_both_get_in(page):
    token, barrier = page.queue.invite("ann"), threading.Barrier(4)

    def enter(client):
        barrier.wait()
        return client.post("/api/enter", json={"token": token}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(enter, [page.client() for _ in range(4)])) == [200, 401, 401, 401]


def test_behind_tls_the_cookie_is_for_tls_only(page):
    with TestClient(page.app, base_url="https://localhost", headers={"Origin": "https://localhost"}) as client:
        response = client.post("/api/enter", json={"token": page.queue.invite("ann")})
        assert "Secure" in response.headers["set-cookie"]


def test_a_restart_signs_nobody_out_and_a_new_link_does(page):
    client = page.person("ann")
    item = items(client)[0]
    client.app = create_app(page.queue)
    again = TestClient(client.app, base_url=AT, headers=client.headers, cookies=client.cookies)
    assert again.post("/api/next", json={}).json()["items"][0] == item  # names of pairs last as well
    page.queue.invite("ann")
    assert "not signed in" in error_of(again.post("/api/next", json={}), 401)
    again.close()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_only_the_pages_own_host_origin_session_and_csrf_token_will_do(page):
    client = page.person("ann")
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example@127.0.0.1", "127.0.0.1 evil", ""):
        error_of(client.get("/", headers={"Host": host}), 421)
        error_of(client.post("/api/next", json={}, headers={"Host": host}), 421)
    assert client.get("/", headers={"Host": "localhost:9000"}).status_code == 401  # a cookie for each port
    for origin in ("http://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1:8765", AT + ".evil.example"):
        error_of(client.post("/api/next", json={}, headers={"Origin": origin}), 403)
    error_of(client.post("/api/next", json={}, headers={"Sec-Fetch-Site": "cross-site"}), 403)
    error_of(client.post("/api/next", json={}, headers={"X-CSRF-Token": "0" * 64}), 403)
    other = page.person("bob")
    error_of(client.post("/api/next", json={}, headers={"X-CSRF-Token": other.headers["X-CSRF-Token"]}), 403)
    del client.headers["Origin"]
    error_of(client.post("/api/next", json={}), 403)
    assert client.post("/api/next", json={}, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    stranger = page.client()
    for path in ("/api/next", "/api/submit", "/api/undo", "/api/heartbeat"):
        error_of(stranger.post(path, json={}), 401)
    assert stranger.get("/").status_code == stranger.get("/admin").status_code == 401
    assert stranger.get("/admin/labels.csv").status_code == 401


def test_large_bodies_are_refused_whatever_their_headers_say(page):
    client = page.person("ann")
    error_of(client.post("/api/next", content=b"x" * (BODY_LIMIT + 1)), 413)
    pieces = (b"x" * 1024 for _ in range(BODY_LIMIT // 1024 + 1))
    error_of(client.post("/api/next", content=pieces), 413)
    assert client.post("/api/next", content=(b for b in (b"{", b"}"))).status_code in (200, 422)


def test_haste_is_refused_by_person_and_by_address(tmp_path):
    page = Page(tmp_path, people=Buckets(5, 0.0), doors=Buckets(3, 0.0))
    ann, bob = page.person("ann"), page.person("bob")  # each has asked for the page once
    assert [ann.post("/api/next", json={}).status_code for _ in range(5)] == [200] * 4 + [429]
    assert error_of(ann.post("/api/next", json={}), 429) and bob.post("/api/next", json={}).status_code == 200
    client = page.client()
    assert error_of(client.post("/api/enter", json={"token": "x"}), 401)
    assert error_of(client.post("/api/enter", json={"token": page.queue.invite("eve")}), 429)
    close(page)


def test_a_bucket_fills_again_and_forgets_who_is_full():
    moment = 0.0
    bucket = Buckets(2, 1.0, clock=lambda: moment)
    assert [bucket.take("a") for _ in range(3)] == [True, True, False]
    moment = 1.0
    assert [bucket.take("a") for _ in range(2)] == [True, False]
    for i in range(5000):
        bucket.take(i)
    moment = 100.0
    for i in range(4000):
        bucket.take(f"later {i}")
    assert len(bucket._left) <= 4000


def test_what_the_page_does_not_send_is_one_sentence(page):
    client = page.person("ann")
    item = items(client)[0]
    for body in (
        {"item": item["id"], "key": "key-12345", "choice": "a"},  # canonical sides are not the page's to say
        {"item": item["id"], "key": "key-12345", "choice": "tie", "order": "ba"},
        {"item": item["id"], "key": "short", "choice": "tie"},
        {"item": item["id"], "key": "key-12345", "choice": "tie", "seconds": -1},
        {"item": item["id"], "key": "key-12345", "choice": "tie", "comment": "x" * 4001},
        [],
    ):
        assert "\n" not in error_of(client.post("/api/submit", json=body), 422)
    error_of(client.post("/api/submit", content=b"{", headers={"Content-Type": "application/json"}), 422)
    for name in ("0" * 50, item["id"][:-1] + ("0" if item["id"][-1] != "0" else "1"), "é", ""):
        error_of(answer(client, {"id": name}), 409)
    bob = page.person("bob")
    error_of(answer(bob, item), 409)  # names of pairs are each person's own
    assert client.get("/openapi.json").status_code == client.get("/docs").status_code == 404
    assert client.get("/static/../server.py").status_code == 404
    assert client.put("/api/next").status_code == 405
    page.queue.next = None  # something is broken
    assert error_of(client.post("/api/next", json={}), 500) == "The server has failed at this; try again."
    assert page.store.labels() == []


# ------------------------------------------------------------------------------------------------------------ labelling


def test_sides_become_canonical_whatever_is_on_the_left(tmp_path):
    page = Page(tmp_path, 12)
    client, seen = page.person("ann"), set()
    for i in range(12):
        hand = items(client)
        assert len(hand) == min(2, 12 - i)
        shown = {side: hand[0][side]["raw"] for side in ("left", "right")}
        choice = ("left", "right")[i % 2]
        assert answer(client, hand[0], choice, f"key-{i:08}", strength=2, seconds=1.5).status_code == 200
        label = page.store.labels()[-1]
        assert label.outcome == {"first": "a", "second": "b"}[shown[choice].split()[0]]
        assert label.shown_order == shown_order(label.comparison_id, client.id, False)
        assert (label.strength, label.seconds, label.source) == (2, 1.5, "human")
        seen.add(label.shown_order)
    assert seen == {"ab", "ba"} and items(client) == []
    close(page)


def test_one_request_saves_and_gives_the_next(page):
    client = page.person("ann")
    hand = items(client)
    assert items(client) == hand  # a reload resumes
    said = answer(client, hand[0], strength=3, comment=" a\0b ").json()
    assert said["items"][0] == hand[1] and len(said["items"]) == 2
    assert said["progress"] == {"mine": 1, "done": 1, "wanted": 6}
    label = page.store.labels()[0]
    assert label.comment == "ab" and label.strength is None  # a tie has no strength


def test_sent_twice_it_is_one_label(page):
    client = page.person("ann")
    item = items(client)[0]
    assert answer(client, item).json() == answer(client, item).json()
    assert len(page.store.labels()) == 1


def test_undo_appends_and_brings_the_pair_back(page):
    client = page.person("ann")
    item = items(client)[0]
    answer(client, item)
    for _ in range(2):  # sent twice
        said = client.post("/api/undo", json={"key": "undo-12345"}).json()
        assert said["item"] == item and said["progress"]["done"] == 0
    assert page.store.labels() == []
    answer(client, item, "skip", "key-67890")
    assert [label.outcome for label in page.store.labels()] == ["skip"]
    bob = page.person("bob")
    assert bob.post("/api/undo", json={"key": "undo-67890"}).json()["item"] is None


def test_two_people_never_hold_one_pair_and_a_lease_that_ran_out_is_anothers(tmp_path):
    page = Page(tmp_path, 4, queue={"lease_seconds": 0.0})
    ann, bob = page.person("ann"), page.person("bob")
    page.queue.lease_seconds = 60.0
    first = items(ann)
    assert not {i["left"]["raw"] for i in first} & {i["left"]["raw"] for i in items(bob)}
    assert items(page.person("eve")) == []
    names = [item["id"] for item in first]
    assert ann.post("/api/heartbeat", json={"items": names}).json() == {"held": names}
    page.queue.lease_seconds = -1.0
    ann.post("/api/heartbeat", json={"items": names})  # runs out at once
    assert ann.post("/api/heartbeat", json={"items": names}).json() == {"held": []}
    page.queue.lease_seconds = 60.0
    eve = page.person("eve")
    assert len(items(eve)) == 2
    assert "somebody else" in error_of(answer(ann, first[0]), 409)
    close(page)


# ------------------------------------------------------------------------------------------------------------ blindness


def test_the_page_learns_nothing_of_a_pair_but_its_texts(tmp_path):
    page = Page(tmp_path, 3, store={"reasked": True}, queue={"reask_after": 1}, guidelines="# Be *fair*")
    client, said, names = page.person("ann"), [], []
    said.append(client.get("/").text)
    assert "<h3>Be <em>fair</em></h3>" in said[0]
    while (response := client.post("/api/next", json={})).json()["items"]:
        item = response.json()["items"][0]
        assert set(item) == {"id", "prompt", "left", "right"} and set(item["left"]) == {"html", "raw"}
        names.append(item["id"])
        said += [response.text, answer(client, item, key=f"key-{len(names):08}").text]
    assert sum(label.is_reask for label in page.store.labels()) == len(names) - 3 >= 2
    assert len(set(names)) == len(names)  # a pair asked again looks like any other
    assert len({len(name) for name in names}) == 1
    words = [str(word) for word in SECRETS.values()] + ["_id", "round", "margin", "judge", "reask", "position"]
    for text in said:
        assert not [word for word in words if word in text]
    close(page)


def test_sealed_names_open_for_their_person_only():
    seal = Seal("key")
    names = {seal.close(person, pair, again) for person in (1, 2) for pair in (1, 2**40) for again in (False, True)}
    assert len(names) == 8
    name = seal.close(1, 5, True)
    assert seal.open(1, name) == (5, True)
    assert seal.open(2, name) is None and Seal("other").open(1, name) is None and seal.open(1, name.upper()) is None


def test_hidden_characters_are_shown_rendered_and_raw():
    both = rendered("a\u202eb\u200b\u200b &#x2066;\U000e0041\u3164 fine é 漢 \U0001f600\ttab\x1b[0m")
    for view in both.values():
        for mark in ("U+202E", "U+200B×2", "U+E0041", "U+3164", "U+001B"):
            assert f"<mark>{mark}</mark>" in view
        assert "fine é 漢 \U0001f600\ttab" in view
    assert "<mark>U+2066</mark>" in both["html"] and "&amp;#x2066;" in both["raw"]
    assert rendered("\ud800x")["raw"] == "\N{REPLACEMENT CHARACTER}x"


def test_markdown_has_no_way_out():
    text = "[a](http://e.example 't') ![i](http://e.example/i.png) <b onclick=x>b</b> <http://auto.example>"
    html = rendered(text)["html"]
    assert not re.search(r"<(?!/?(p|u|code)>)", html)
    assert "<u>a</u> (<code>http://e.example</code>)" in html and "&lt;b onclick=x&gt;" in html
    assert rendered("[r]: http://e.example\n")["html"] == "<p>[r]: http://e.example</p>\n"  # nothing goes unseen
    assert rendered("3. three\n\n```sh\nls\n```")["html"].count("<") == 8


def test_conversations_of_all_shapes():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    shown = conversation([{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    assert [message["role"] for message in shown] == ["system", "user"] and shown[1]["raw"] == "one\n\ntwo"
    assert conversation("hello")[0]["role"] == "user"


# ------------------------------------------------------------------------------------------------------- administrators


def test_the_overview_and_the_exports_are_for_administrators(tmp_path):
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"]
    page = Page(tmp_path, 6, store={"answers": [(text, 'fine, "x"\nline') for text in formulas], "wanted": 2})
    ann, boss = page.person("ann"), page.person("boss", is_admin=True)
    assert boss.get("/admin").status_code == 200
    for i in range(6):
        for client, choice in ((ann, "left"), (boss, "tie" if i else "skip")):
            said = {"seconds": 2.0 + i, "comment": "=cmd" if i else None}
            answer(client, items(client)[0], choice, f"key-{client.id}-{i:06}", **said)
    for path in ("/admin", "/admin/labels.csv", "/admin/labels.jsonl"):
        assert ann.get(path).status_code == 403
    overview = boss.get("/admin").text
    assert "12 of 12 labels" in overview and "4.5" in overview and "100.0 %" in overview and "16.7 %" in overview
    assert "over 5 pairs" in overview and "<td>nan" not in overview
    rows = [json.loads(line) for line in boss.get("/admin/labels.jsonl").text.splitlines()]
    assert len(rows) == 12 and {row["a"] for row in rows} == set(formulas)
    assert {row["annotator"] for row in rows} == {"ann", "boss"} and rows[0]["prompt"] == "question 0"
    response = boss.get("/admin/labels.csv")
    assert "attachment" in response.headers["content-disposition"]
    cells = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert {row["a"] for row in cells} == {f"'{text}" for text in formulas}
    assert {row["b"] for row in cells} == {'fine, "x"\nline'}
    assert {row["comment"] for row in cells} == {"", "'=cmd"}
    assert boss.get("/admin/labels.exe").status_code == 422
    close(page)


def test_an_overview_of_nothing_is_a_page_too(page):
    boss = page.person("boss", is_admin=True)
    assert "Nobody has labelled yet" in boss.get("/admin").text
    assert boss.get("/admin/labels.csv").text == boss.get("/admin/labels.jsonl").text == ""


# ---------------------------------------------------------------------------------------------------- the command line


def refused(*arguments):
    settings = {"host": "127.0.0.1", "port": 0, "add": [], "admin": [], "guidelines": None, "allow_hosts": []}
    with pytest.raises(BadInput) as caught:
        command.label(arguments[0], **settings | {"lease_seconds": 120.0, "echo": print} | arguments[1])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_refuses_with_a_cure(tmp_path):
    assert "store.db is not there" in refused(str(tmp_path), {})
    assert "other.db is not there" in refused(str(tmp_path / "other.db"), {})
    make_store(tmp_path / "store.db").close()
    run = str(tmp_path)
    assert "--add NAME" in refused(run, {"host": "192.0.2.1"})
    assert "--allow-host NAME" in refused(run, {"host": "0.0.0.0", "add": ["ann"]})
    assert "correct --guidelines" in refused(run, {"guidelines": str(tmp_path / "none.md")})
    assert "cannot listen on 192.0.2.1" in refused(run, {"host": "192.0.2.1", "add": ["ann"]})
    assert "--lease-seconds" in refused(run, {"lease_seconds": 1.0})
    with command.listen("127.0.0.1", 0) as taken:
        assert "--port" in refused(run, {"port": taken.getsockname()[1], "add": ["ann"]})
    store = Store(tmp_path / "store.db")
    assert store.annotators() == []  # a refusal invites nobody
    store.close()


def test_without_the_extra_the_cure_is_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "align.feedback.page.server", None)
    assert "pip install 'align-rlhf[label]'" in refused(str(tmp_path), {})


def test_names_of_hosts():
    assert command.hosts_of("127.0.0.1", ["me.example"]) == ("127.0.0.1", "localhost", "::1", "me.example")
    assert command.hosts_of("192.0.2.1", []) == ("192.0.2.1",)
    assert command.hosts_of("0.0.0.0", ["lab.example"]) == ("lab.example",)


def test_the_command_line_says_it_in_one_line_with_code_2(tmp_path):
    words = [sys.executable, "-m", "align.cli", "label", str(tmp_path), "--host", "0.0.0.0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--allow-host" in done.stderr


def told(monkeypatch, run, **settings):
    """What `align label` says before it serves."""
    monkeypatch.setattr("align.feedback.page.server.serve", lambda app, listener: None)
    settings = {
        "host": "127.0.0.1",
        "port": 0,
        "add": [],
        "admin": [],
        "guidelines": None,
        "allow_hosts": [],
    } | settings
    lines = []
    command.label(str(run), **settings, lease_seconds=120.0, echo=lines.append)
    return lines


def test_a_restart_says_how_to_come_in_again_and_tells_no_link_twice(tmp_path, monkeypatch):
    run = tmp_path / "a loop"
    run.mkdir()
    make_store(run / "store.db").close()
    first = told(monkeypatch, run)
    assert len(first) == 2 and re.match(r"local: http://127.0.0.1:\d+/enter#[\w-]{43}$", first[0])
    again = told(monkeypatch, run)
    assert again[1] == f"  align label '{run}' --admin local" and "stays so" in again[0]
    assert not any("#" in line for line in again) and "--add NAME" in again[2]
    more = told(monkeypatch, run, add=["bob", "carl", "d\x1b[31m"])
    assert more[1] == again[1] and sum("/enter#" in line for line in more) == 3
    assert told(monkeypatch, run)[1] == f"  align label '{run}' --admin local --add bob --add carl ... (1 more)"
    last = told(monkeypatch, run, add=["bob", "carl"], admin=["local"])
    assert last[1] == f"  align label '{run}' --add 'd?[31m'"
    (run / "store.db").rename(tmp_path / "other.db")
    elsewhere = told(monkeypatch, run, store_at=str(tmp_path / "other.db"), admin=["local"])
    assert elsewhere[1].startswith(f"  align label '{run}' --store {tmp_path}/other.db --add bob")
    for line in (*first, *more, *last):  # the command as it was told works, and makes another link
        assert line.count("/enter#") == ("http" in line and "labelling" not in line)


def test_a_text_that_was_damaged_is_shown_to_nobody(page):
    ada = page.person("Ada")
    assert items(ada)
    with page.store.connection(writes=True) as connection:
        connection.exec_driver_sql("UPDATE candidates SET text = 'Second 0' WHERE text = 'second 0'")
    response = ada.post("/api/next", json={})
    error_of(response, 500)
    assert "damaged" in response.json()["error"] and "Retry-After" not in response.headers
