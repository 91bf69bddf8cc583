"""The page's server: a hand of pairs to each person, one request for each label.

The page never learns more of a pair than its texts. It says `left` or `right`; which answer that was is worked out here
again, and what it sends of anything else is not believed.
"""

import logging
import secrets
import signal
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from align.feedback.database import StoreDamaged, StoreFailed
from align.feedback.page import admin
from align.feedback.page.connections import BoundedProtocol, Brief, Waiting, make_room
from align.feedback.page.rendering import conversation, rendered
from align.feedback.page.security import Buckets, Guard, Seal, csrf_of, exchange, holder, is_same, refuse
from align.feedback.queue import COMMENT_LIMIT, Answer, Queue, Refused, Task, shown_order
from align.feedback.schema import Annotator
from align.wording import one_line

HAND = 2  # pairs given at once: the one in front of a person, and the next
SESSION_DAYS = 30
KEY = r"^[A-Za-z0-9-]{8,128}$"

router = APIRouter()


@dataclass(frozen=True)
class Desk:
    """What the routes share."""

    queue: Queue
    seal: Seal
    guidelines: Markup | None
    people: Buckets
    doors: Buckets
    pages: Environment

    def page(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.pages.get_template(f"{name}.html.jinja").render(values), status)

    def hand(self, person: Annotator) -> dict[str, Any]:
        """What is in front of this person, and how far all are."""
        return self.shown(person, self.queue.next(person.id, count=HAND))

    def shown(self, person: Annotator, tasks: list[Task]) -> dict[str, Any]:
        return {"items": [self.item(person, task) for task in tasks], "progress": self.progress(person)}

    def progress(self, person: Annotator) -> dict[str, int]:
        return vars(self.queue.progress(person.id))

    def item(self, person: Annotator, task: Task) -> dict[str, Any]:
        """A pair as the page may see it."""
        answers = {"a": rendered(task.pair.a), "b": rendered(task.pair.b)}
        order = shown_order(task.pair.id, person.id, task.is_reask)
        name = self.seal.close(person.id, task.pair.id, task.is_reask)
        prompt = conversation(task.pair.prompt)
        return {"id": name, "prompt": prompt, "left": answers[order[0]], "right": answers[order[1]]}

    def opened(self, person: Annotator, name: str) -> tuple[int, bool]:
        found = self.seal.open(person.id, name)
        if found is None:
            raise HTTPException(409, "This pair is not in front of you; reload the page.")
        return found


async def desk_of(request: Request) -> Desk:  # async: else FastAPI asks a thread for it
    return _desk(request)


def _desk(request: Request) -> Desk:
    return request.app.state.desk  # type: ignore[no-any-return]


TheDesk = Annotated[Desk, Depends(desk_of)]


def signed_in(request: Request, desk: TheDesk) -> Annotator:
    """Whose request this is. A POST must carry the session's CSRF token as well."""
    secret = request.cookies.get(cookie_of(request), "")
    person = holder(desk.queue, secret) if secret else None
    if person is None:
        raise HTTPException(401, "You are not signed in: open the link that you were given, or ask for a new one.")
    if request.method == "POST" and not is_same(request.headers.get("x-csrf-token", ""), csrf_of(secret)):
        raise HTTPException(403, "This request does not come from your page; reload it.")
    if not desk.people.take(person.id):
        raise HTTPException(429, "Too many requests; wait a second.", {"Retry-After": "1"})
    return person


Person = Annotated[Annotator, Depends(signed_in)]


def administrator(person: Person) -> Annotator:
    if not person.is_admin:
        raise HTTPException(403, "This page is for administrators.")
    return person


Administrator = Annotated[Annotator, Depends(administrator)]


def cookie_of(request: Request) -> str:
    """Cookies know no ports: two loops on one machine must not sign each other out."""
    return f"align-{request.url.port or 0}"


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entry(Said):
    token: str = Field(max_length=128)


class Submit(Said):
    item: str = Field(max_length=64)
    key: str = Field(pattern=KEY)
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    strength: Literal[1, 2, 3] | None = None
    seconds: float | None = Field(None, ge=0, le=86_400, allow_inf_nan=False)
    comment: str | None = Field(None, max_length=COMMENT_LIMIT)


class Undo(Said):
    key: str = Field(pattern=KEY)


class Beat(Said):
    items: list[Annotated[str, Field(max_length=64)]] = Field(max_length=8)


@router.get("/enter")
def show_door(desk: TheDesk) -> HTMLResponse:
    """The token is behind the link's `#`: no server, log or referrer ever sees it there. The script sends it on."""
    return desk.page("enter")


@router.post("/api/enter")
def enter(request: Request, desk: TheDesk, entry: Entry) -> JSONResponse:
    if not desk.doors.take(request.client.host if request.client else ""):
        raise HTTPException(429, "Too many tries; wait a minute.", {"Retry-After": "60"})
    secret = exchange(desk.queue, entry.token)
    if secret is None:
        raise HTTPException(401, "This link has been used or replaced: ask for a new one.")
    response = JSONResponse({})
    is_secure = request.url.scheme == "https"
    age = SESSION_DAYS * 86_400
    response.set_cookie(cookie_of(request), secret, age, httponly=True, samesite="strict", secure=is_secure)
    return response


@router.get("/")
def show_page(request: Request, desk: TheDesk, person: Person) -> HTMLResponse:
    csrf = csrf_of(request.cookies[cookie_of(request)])
    beat = desk.queue.lease_seconds / 4
    return desk.page("label", person=person, csrf=csrf, beat=beat, guidelines=desk.guidelines, limit=COMMENT_LIMIT)


@router.post("/api/next")
def next_items(desk: TheDesk, person: Person) -> dict[str, Any]:
    return desk.hand(person)


@router.post("/api/submit")
def submit(desk: TheDesk, person: Person, said: Submit) -> dict[str, Any]:
    """Takes an answer and gives the next pairs in the same breath."""
    comparison_id, is_reask = desk.opened(person, said.item)
    answer = Answer(
        comparison_id=comparison_id,
        is_reask=is_reask,
        outcome=_outcome(said.choice, shown_order(comparison_id, person.id, is_reask)),
        key=said.key,
        strength=said.strength if said.choice in ("left", "right") else None,
        seconds=said.seconds,
        comment=(said.comment or "").replace("\0", "").strip() or None,  # PostgreSQL takes no NUL
    )
    return desk.shown(person, desk.queue.submit_and_next(person.id, answer, count=HAND))


@router.post("/api/undo")
def undo(desk: TheDesk, person: Person, said: Undo) -> dict[str, Any]:
    task = desk.queue.undo(person.id, said.key)
    return {"item": None if task is None else desk.item(person, task), "progress": desk.progress(person)}


@router.post("/api/heartbeat")
def heartbeat(desk: TheDesk, person: Person, said: Beat) -> dict[str, list[str]]:
    """Which of the pairs in the page's hand are still this person's."""
    ids = {name: desk.opened(person, name)[0] for name in said.items}
    held = set(desk.queue.heartbeat(person.id, list(ids.values())))
    return {"held": [name for name, comparison_id in ids.items() if comparison_id in held]}


@router.get("/admin")
def show_admin(desk: TheDesk, person: Administrator) -> HTMLResponse:
    return desk.page("admin", person=person, **admin.summary(desk.queue))


@router.get("/admin/labels.{kind}")
def export(desk: TheDesk, person: Administrator, kind: Literal["jsonl", "csv"]) -> Response:
    rows = admin.label_rows(desk.queue.store)
    text, media = (admin.as_csv(rows), "text/csv") if kind == "csv" else (admin.as_jsonl(rows), "application/jsonl")
    named = {"Content-Disposition": f'attachment; filename="labels.{kind}"'}
    return Response(text, media_type=media, headers=named)


def _outcome(choice: str, order: str) -> str:
    """Canonical a or b for what was on the left (the first of `order`) or on the right."""
    return {"left": order[0], "right": order[1]}.get(choice, choice)


# -------------------------------------------------------------------------------------------------------- putting it up


def create_app(
    queue: Queue,
    *,
    guidelines: str | None = None,
    allowed_hosts: Iterable[str] = ("127.0.0.1", "localhost", "::1"),
    people: Buckets | None = None,
    doors: Buckets | None = None,
) -> Guard:
    """The application. `guidelines` is Markdown; the buckets bound each person's requests and each address's tries."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    key = queue.store.fact("page_key", secrets.token_hex(32))
    assert key is not None
    loader = PackageLoader("align.feedback.page")
    app.state.desk = Desk(
        queue=queue,
        seal=Seal(key),
        guidelines=None if guidelines is None else Markup(rendered(guidelines)["html"]),
        people=people or Buckets(40, 8),
        doors=doors or Buckets(10, 0.2),
        pages=Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True),
    )
    app.include_router(router)
    app.mount("/static", StaticFiles(packages=[("align.feedback.page", "static")]))
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_exception_handler(Refused, lambda _, error: refuse(409, f"{str(error)[:1].upper()}{str(error)[1:]}."))
    app.add_exception_handler(StoreFailed, _on_failed_store)
    app.add_exception_handler(RequestValidationError, _on_wrong_body)
    app.add_exception_handler(Exception, lambda *_: refuse(500, "The server has failed at this; try again."))
    return Guard(app, hosts=frozenset(host.lower().strip("[]") for host in allowed_hosts))


def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "There is no such page.", 405: "This page does not take such a request."}
    response = _said(request, error.status_code, known.get(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


def _on_failed_store(request: Request, error: Exception) -> Response:
    """The page's script tries again until it is taken."""
    if isinstance(error, StoreDamaged):
        logging.getLogger("uvicorn.error").error("%s", error)
        return _said(request, 500, "The store of labels is damaged; tell whoever runs this page.")
    logging.getLogger("uvicorn.error").warning("a request was put off: %s", error)
    response = _said(request, 503, "The database does not answer; no label is lost. Try again in a moment.")
    response.headers["Retry-After"] = "5"
    return response


def _said(request: Request, status: int, sentence: str) -> Response:
    """A sentence to whoever asked: to the script as JSON, to a person as a page."""
    if request.url.path.startswith("/api/") or request.url.path.startswith("/static/"):
        return refuse(status, sentence)
    return _desk(request).page("message", status, sentence=sentence)


def _on_wrong_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return refuse(422, f"The page sent what cannot be taken ({one_line(where, 60)}: {first['msg']}); reload it.")


def serve(app: Guard, listener: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT, finishes what is under way, and exits with 0."""
    for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again when it has shut down
        signal.signal(name, lambda *_: sys.exit(0))
    server, _ = server_of(app)
    server.run([listener])


def server_of(app: Guard) -> tuple[uvicorn.Server, Waiting]:
    """A server with as much room as there are descriptors, and the connections that wait in it."""
    room = make_room()
    waiting = Waiting(room.waiting)
    # no access log: it would hold who asked for what; the traces of faults still go to stderr, each once
    config = uvicorn.Config(
        app,
        http=partial(BoundedProtocol, waiting=waiting),  # type: ignore[arg-type]  # called as a class is
        ws="none",
        backlog=room.backlog,
        limit_concurrency=room.all,
        timeout_graceful_shutdown=5,
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    brief = Brief()
    for log in ("uvicorn.error", "asyncio"):
        logging.getLogger(log).addFilter(brief)
    return uvicorn.Server(config), waiting
