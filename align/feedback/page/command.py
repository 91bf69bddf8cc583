"""`align label`: opens a loop's store, hands out sign-in links, and puts the page up."""

import ipaddress
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import BadInput
from align.wording import one_line

if TYPE_CHECKING:  # SQLAlchemy takes a while, and the rest of the page an extra
    from align.feedback.schema import Annotator

LOCAL = "local"  # who labels where nobody has been named
AT_ONCE = 3  # people for whom the command of a new link is written out
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def label(
    run: str,
    *,
    host: str,
    port: int,
    add: Sequence[str],
    admin: Sequence[str],
    guidelines: str | None,
    allow_hosts: Sequence[str],
    lease_seconds: float,
    echo: Callable[[str], None],
    store_at: str | None = None,
) -> None:
    """Serves the labelling page of a loop until it is stopped; `echo` shows the links. `store_at`: the loop's store,
    where it is not in its folder.

    Raises:
        BadInput: a missing extra, file, store or annotator, a taken port, or an address that would be open to all.
    """
    try:
        from align.feedback.database import shown
        from align.feedback.kept import copied_while_open, home_of, open_store
        from align.feedback.page.server import create_app, serve
        from align.feedback.queue import Queue
    except ImportError as error:
        raise BadInput(f"the labelling page needs `{error.name}`: pip install 'align-rlhf[label]'") from error

    if not 2 <= lease_seconds <= 86_400:
        raise BadInput(f"--lease-seconds is {lease_seconds:g}; it goes from 2 to 86400 (a day)")
    text = None if guidelines is None else _text_of(guidelines)
    hosts = hosts_of(host, allow_hosts)
    store = open_store(run, named=store_at)
    try:
        queue, admins = Queue(store, lease_seconds=lease_seconds), list(admin)
        people = [person for person in store.annotators() if not person.is_simulated]
        if _is_loopback(host):
            admins += [LOCAL] if not (people or add or admins) else []
        elif not (add or admins or any(person.token_hash for person in people)):
            raise BadInput(f"{host} can be reached from elsewhere, and nobody has a link yet: add --add NAME")
        with listen(host, port) as listener:
            name = hosts[0] if not _is_loopback(host) else host
            at = f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
            tokens = {name: queue.invite(name, is_admin=name in admins) for name in dict.fromkeys([*add, *admins])}
            where = shown(run) if "://" in run else run  # a URL may hold a password
            app = create_app(queue, guidelines=text, allowed_hosts=hosts)
            named = [where] if store_at is None else [where, "--store", shown(store_at)]
            for line in [*_known(named, people, tokens), *_told(at, tokens, is_loopback=_is_loopback(host))]:
                echo(line)
            with copied_while_open(store, home_of(run, store_at), echo):
                serve(app, listener)
    finally:
        store.close()


def hosts_of(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names that the page answers to: those given, or the address itself. On loopback its own names always.

    Raises:
        BadInput: the address is every address of the machine, and no name was given.
    """
    if _is_loopback(host):
        return tuple(dict.fromkeys([host, *LOOPBACK, *allowed]))
    if not allowed and host in ("", "0.0.0.0", "::"):
        raise BadInput(f"--host {host or repr('')} is every address: say by which name people come, --allow-host NAME")
    return tuple(allowed) or (host,)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before anybody is told a link."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        cure = "choose others with --host and --port"
        raise BadInput(f"cannot listen on {host} port {port} ({one_line(error)}); {cure}") from error


def _known(where: Sequence[str], people: "Sequence[Annotator]", tokens: dict[str, str]) -> list[str]:
    """How those come in again who were given links before: no link is told twice, so by the command for a new one."""
    before = [person for person in people if person.token_hash and person.name not in tokens]
    if not before:
        return []
    words = [f"{'--admin' if person.is_admin else '--add'} {_word(person.name)}" for person in before[:AT_ONCE]]
    more = f" ... ({len(before) - AT_ONCE} more)" if len(before) > AT_ONCE else ""
    return [
        "who signed in before stays so (same browser, same address); new links for them:",
        f"  align label {' '.join(map(_word, where))} {' '.join(words)}{more}",
    ]


def _word(text: str) -> str:
    """For a shell to read, and a terminal to show."""
    return shlex.quote("".join(character if character.isprintable() else "?" for character in text))


def _told(at: str, tokens: dict[str, str], *, is_loopback: bool) -> list[str]:
    links = [f"{name}: {at}/enter#{token}" for name, token in tokens.items()]
    how = "each link signs one browser in, once" if links else "--add NAME makes a new sign-in link"
    plain = [] if is_loopback else ["plain HTTP: put a proxy with TLS before it unless the network is your own"]
    return [*links, f"labelling at {at} ({how}); Ctrl-C stops it", *plain]


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the guidelines {path} cannot be read ({one_line(error)}); correct --guidelines") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
