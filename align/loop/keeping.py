"""What a loop keeps of itself, so that a part that is lost is made again from the rest.

loop.json   mark, recipe, what it is made of, how far the store was     made anew from the store
the store   labels, steps, and the recipe as well                       brought back from a copy
backups/    the newest copies of the store, one after each step
"""

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.errors import BadInput
from align.feedback.copies import (
    Copy,
    bring_back,
    extent_of,
    fault_of_pages,
    keep_copy,
    make_copy,
    moved_aside,
    newest_copy,
    read_copy,
    replaced_path,
)
from align.feedback.database import (
    BESIDE,
    KEPT,
    LOOP,
    MARK,
    CannotOpen,
    Damaged,
    NoStore,
    file_of,
    label_command,
    read_loop,
    shown,
    store_url,
    write_loop,
)
from align.feedback.kept import Home, at_work_on, home_of, open_home
from align.feedback.store import Store
from align.locks import at_work_in
from align.loop.rounds import Loop, load_loop

Told = Mapping[str, Any]  # what loop.json says
RECIPE = "recipe"  # the store's fact: what loop.json says, less the store's URL and what changes with each step
RECIPE_ENDINGS = (".yaml", ".yml")


# ------------------------------------------------------------------------------------------------------ of a loop


def home_of_loop(loop: Loop, told: Told) -> Home:
    """The loop's store, as the recipe names it now. The folder alone tells of one that is in it, and was."""
    is_in_folder = loop.settings.store is None and told.get("store") is None
    return Home(loop.store, loop.out, "store", str(loop.out if is_in_folder else loop.path))


def told_of(loop: Loop) -> tuple[dict[str, Any], str]:
    """What loop.json says, nothing where the loop has not begun; and a remark where it had to be made anew.

    Raises:
        BadInput: it is damaged or missing, and the store cannot say it either.
    """
    try:
        told = read_loop(loop.out)
        if MARK in told or not (told or (loop.out / LOOP).exists() or _is_own_and_used(loop)):
            return told, ""
        fault = f"{loop.out / LOOP} {'names no loop' if told or (loop.out / LOOP).exists() else 'is missing'}"
    except Damaged as damaged:
        fault = damaged.fault
    try:
        store = Store(loop.store)
    except BadInput as error:
        how = Home(loop.store, loop.out, "store", str(loop.path)).command("restore")
        raise BadInput(f"{loop.path}: {fault}, and its store cannot tell: {error}. Bring both back: {how}") from error
    try:
        mark, recipe = store.fact(MARK), store.fact(RECIPE)
    finally:
        store.close()
    if mark is None:
        raise BadInput(f"{loop.path}: {fault}, and {store} is no loop's; bring both back, or choose another output")
    said = json.loads(recipe) if recipe else {}
    return said | {MARK: mark}, f"{fault}: it is made anew from {shown(loop.store)}"


def _is_own_and_used(loop: Loop) -> bool:
    """Whether a store is in the loop's own folder that a loop has worked with."""
    file = file_of(store_url(loop.store))
    if file is None or file.resolve().parent != loop.out.resolve() or not (file.is_file() and file.stat().st_size):
        return False
    store = Store(loop.store)
    try:
        return store.fact(MARK) is not None
    finally:
        store.close()


def open_loop(loop: Loop, told: Told) -> Store | None:
    """The store of a loop that has begun; None where it has not.

    Raises:
        BadInput: it is not the store that the loop had, or has gone on without this folder.
    """
    try:
        store = open_home(home_of_loop(loop, told), told)
    except CannotOpen:  # a server that may be back
        raise
    except BadInput as error:
        raise BadInput(f"{loop.path}: `store`: {error}") from error
    if store is not None and KEPT in told:
        with store.reading() as session:
            extent, ours = extent_of(session), told[KEPT].get("steps", 0)
        if extent.steps > ours + 1:  # one: the loop may have been killed before it noted it
            store.close()
            raise BadInput(
                f"{loop.path}: `output`: {loop.out} is older than its store, which holds {extent}: this folder's loop "
                f"had {ours}. Go on in the folder that went on, or bring the store's copy of then back: "
                f"{home_of_loop(loop, told).command('restore')}"
            )
    return store


def keep(loop: Loop, store: Store, told: Told) -> None:
    """Notes in loop.json how far the store is, and keeps a copy of it, unless the newest is as far.

    Raises:
        RunFailed: the store is damaged.
    """
    with store.reading() as session:
        extent = extent_of(session)
    newest = newest_copy(loop.out, "store", is_checked=False)
    if newest is None or (newest.mark, newest.extent) != (told[MARK], extent):
        keep_copy(store, loop.out, "store")
    write_loop(loop.out, {**told, KEPT: asdict(extent)})


def tell_store(store: Store, told: Told) -> None:
    """Writes into the store what loop.json says, so that it can be made anew; no URL, which may have a password."""
    rest = {key: value for key, value in told.items() if key not in (*BESIDE, "store")}
    kept = {key: told[key] for key in BESIDE if key in told and key != KEPT} | rest | {"store": None}
    store.set_fact(RECIPE, json.dumps(kept, default=str))


def put_away_damaged(loop: Loop) -> None:
    """Keeps a loop.json that cannot be used beside the one that is made anew."""
    if (loop.out / LOOP).exists():
        os.replace(loop.out / LOOP, loop.out / f"{LOOP}.damaged")


# -------------------------------------------------------------------------------------------- for the command line


def home_named(run: str) -> tuple[Home, dict[str, Any]]:
    """The home that a recipe, a loop's folder, a store's file or a database URL names, and what loop.json says of it
    (nothing, where it is damaged and the recipe says where the store is)."""
    if run.endswith(RECIPE_ENDINGS) and not Path(run).is_dir():
        loop = load_loop(run)
        home = Home(loop.store, loop.out, "store", run)
        try:
            return home, read_loop(loop.out)
        except Damaged:
            return home, {}
    home = home_of(run)
    return home, read_loop(home.folder) if home.is_loop and home.folder is not None else {}


def backup(run: str, file: str | None = None) -> str:
    """Copies a store to a file, or beside the loop's other copies; says what was done, in a sentence.

    Raises:
        BadInput: there is no such store, it is not the one that its loop had, or the file is there already.
    """
    home, told = home_named(run)
    if file is not None and Path(file).exists():
        raise BadInput(f"{file} is there already; name a new file")
    if file is not None and not Path(file).resolve().parent.is_dir():
        raise BadInput(f"{file}: there is no folder {Path(file).parent}; make it, or correct the path")
    if file is None and home.folder is None:
        raise BadInput(f"{shown(home.where)} is no loop's folder: name a file for the copy")
    store = open_home(home, told) or Store(home.where)
    try:
        if file is not None:
            make_copy(store, Path(file))
        path = Path(file) if file is not None else keep_copy(store, home.folder or Path(), home.stem)
    finally:
        store.close()
    return f"{path}: {read_copy(path).extent}"


def restore(run: str, file: str | None = None) -> str:
    """Brings a copy back, the newest where none is named; says what was done, in a sentence. What is there is kept.

    Raises:
        BadInput: there is no copy that is whole, it is another loop's, or a loop is at work on the store.
    """
    home, told = home_named(run)
    copy = read_copy(Path(file)) if file is not None else _newest(home)
    if told.get(MARK) and copy.mark not in (None, told[MARK]):
        raise BadInput(f"{copy.path} is of another loop's store than {home.name} has; name a copy of its own")
    folder = home.folder or copy.path.resolve().parent
    with at_work_in(folder, home.name) if home.folder is not None else nullcontext():
        aside = replaced_path(folder, home.stem)
        store = _brought_back(home, copy, aside)
        try:
            if told:
                store.fact(MARK, told[MARK])
                write_loop(folder, {**told, KEPT: asdict(copy.extent)})
            if home.folder is not None:
                keep_copy(store, folder, home.stem)  # the newest: by it the others are held
        finally:
            store.close()
    kept = f"; what was there is kept in {aside}" if aside.exists() else ""
    words = "--add", "NAME"
    if home.is_loop and home.folder is not None:
        again = label_command(home.folder, home.where, *words)
    else:
        again = shlex.join(["align", "label", home.name, *words])
    return f"{shown(home.where)}: {copy.extent}, from {copy.path}{kept}. Links of people have ended: {again}"


def _newest(home: Home) -> Copy:
    copy = newest_copy(home.folder, home.stem) if home.folder is not None else None
    if copy is None:
        raise BadInput(f"{home.name} has no copy that is whole; name one: {home.command('restore')} FILE")
    return copy


def _with_whole_pages(where: str) -> Store:
    """A store that SQLite can write to.

    Raises:
        BadInput: there is none, it cannot be opened, or parts of its file are damaged.
    """
    store = Store(where)
    if fault := fault_of_pages(store):
        store.close()
        raise CannotOpen(fault)
    return store


def _brought_back(home: Home, copy: Copy, aside: Path) -> Store:
    """The store with what the copy holds, and what was there at `aside`, if anything was."""
    file = file_of(store_url(home.where))
    try:
        store, is_new = _with_whole_pages(home.where), False
    except BadInput as error:
        if file is None and not isinstance(error, NoStore):
            raise  # a server that does not answer
        with moved_aside(file, aside) if file is not None else nullcontext():
            store, is_new = Store(home.where, create=True), True
    try:
        mark = store.fact(MARK)
        if not is_new and mark is not None and mark != copy.mark:
            cure = "move it away first" if file is not None else "name a database of its own"
            raise BadInput(f"the store {store} is another loop's than {copy.path}; {cure}")
        with at_work_on(store):
            bring_back(copy, store, None if is_new else aside)
    except BaseException:
        store.close()
        raise
    return store
