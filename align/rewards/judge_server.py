"""A judge behind an OpenAI-compatible server: its letter, or better its log-probabilities of the two letters.

What was answered is kept in a JSONL file, so that a run that goes on asks (and pays for) nothing twice. The key goes
into the request's header and nowhere else.
"""

import hashlib
import http.client
import json
import math
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from align.errors import BadInput, RunFailed
from align.wording import one_line, safe

CONCURRENT = 8  # requests at a time
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time; a server may ask for more
LONGEST_ASKED = 600.0  # seconds: of what a server asks for, so that none stops a run for ever
MAX_TOKENS = 16  # of a reply: a letter, or a few words around it
TOP = 20  # log-probabilities of each position, as many as OpenAI gives
MAX_BYTES = 1 << 22  # of a response
ENOUGH = 20  # replies of which at least one must name a letter
PASSING = (408, 409, 425, 429)  # statuses that may be another at the next try; so may all from 500 on
DECORATION = " \t\r\n*_`'\"()[].:#\u2581\u0120\u010a"  # around a letter; the last: spaces, as tokenizers spell them
OPENING = re.compile(r"[\W_]*([AB])(?:[\W_]*$|[\W_]*\n|[).:*\]\"])")  # the letter, and perhaps reasons after it
ALONE = re.compile(r"(?<![A-Za-z0-9])([AB])(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Reply:
    """P(A), and the tokens that the question and its answer took."""

    probability: float
    tokens: int


class _Again(Exception):
    """A request that failed and may succeed later; `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is refused: it would carry the key to wherever the server likes."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """Asks the model of that name behind `url`.

    One that rejects log-probabilities is asked for its letter alone from then on.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None,
        cache: Path | None,
        max_retries: int,
        timeout: float,
        key: str,
    ):
        self.endpoint = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.max_retries, self.timeout = model, max_retries, timeout
        self._api_key, self._cache, self._name = api_key, Cache(cache), key
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._has_logprobs = True
        self._counted: set[str] = set()
        self._names_letters = False

    def ask(self, texts: list[str]) -> tuple[list[float], int]:
        """P(A) of each question, and the tokens of those that were not asked for before; equal questions run once.

        Raises:
            BadInput: the server refuses the key, the model or the request.
            RunFailed: it fails again and again; what it has answered is kept.
        """
        keys = [self._key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache.replies}
        stop = threading.Event()
        pool = ThreadPoolExecutor(CONCURRENT)
        try:
            futures = [pool.submit(self._answer, key, text, stop) for key, text in missing.items()]
            for future in as_completed(futures):
                future.result()
        finally:  # one failed, or ctrl-C: the others need not wait for their next try
            stop.set()
            pool.shutdown(cancel_futures=True)
        new = set(keys) - self._counted
        self._counted |= new
        replies = self._cache.replies
        self._names_letters |= any(replies[key].probability != 0.5 for key in new)
        if len(self._counted) >= ENOUGH and not self._names_letters:
            raise RunFailed(
                f"`{self._name}`: none of {len(self._counted)} replies of {self.model} names A or B; it may think "
                f"before it answers (a reply has {MAX_TOKENS} tokens): name another model, or give a `question` that "
                "asks for one letter"
            )
        return [replies[key].probability for key in keys], sum(replies[key].tokens for key in new)

    def _key(self, text: str) -> str:
        asked = json.dumps([self.endpoint, self.model, _messages(text)])
        return hashlib.sha256(asked.encode()).hexdigest()

    def _answer(self, key: str, text: str, stop: threading.Event) -> None:
        """Asks until there is an answer, and keeps it."""
        wait, tries = FIRST_WAIT, 0
        while not stop.is_set():
            try:
                self._cache.add(key, self._asked_once(text))
                return
            except _Again as error:
                tries += 1
                if tries > self.max_retries:
                    raise RunFailed(
                        f"the judge's server {self.endpoint} failed {tries} times: {error}; see to it and run again: "
                        "what it has answered is kept"
                    ) from None
                # not all threads at the same moment; and not by the run's own random numbers
                chosen = wait * random.SystemRandom().uniform(0.5, 1.0)
                stop.wait(max(chosen, min(error.wait, LONGEST_ASKED)))
                wait = min(2.0 * wait, LONGEST_WAIT)

    def _asked_once(self, text: str) -> Reply:
        with_logprobs = self._has_logprobs
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(text),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if with_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        status, raw, headers = self._post(body)
        if 200 <= status < 300:
            try:
                return reply_of(json.loads(raw))
            except ValueError as error:  # a proxy's page, or an error in the place of an answer
                raise _Again(f"its response holds no answer: {self._clean(raw) or 'nothing'}") from error
        if status in PASSING or status >= 500:
            raise _Again(f"HTTP {status}: {self._clean(raw)}", retry_after(headers.get("Retry-After")))
        if with_logprobs and status in (400, 422) and "logprob" in raw:
            self._has_logprobs = False
            return self._asked_once(text)
        raise BadInput(self._refusal(status, raw, headers))

    def _post(self, body: dict[str, Any]) -> tuple[int, str, Mapping[str, str]]:
        """Status, text and headers of the response."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "align"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers, method="POST")
        try:
            try:
                response = self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:  # a response too
                response = error
            with response:
                return response.status, response.read(MAX_BYTES).decode("utf-8", "replace"), response.headers
        except (OSError, http.client.HTTPException, ValueError) as error:  # not there, cut off, or too slow
            reason = getattr(error, "reason", None) or error
            raise _Again(self._clean(str(reason)) or type(error).__name__) from error

    def _refusal(self, status: int, raw: str, headers: Mapping[str, str]) -> str:
        said = f"HTTP {status}: {self._clean(raw)}"
        if 300 <= status < 400:
            target = urlsplit(urljoin(self.endpoint, headers.get("Location", "")))
            where = self._clean(f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path}")
            cure = "no key is carried there; name the right one"
            return f"`{self._name}.url`: {self.endpoint} redirects to {where}, and {cure}"
        if status in (401, 403):
            variable = f"`{self._name}.api_key_env`"
            cure = f"set {variable}" if self._api_key is None else f"correct what {variable} names"
            return f"`{self._name}`: {self.endpoint} lets nobody in with this key; {cure} ({said})"
        if status == 404:
            cure = f"correct `{self._name}.url` or `{self._name}.model`"
            return f"`{self._name}`: {self.endpoint} is not there, or has no model {self.model}; {cure} ({said})"
        return f"`{self._name}`: {self.endpoint} refuses the request ({said})"

    def _clean(self, text: str) -> str:
        """What a server says, on one line and without the key, should it repeat it."""
        return one_line(safe(text if self._api_key is None else text.replace(self._api_key, "***")))


class Cache:
    """Replies by the hash of what was asked, each a line of a file that is only ever added to.

    A line that a kill has torn is passed over. Without a path they are kept in memory alone.
    """

    def __init__(self, path: Path | None):
        self.path, self.replies = path, dict[str, Reply]()
        self._lock, self._before = threading.Lock(), b""
        if path is None or not path.is_file():
            return
        raw = path.read_bytes()
        self._before = b"" if raw.endswith(b"\n") or not raw else b"\n"  # so that the next line is one of its own
        for line in raw.splitlines():
            try:
                row = json.loads(line)
                reply = Reply(float(row["probability"]), int(row["tokens"]))
                if 0.0 <= reply.probability <= 1.0:
                    self.replies[str(row["key"])] = reply
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, reply: Reply) -> None:
        """Keeps a reply, on the disk before it returns: it may have cost money."""
        line = json.dumps({"key": key, "probability": reply.probability, "tokens": reply.tokens})
        with self._lock:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(self._before + line.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                self._before = b""
            self.replies[key] = reply


def reply_of(response: Any) -> Reply:
    """What a chat completion says. ValueError: it is none."""
    try:
        choice = response["choices"][0]
        text = choice["message"].get("content")
        positions = (choice.get("logprobs") or {}).get("content") or []
        usage = response.get("usage") or {}
        tokens = usage.get("total_tokens") or (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0)
        return Reply(probability_of(text if isinstance(text, str) else "", positions), int(tokens))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("no chat completion") from error


def probability_of(text: str, positions: list[dict[str, Any]]) -> float:
    """P(A) over P(A) + P(B) where the reply names its letter; 1 or 0 by the letter alone, 1/2 where there is none.

    `positions`: OpenAI's logprobs.content, empty where a server has none. A letter that is not among the listed
    tokens counts as 0.
    """
    letter = letter_in(text)
    if letter is None:
        return 0.5
    for position in positions:
        if _bare(position["token"]) != letter:
            continue
        listed = {str(top["token"]): float(top["logprob"]) for top in position.get("top_logprobs") or ()}
        listed.setdefault(str(position["token"]), float(position["logprob"]))
        a, b = (math.fsum(math.exp(x) for token, x in listed.items() if _bare(token) == side) for side in "AB")
        if a + b > 0.0:
            return a / (a + b)
    return 1.0 if letter == "A" else 0.0


def letter_in(text: str) -> str | None:
    """The letter that a reply opens with, or the only one that stands alone in it."""
    opening = OPENING.match(text)
    if opening is not None:
        return opening[1]
    found = set(ALONE.findall(text))
    return found.pop() if len(found) == 1 else None


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait; it holds seconds or a date."""
    if value is None:
        return 0.0
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _bare(token: str) -> str:
    return token.strip(DECORATION)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
