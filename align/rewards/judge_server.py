"""A judge behind an OpenAI-compatible server: its letter, or better its log-probabilities of the two letters.

What was answered is kept in a JSONL file, so that a run that goes on asks (and pays for) nothing twice. The key goes
into the request's header and nowhere else. Every wait has an end, and is cut short where the run is asked to stop.
"""

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
)

from align.errors import BadInput, RunFailed
from align.wording import one_line, safe

CONCURRENT = 8  # requests at a time
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time; a server may ask for more
LONGEST_ASKED = 600.0  # seconds: of what a server asks for, so that none stops a run for ever
LONGEST_TRYING = 3600.0  # seconds for one question, with all its tries and waits
BEAT = 0.5  # seconds between two looks at signals, and at what other processes say
MAX_TOKENS = 16  # of a reply: a letter, or a few words around it
TOP = 20  # log-probabilities of each position, as many as OpenAI gives
MAX_BYTES = 1 << 22  # of a response
MOST_TOKENS = 10**8  # that a server may count for one question
ENOUGH = 20  # replies of which at least one must name a letter
PASSING = (408, 409, 425, 429)  # statuses that may be another at the next try; so may all from 500 on
DECORATION = " \t\r\n*_`'\"()[].:#\u2581\u0120\u010a"  # around a letter; the last: spaces, as tokenizers spell them
OPENING = re.compile(r"[\W_]*([AB])(?:[\W_]*$|[\W_]*\n|[).:*\]\"])")  # the letter, and perhaps reasons after it
ALONE = re.compile(r"(?<![A-Za-z0-9])([AB])(?![A-Za-z0-9])")

Beat = Callable[[], None]  # called while one waits; what it raises ends the wait
Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Logprob = Annotated[float, Field(le=1e-3)]  # 0 at the most, but for what float16 rounds


class _Checked(BaseModel):
    """What a server or a file says: numbers that are some, and in their bounds."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class Top(_Checked):
    """A token that might have stood there, and its log-probability."""

    token: str
    logprob: Logprob


class Position(Top):
    """A token of a reply; the likeliest that might have stood there, where the server lists them."""

    top_logprobs: Annotated[tuple[Top, ...] | None, Field(max_length=1000)] = None


class _Message(_Checked):
    content: str | None = None


class _Logprobs(_Checked):
    content: tuple[Position, ...] | None = None


class _Choice(_Checked):
    message: _Message
    logprobs: _Logprobs | None = None


class _Usage(_Checked):
    total_tokens: Count | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None

    @property
    def tokens(self) -> int:
        return self.total_tokens or (self.prompt_tokens or 0) + (self.completion_tokens or 0)


class _Completion(_Checked):
    """OpenAI's chat completion, as far as it is read."""

    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]
    usage: _Usage | None = None


class _Line(_Checked):
    """A line of the cache. `check`: of the others (`_checksum`); lines of earlier versions have none."""

    model_config = ConfigDict(extra="forbid")

    key: str
    probability: Annotated[float, Field(ge=0.0, le=1.0)]
    tokens: Count
    check: str | None = None


_Schema = TypeVar("_Schema", bound=_Checked)


@dataclass(frozen=True)
class Reply:
    """P(A), and the tokens that the question and its answer took."""

    probability: float
    tokens: int


@dataclass(frozen=True)
class _Response:
    status: int
    text: str
    headers: httpx.Headers


class _Again(Exception):
    """A request that failed and may succeed later; `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class Server:
    """Asks the model of that name behind `url`.

    One that rejects log-probabilities is asked for its letter alone from then on. `timeout`: seconds of one request,
    from its first byte to the last of its response.
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
        self._api_key, self._name = api_key, key
        self._client()  # so that a proxy or a certificate that cannot be is refused before any work
        self._cache = Cache(cache)
        self._has_logprobs = True
        self._counted: set[str] = set()
        self._names_letters = False

    def ask(self, texts: list[str], beat: Beat = lambda: None) -> tuple[list[float], int]:
        """P(A) of each question, and the tokens of those that were not asked for before; equal questions run once.

        `beat` is called every half second; what it raises ends all waits at once, and what is answered is kept.

        Raises:
            BadInput: the server refuses the key, the model or the request.
            RunFailed: it fails again and again; what it has answered is kept.
        """
        keys = [self._key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache.replies}
        if missing:
            asyncio.run(self._answer_all(missing, beat))
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

    def _client(self) -> httpx.AsyncClient:
        """Proxies and certificates are the environment's, but this machine is reached without a proxy; no redirect is
        followed, which would carry the key to wherever the server likes."""
        host = urlsplit(self.endpoint).hostname or ""
        direct: dict[str, Any] = {f"all://{f'[{host}]' if ':' in host else host}": None} if _is_here(host) else {}
        try:
            # _post bounds the whole; nothing packed is asked for, for its size would show only when it is unpacked
            return httpx.AsyncClient(
                timeout=self.timeout,
                mounts=direct,
                follow_redirects=False,
                headers={"User-Agent": "align", "Accept": "application/json", "Accept-Encoding": "identity"},
            )
        except (ValueError, OSError, ImportError, httpx.InvalidURL) as error:
            cure = "correct its proxy variables or SSL_CERT_FILE, or name the server in NO_PROXY"
            raise BadInput(
                f"`{self._name}`: the environment names a proxy or a certificate that cannot be used "
                f"({self._clean(one_line(error))}); {cure}"
            ) from None  # a proxy's address may hold a password

    async def _answer_all(self, missing: dict[str, str], beat: Beat) -> None:
        free = asyncio.Semaphore(CONCURRENT)
        async with self._client() as client:
            tasks = [asyncio.create_task(self._answer(client, key, text, free)) for key, text in missing.items()]
            waiting = set(tasks)
            try:
                while waiting:
                    done, waiting = await asyncio.wait(waiting, timeout=BEAT, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    beat()
            finally:  # one failed, or the run is to stop: the others need not wait for their next try
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, client: httpx.AsyncClient, key: str, text: str, free: asyncio.Semaphore) -> None:
        """Asks until there is an answer, and keeps it."""
        tries = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(self.max_retries + 1) | stop_before_delay(LONGEST_TRYING),
            wait=_wait,
        )
        async with free:
            try:
                self._cache.add(key, await tries(self._asked_once, client, text))
            except RetryError as error:
                last = error.last_attempt
                raise RunFailed(
                    f"the judge's server {self.endpoint} failed {last.attempt_number} times: {last.exception()}; see "
                    "to it and run again: what it has answered is kept"
                ) from None

    async def _asked_once(self, client: httpx.AsyncClient, text: str) -> Reply:
        with_logprobs = self._has_logprobs
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(text),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if with_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        response = await self._post(client, body)
        status, said = response.status, f"HTTP {response.status}: {self._clean(response.text)}"
        if 200 <= status < 300:
            try:
                return reply_of(response.text)
            except ValueError as error:  # a proxy's page, or an error in the place of an answer
                text = self._clean(response.text) or "nothing"
                raise _Again(f"its response holds no answer ({self._clean(str(error))}): {text}") from error
        if status in PASSING or status >= 500:
            raise _Again(said, retry_after(response.headers.get("Retry-After")))
        if with_logprobs and status in (400, 422) and "logprob" in response.text:
            self._has_logprobs = False
            return await self._asked_once(client, text)
        raise BadInput(self._refusal(response, said))

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> _Response:
        """The response, whole, in `timeout` seconds: of a server too that sends a byte now and then."""
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        try:
            async with (
                asyncio.timeout(self.timeout),
                client.stream("POST", self.endpoint, json=body, headers=headers) as response,
            ):
                raw = b""
                async for part in response.aiter_raw():
                    raw += part
                    if len(raw) > MAX_BYTES:
                        raise _Again(f"its response is longer than {MAX_BYTES >> 20} MiB")
                return _Response(response.status_code, raw.decode("utf-8", "replace"), response.headers)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Again(f"timed out: no whole response in {self.timeout:g} s") from error
        except (OSError, ValueError, httpx.HTTPError, httpx.StreamError) as error:  # not there, or cut off
            raise _Again(self._clean(_reason(error))) from error

    def _refusal(self, response: _Response, said: str) -> str:
        status = response.status
        if 300 <= status < 400:
            target = urlsplit(urljoin(self.endpoint, response.headers.get("Location", "")))
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

    A line that a kill has torn, or a disk damaged, is passed over with a word: what it held is asked again. Without a
    path they are kept in memory alone.
    """

    def __init__(self, path: Path | None):
        self.path, self.replies = path, dict[str, Reply]()
        self._before = b""
        if path is None or not path.is_file():
            return
        raw = path.read_bytes()
        self._before = b"" if raw.endswith(b"\n") or not raw else b"\n"  # so that the next line is one of its own
        damaged = []
        for number, line in enumerate(raw.split(b"\n"), 1):
            try:
                if line.strip():
                    self._take(line)
            except ValueError:
                damaged.append(number)
        if damaged:
            which = ", ".join(map(str, damaged[:3])) + (", ..." if damaged[3:] else "")
            many = "a line is" if len(damaged) == 1 else f"{len(damaged)} lines are"
            print(f"note: {path}: {many} damaged (line {which}); what it held is asked again", flush=True)

    def _take(self, line: bytes) -> None:
        """Raises ValueError: it is no line of a cache."""
        row = _read(_Line, line)
        reply = Reply(row.probability, row.tokens)
        if row.check not in (None, _checksum(row.key, reply)):
            raise ValueError("its checksum is another")
        self.replies[row.key] = reply

    def add(self, key: str, reply: Reply) -> None:
        """Keeps a reply, on the disk before it returns: it may have cost money."""
        line = {"key": key, "probability": reply.probability, "tokens": reply.tokens, "check": _checksum(key, reply)}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(self._before + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._before = b""
        self.replies[key] = reply


def reply_of(response: str) -> Reply:
    """What a chat completion says. ValueError: it is none, or its numbers cannot be."""
    completion = _read(_Completion, response)
    choice = completion.choices[0]
    positions = (choice.logprobs and choice.logprobs.content) or ()
    tokens = completion.usage.tokens if completion.usage else 0
    return Reply(probability_of(choice.message.content or "", positions), tokens)


def probability_of(text: str, positions: Sequence[Position]) -> float:
    """P(A) over P(A) + P(B) where the reply names its letter; 1 or 0 by the letter alone, 1/2 where there is none.

    `positions`: OpenAI's logprobs.content, empty where a server has none. A letter that is not among the listed
    tokens counts as 0.
    """
    letter = letter_in(text)
    if letter is None:
        return 0.5
    for position in positions:
        if _bare(position.token) != letter:
            continue
        listed = {top.token: top.logprob for top in position.top_logprobs or ()}
        listed.setdefault(position.token, position.logprob)
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
    """Seconds that a Retry-After header asks to wait, LONGEST_ASKED at the most; it holds seconds or a date."""
    try:
        asked = float(value or 0.0)
    except ValueError:
        asked = _seconds_until(str(value))
    return min(max(asked, 0.0), LONGEST_ASKED) if not math.isnan(asked) else 0.0


def _seconds_until(date: str) -> float:
    try:
        when = parsedate_to_datetime(date)
        return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):  # of what is no date
        return 0.0


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: not all questions at the same moment; and not by the run's own random numbers."""
    asked = getattr(state.outcome and state.outcome.exception(), "wait", 0.0)
    chosen = wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)(state)
    return max(asked, chosen * random.SystemRandom().uniform(0.5, 1.0))


def _read(schema: type[_Schema], text: str | bytes) -> _Schema:
    """ValueError: with the first thing that is wrong, in a few words."""
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def _reason(error: BaseException) -> str:
    """Why a request failed, in the words of what failed first."""
    while (cause := error.__cause__ or error.__context__) is not None and not isinstance(cause, ExceptionGroup):
        error = cause
    if isinstance(cause, ExceptionGroup):  # an address of the server's each
        error = cause.exceptions[0]
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number is not None and number > 0 else str(error) or type(error).__name__


def _checksum(key: str, reply: Reply) -> str:
    return f"{zlib.crc32(f'{key} {reply.probability!r} {reply.tokens}'.encode()):08x}"


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bare(token: str) -> str:
    return token.strip(DECORATION)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
