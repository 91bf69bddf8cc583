"""What stands before the page: its own hosts and its own origin only, small bodies, no haste; and who is signed in.

A link's token is exchanged once for a session: a random value of its own in a cookie that scripts cannot read. The
store keeps one hash for each annotator, of the token or, after the exchange, of the session; so a link works once, a
new link ends the old session, and a restart of the server signs nobody out.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable

from sqlalchemy import update
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.feedback.queue import Queue, hash_of
from align.feedback.schema import Annotator

BODY_LIMIT = 64 * 1024
BODY_SECONDS = 15.0  # in which a body has to arrive
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # as secrets.token_urlsafe(32) makes them
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses what the page itself would never send, and puts the headers on every response."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        body, refusal = b"", self._refusal(scope)
        if refusal is None and scope["method"] == "POST":
            body, refusal = await _body_of(scope, receive)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        is_read = False

        async def receive_body() -> Message:
            nonlocal is_read
            if is_read or scope["method"] != "POST":
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may see another end than we do
            return refuse(400, "A request has one length: Content-Length or Transfer-Encoding, not both.")
        hosts = headers.getlist("host")
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        # a name that somebody else points at this address is not ours (DNS rebinding)
        if match is None or match[1].lower().strip("[]") not in self.hosts:
            return refuse(421, "This page does not answer under that host name; start it with --allow-host NAME.")
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
        own = f"{scope['scheme']}://{hosts[0]}".lower()
        # browsers send an Origin with every POST; where it is missing, only their own word for the page's own will do
        is_own = [o.lower() for o in origins] == [own] if origins else site == "same-origin"
        if not is_own or site not in (None, "same-origin"):
            return refuse(403, "This request does not come from the page itself; open the page and try there.")
        return None


async def _body_of(scope: Scope, receive: Receive) -> tuple[bytes, JSONResponse | None]:
    """The body, counted as it comes: what a header says of its length is not believed."""
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b"", refuse(400, "The request was cut off.")
                part = message.get("body", b"")
                size += len(part)
                body += part if size <= BODY_LIMIT else b""
                # a little too much is read to its end: who is cut off in the middle of sending sees no answer
                if not message.get("more_body", False) or size > 16 * BODY_LIMIT:
                    break
    except TimeoutError:
        return b"", refuse(408, "The request came too slowly; try again.")
    if size > BODY_LIMIT:
        return b"", refuse(413, f"A request may hold {BODY_LIMIT // 1024} KiB at most.")
    return body, None


def refuse(status: int, sentence: str) -> JSONResponse:
    """An error: one sentence."""
    closing = {"Connection": "close"} if status in (400, 408, 413) else None  # the rest of a body is not read
    return JSONResponse({"error": sentence}, status, headers=closing)


class Buckets:
    """A token bucket for each key, in memory: `burst` at once, then `rate` a second."""

    def __init__(self, burst: float, rate: float, clock: Callable[[], float] = time.monotonic):
        self.burst, self.rate, self.clock = burst, rate, clock
        self._left: dict[object, tuple[float, float]] = {}  # what is left, as of when
        self._room = 4096
        self._lock = threading.Lock()

    def take(self, key: object) -> bool:
        """Takes one for `key`; whether there was one."""
        with self._lock:
            moment = self.clock()
            if len(self._left) > self._room:  # whoever is full again need not be remembered
                self._left = {k: v for k, v in self._left.items() if self._filled(v, moment) < self.burst}
                self._room = max(4096, 2 * len(self._left))
            left = self._filled(self._left.get(key, (self.burst, moment)), moment)
            self._left[key] = (max(left - 1.0, 0.0) if left >= 1.0 else left, moment)
            return left >= 1.0

    def _filled(self, state: tuple[float, float], moment: float) -> float:
        return min(self.burst, state[0] + (moment - state[1]) * self.rate)


def exchange(queue: Queue, token: str) -> str | None:
    """A new session for whoever holds this link's token, which is spent by it; None where nobody does."""
    if not TOKEN.fullmatch(token):
        return None
    session_secret = secrets.token_urlsafe(32)
    with queue.store.writing() as session:
        changed = session.execute(
            update(Annotator)
            .where(Annotator.token_hash == hash_of(token))
            .values(token_hash=hash_of(_session_key(session_secret)))
            .returning(Annotator.id)
        ).all()
    return session_secret if changed else None


def holder(queue: Queue, session_secret: str) -> Annotator | None:
    """Who is signed in with this session. A link's token is no session, nor the other way round."""
    return queue.annotator_of(_session_key(session_secret))


def csrf_of(session_secret: str) -> str:
    """The token that the page sends with every request: of this session, and of no use to find it."""
    return _mac(session_secret.encode(), b"csrf").hex()


def is_same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


class Seal:
    """Names for pairs on the page that tell nothing: neither the number, nor the round, nor that it is asked again.

    A pair's number and re-ask are hidden under a pad that is drawn from their own authentication tag (as in SIV, RFC
    5297): one name for each person and question, which nobody without the key can make or read.
    """

    def __init__(self, key: str):
        self._key = key.encode()

    def close(self, annotator_id: int, comparison_id: int, is_reask: bool) -> str:
        plain = comparison_id.to_bytes(8) + bytes([is_reask])
        tag = self._tag(annotator_id, plain)
        return (tag + _xor(plain, _mac(self._key, b"pad" + tag))).hex()

    def open(self, annotator_id: int, name: str) -> tuple[int, bool] | None:
        """(comparison id, is_reask), or None where this was never given to this person."""
        if not re.fullmatch(r"[0-9a-f]{50}", name):
            return None
        sealed = bytes.fromhex(name)
        tag, plain = sealed[:16], _xor(sealed[16:], _mac(self._key, b"pad" + sealed[:16]))
        is_ours = hmac.compare_digest(tag, self._tag(annotator_id, plain))
        return (int.from_bytes(plain[:8]), bool(plain[8])) if is_ours else None

    def _tag(self, annotator_id: int, plain: bytes) -> bytes:
        return _mac(self._key, b"tag" + annotator_id.to_bytes(8) + plain)[:16]


def _session_key(session_secret: str) -> str:
    return f"session:{session_secret}"


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=False))
