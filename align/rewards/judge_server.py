"""A judge behind an OpenAI-compatible server: its letter, or better its log-probabilities of the two letters.

What was answered is kept in a JSONL file, so that a run that goes on asks (and pays for) nothing twice. The key goes
into the request's header and nowhere else. Every wait has an end, and is cut short where the run is asked to stop.
"""

import asyncio
import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import Field

from align.errors import BadInput, RunFailed
from align.replies import Replies, Reply
from align.servers import Again, Beat, Checked, Endpoint, Response, all_of, read_as

CONCURRENT = 8  # requests at a time
MAX_TOKENS = 16  # of a reply: a letter, or a few words around it
TOP = 20  # log-probabilities of each position, as many as OpenAI gives
MAX_BYTES = 1 << 22  # of a response
MOST_TOKENS = 10**8  # that a server may count for one question
ENOUGH = 20  # replies of which at least one must name a letter
DECORATION = " \t\r\n*_`'\"()[].:#\u2581\u0120\u010a"  # around a letter; the last: spaces, as tokenizers spell them
OPENING = re.compile(r"[\W_]*([AB])(?:[\W_]*$|[\W_]*\n|[).:*\]\"])")  # the letter, and perhaps reasons after it
ALONE = re.compile(r"(?<![A-Za-z0-9])([AB])(?![A-Za-z0-9])")

Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Logprob = Annotated[float, Field(le=1e-3)]  # 0 at the most, but for what float16 rounds


class Top(Checked):
    """A token that might have stood there, and its log-probability."""

    token: str
    logprob: Logprob


class Position(Top):
    """A token of a reply; the likeliest that might have stood there, where the server lists them."""

    top_logprobs: Annotated[tuple[Top, ...] | None, Field(max_length=1000)] = None


class _Message(Checked):
    content: str | None = None


class _Logprobs(Checked):
    content: tuple[Position, ...] | None = None


class _Choice(Checked):
    message: _Message
    logprobs: _Logprobs | None = None


class _Usage(Checked):
    total_tokens: Count | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None

    @property
    def tokens(self) -> int:
        return self.total_tokens or (self.prompt_tokens or 0) + (self.completion_tokens or 0)


class _Completion(Checked):
    """OpenAI's chat completion, as far as it is read."""

    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]
    usage: _Usage | None = None


class Letter(Reply):
    """P(A), and the tokens that the question and its answer took."""

    probability: Annotated[float, Field(ge=0.0, le=1.0)]
    tokens: Count

    def checksum(self) -> str:
        return f"{zlib.crc32(f'{self.key} {self.probability!r} {self.tokens}'.encode()):08x}"


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
        self.endpoint = Endpoint(
            url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions",
            key=key,
            timeout=timeout,
            max_retries=max_retries,
            most_bytes=MAX_BYTES,
            api_key=api_key,
        )
        self.model, self._has_key, self._name = model, api_key is not None, key
        self._cache = Replies(Letter, cache)
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
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache.found}
        if missing:
            asyncio.run(self._answer_all(missing, beat))
        new = set(keys) - self._counted
        self._counted |= new
        replies = self._cache.found
        self._names_letters |= any(replies[key].probability != 0.5 for key in new)
        if len(self._counted) >= ENOUGH and not self._names_letters:
            raise RunFailed(
                f"`{self._name}`: none of {len(self._counted)} replies of {self.model} names A or B; it may think "
                f"before it answers (a reply has {MAX_TOKENS} tokens): name another model, or give a `question` that "
                "asks for one letter"
            )
        return [replies[key].probability for key in keys], sum(replies[key].tokens for key in new)

    def _key(self, text: str) -> str:
        asked = json.dumps([self.endpoint.url, self.model, _messages(text)])
        return hashlib.sha256(asked.encode()).hexdigest()

    async def _answer_all(self, missing: dict[str, str], beat: Beat) -> None:
        free = asyncio.Semaphore(CONCURRENT)
        async with self.endpoint.client() as client:
            await all_of([self._answer(client, key, text, free) for key, text in missing.items()], beat)

    async def _answer(self, client: httpx.AsyncClient, key: str, text: str, free: asyncio.Semaphore) -> None:
        """Asks until there is an answer, and keeps it."""
        who, cure = f"the judge's server {self.endpoint.url}", "see to it and run again: what it has answered is kept"
        async with free:
            self._cache.add(await self.endpoint.tried(partial(self._asked_once, client, key, text), who, cure))

    async def _asked_once(self, client: httpx.AsyncClient, key: str, text: str) -> Letter:
        with_logprobs = self._has_logprobs
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(text),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if with_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        response = await self.endpoint.send(client, body)
        if response.is_good:
            try:
                return letter_of(key, response.text)
            except ValueError as error:  # a proxy's page, or an error in the place of an answer
                text = self.endpoint.clean(response.text) or "nothing"
                raise Again(f"its response holds no answer ({self.endpoint.clean(str(error))}): {text}") from error
        if response.may_pass:
            raise self.endpoint.again(response)
        if with_logprobs and response.status in (400, 422) and "logprob" in response.text:
            self._has_logprobs = False
            return await self._asked_once(client, key, text)
        raise BadInput(self._refusal(response))

    def _refusal(self, response: Response) -> str:
        status, url, said = response.status, self.endpoint.url, self.endpoint.said(response)
        if 300 <= status < 400:
            where = self.endpoint.target_of(response)
            return f"`{self._name}.url`: {url} redirects to {where}, and no key is carried there; name the right one"
        if status in (401, 403):
            variable = f"`{self._name}.api_key_env`"
            cure = f"correct what {variable} names" if self._has_key else f"set {variable}"
            return f"`{self._name}`: {url} lets nobody in with this key; {cure} ({said})"
        if status == 404:
            cure = f"correct `{self._name}.url` or `{self._name}.model`"
            return f"`{self._name}`: {url} is not there, or has no model {self.model}; {cure} ({said})"
        return f"`{self._name}`: {url} refuses the request ({said})"


def letter_of(key: str, response: str) -> Letter:
    """What a chat completion says. ValueError: it is none, or its numbers cannot be."""
    completion = read_as(_Completion, response)
    choice = completion.choices[0]
    positions = (choice.logprobs and choice.logprobs.content) or ()
    tokens = completion.usage.tokens if completion.usage else 0
    probability = probability_of(choice.message.content or "", positions)
    return Letter(key=key, probability=probability, tokens=tokens)


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


def _bare(token: str) -> str:
    return token.strip(DECORATION)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
