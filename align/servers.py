"""Asks a server over HTTP: whole responses within a time limit, tries with waits between, many requests at once.

A key goes into a request's header and nowhere else. Every wait has an end, and is cut short where `beat` says so. Used
by the judge behind a server and by vLLM as a sampler.
"""

import asyncio
import ipaddress
import math
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
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

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time; a server may ask for more
LONGEST_ASKED = 600.0  # seconds: of what a server asks for, so that none stops a run for ever
LONGEST_TRYING = 3600.0  # seconds for one question, with all its tries and waits
BEAT = 0.5  # seconds between two looks at signals, and at what other processes say
PASSING = (408, 409, 425, 429)  # statuses that may be another at the next try; so may all from 500 on

Beat = Callable[[], None]  # called while one waits; what it raises ends the wait
T = TypeVar("T")


class Checked(BaseModel):
    """What a server or a file says: numbers that are some, and in their bounds."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


Schema = TypeVar("Schema", bound=Checked)


def read_as(schema: type[Schema], text: str | bytes) -> Schema:
    """JSON as a schema has it. ValueError: with the first thing that is wrong, in a few words."""
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


@dataclass(frozen=True)
class Response:
    """A server's, whole."""

    status: int
    text: str
    headers: httpx.Headers

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def may_pass(self) -> bool:
        """Whether the next try may have another status."""
        return self.status in PASSING or self.status >= 500


class Again(Exception):
    """A request that failed and may succeed later; `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class Endpoint:
    """A server, asked by one process. `timeout`: seconds of one request, from its first byte to the last of its
    response, which has at most `most_bytes`; `key`: the recipe's section that names it, for what is said of it.

    Raises:
        BadInput: the environment names a proxy or a certificate that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        timeout: float,
        max_retries: int,
        most_bytes: int,
        api_key: str | None,
        longest_wait: float = LONGEST_WAIT,
    ):
        self.url, self.key, self.timeout, self.max_retries = url, key, timeout, max_retries
        self._most_bytes, self._api_key, self._longest_wait = most_bytes, api_key, longest_wait
        self.client()  # what cannot be is refused before any work

    def client(self) -> httpx.AsyncClient:
        """Proxies and certificates are the environment's, but this machine is reached without a proxy; no redirect is
        followed, which would carry the key to wherever the server likes."""
        host = urlsplit(self.url).hostname or ""
        direct: dict[str, Any] = {f"all://{f'[{host}]' if ':' in host else host}": None} if _is_here(host) else {}
        try:
            # `send` bounds the whole; nothing packed is asked for, for its size would show only when it is unpacked
            return httpx.AsyncClient(
                timeout=self.timeout,
                mounts=direct,
                limits=httpx.Limits(),  # as many at once as whoever asks has on the way
                follow_redirects=False,
                headers={"User-Agent": "align", "Accept": "application/json", "Accept-Encoding": "identity"},
            )
        except (ValueError, OSError, ImportError, httpx.InvalidURL) as error:
            cure = "correct its proxy variables or SSL_CERT_FILE, or name the server in NO_PROXY"
            raise BadInput(
                f"`{self.key}`: the environment names a proxy or a certificate that cannot be used "
                f"({self.clean(one_line(error))}); {cure}"
            ) from None  # a proxy's address may hold a password

    async def send(
        self, client: httpx.AsyncClient, body: dict[str, Any] | None, path: str = "", *, timeout: float | None = None
    ) -> Response:
        """The response to a POST of `body` (None: a GET), whole, in `timeout` seconds: of a server too that sends a
        byte now and then.

        Raises:
            Again: there is none.
        """
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        seconds = timeout or self.timeout
        how: dict[str, Any] = {"headers": headers, "timeout": seconds} | ({} if body is None else {"json": body})
        try:
            async with (
                asyncio.timeout(seconds),
                client.stream("GET" if body is None else "POST", self.url + path, **how) as response,
            ):
                raw = bytearray()
                async for part in response.aiter_raw():
                    raw += part
                    if len(raw) > self._most_bytes:
                        raise Again(f"its response is longer than {self._most_bytes >> 20} MiB")
                return Response(response.status_code, raw.decode("utf-8", "replace"), response.headers)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Again(f"timed out: no whole response in {seconds:g} s") from error
        except (OSError, ValueError, httpx.HTTPError, httpx.StreamError) as error:  # not there, or cut off
            raise Again(self.clean(_reason(error))) from error

    async def tried(self, ask: Callable[[], Awaitable[T]], who: str, cure: str) -> T:
        """What `ask()` gives at the first of `max_retries` + 1 tries that does not raise Again.

        Raises:
            RunFailed: "`who` failed so many times: why; `cure`".
        """
        tries = AsyncRetrying(
            retry=retry_if_exception_type(Again),
            stop=stop_after_attempt(self.max_retries + 1) | stop_before_delay(LONGEST_TRYING),
            wait=partial(_wait, longest=self._longest_wait),
        )
        try:
            return await tries(ask)
        except RetryError as error:
            last = error.last_attempt
            raise RunFailed(f"{who} failed {last.attempt_number} times: {last.exception()}; {cure}") from None

    def said(self, response: Response) -> str:
        return f"HTTP {response.status}: {self.clean(response.text)}"

    def again(self, response: Response) -> Again:
        """Of a response whose status may pass."""
        return Again(self.said(response), retry_after(response.headers.get("Retry-After")))

    def target_of(self, response: Response) -> str:
        """Where a redirect leads, without what a password would be in."""
        target = urlsplit(urljoin(self.url, response.headers.get("Location", "")))
        return self.clean(f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path}")

    def clean(self, text: str) -> str:
        """What a server says, on one line and without the key, should it repeat it."""
        return one_line(safe(text if self._api_key is None else text.replace(self._api_key, "***")))


async def all_of(work: Sequence[Awaitable[Any]], beat: Beat = lambda: None) -> None:
    """Everything at once, `beat` every half second, in a thread of its own, so that nothing waits for it; what fails
    first, or `beat` raises, ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=BEAT, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            await asyncio.to_thread(beat)
    finally:  # one failed, or the run is to stop: the others need not wait for their next try
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_url(url: str, key: str, *, example: str, secret: str = "") -> None:
    """Raises BadInput, with the recipe's `key`: this is no address, or more than one. `secret`: where a key belongs."""
    cure = f"write it as in {example}"
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise BadInput(f"`{key}` is no address ({one_line(error)}); {cure}") from error
    if parts.username or parts.password or parts.query or parts.fragment:  # not shown: it may hold a key
        raise BadInput(f"`{key}` holds more than an address; {cure}{secret}")
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in url):
        raise BadInput(f"`{key}`: {url} is no http or https address; {cure}")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadInput(f"`{key}`: {url} is no address ({one_line(error)}); {cure}") from error


def api_key_of(name: str | None, key: str) -> str | None:
    """A server's key, which no message may show, from the environment variable of that name. `key`: the recipe's, that
    names it.

    Raises:
        BadInput: it is not set, or holds none.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise BadInput(f"`{key}`: the environment variable {name} is not set; export it with the server's key")
    if not (value.isascii() and value.isprintable()):
        raise BadInput(f"`{key}`: the environment variable {name} holds characters that no key has; set it again")
    return value


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


def _wait(state: RetryCallState, *, longest: float) -> float:
    """Seconds until the next try: not all questions at the same moment; and not by the run's own random numbers."""
    asked = getattr(state.outcome and state.outcome.exception(), "wait", 0.0)
    chosen = wait_exponential(multiplier=FIRST_WAIT, max=longest)(state)
    return max(asked, chosen * random.SystemRandom().uniform(0.5, 1.0))


def _reason(error: BaseException) -> str:
    """Why a request failed, in the words of what failed first."""
    while (cause := error.__cause__ or error.__context__) is not None and not isinstance(cause, ExceptionGroup):
        error = cause
    if isinstance(cause, ExceptionGroup):  # an address of the server's each
        error = cause.exceptions[0]
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number is not None and number > 0 else str(error) or type(error).__name__


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
