"""Labels are never lost in silence: a loop knows its store again, and a store that is lost comes back from a copy."""

import json
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from align import cli, locks
from align.errors import BadInput, RunFailed
from align.feedback import copies, kept
from align.feedback.copies import copies_in, keep_copy, make_copy, newest_copy, read_copy
from align.feedback.database import KEPT, LOOP, MARK, SUM, StoreFailed, read_loop
from align.feedback.exchange import export_run, import_run
from align.feedback.kept import at_work_on, copied_while_open, open_store
from align.feedback.queue import Queue
from align.feedback.rows import NewLabel, recount
from align.feedback.store import Store
from align.loop.keeping import RECIPE, backup, keep, restore
from align.loop.rounds import load_loop
from align.loop.run import run_loop
from align.report.loop_page import report
from tests import databases
from tests.databases import fill
from tests.test_loop import recipe

pytestmark = pytest.mark.usefixtures("no_pictures")


def stopped(settings, path):
    """A stage that is stopped before it does anything."""
    return 143, ""


def label_some(store, count, round_=0):
    """People's labels of pairs of a round."""
    ids, me = fill(store, count, round_=round_), store.add_annotator("Ada")
    store.add_labels(NewLabel(key, "human", "a", f"label-{key}", annotator_id=me) for key in ids)
    return ids


@pytest.fixture
def url(request, tmp_path):
    return databases.new_url(request, tmp_path)


@pytest.fixture
def begun(base, data, tmp_path):
    """A loop that was stopped in its first step of round 0, with four labels and two steps done in its store."""
    loop = load_loop(recipe(base, data, tmp_path))
    assert run_loop(loop, stopped) == 143
    store = Store(loop.store)
    label_some(store, 4)
    for name in ("collect", "score"):
        store.finish(0, name, {})
        keep(loop, store, read_loop(loop.out))
    store.close()
    return loop


def lines_of(loop):
    """What each command that opens a loop's store says, where all refuse it."""
    out = str(loop.out)
    asked = {
        "loop": lambda: run_loop(loop, stopped),
        "report": lambda: report(out),
        "label": lambda: open_store(out),
        "export": lambda: export_run(out, loop.out.parent / "out.jsonl"),
        "import": lambda: import_run(out, write_pairs(loop.out.parent / "in.jsonl")),
        "backup": lambda: backup(out),
    }
    said = {}
    for name, ask in asked.items():
        with pytest.raises(BadInput) as refused:
            ask()
        said[name] = str(refused.value)
        assert "\n" not in said[name]
    return said


def write_pairs(path):
    path.write_text(json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n")
    return path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------------------------- a store that is lost


def gone(loop):
    Path(loop.store).unlink()


def emptied(loop):
    Path(loop.store).write_bytes(b"")


def without_tables(loop):
    Path(loop.store).unlink()
    connection = sqlite3.connect(loop.store)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA user_version=1")
    connection.close()


def made_anew(loop):
    Path(loop.store).unlink()
    Store(loop.store, create=True).close()


def of_another(loop):
    made_anew(loop)
    store = Store(loop.store)
    store.fact(MARK, "another")
    store.close()


def older(loop):
    first = copies_in(loop.out, "store")[1]  # before the last step, with the same labels
    shutil.copy(first, loop.store)
    Store(loop.store).close()  # with a log beside it, as every store has


def older_but_fuller(loop):
    """As many labels as there were, but others: those of a store that was put back and labelled again."""
    store = Store(loop.store)
    with store.writing() as session:
        last = session.execute(text("SELECT comparison_id FROM labels ORDER BY id DESC LIMIT 1")).scalar()
        session.execute(text("DELETE FROM labels WHERE comparison_id = :last"), {"last": last})
        recount(session.connection(), [last])
    label_some(store, 3, round_=1)
    store.close()


def with_an_answer_turned(loop):
    store = Store(loop.store)
    with store.writing() as session:
        session.execute(text("UPDATE labels SET outcome = 'b' WHERE id = 2"))
    store.close()


def with_a_text_changed(loop):
    """A letter of an answer that a label is of, on the disk."""
    store = Store(loop.store)
    (told,) = [pair.b.encode() for pair in store.pairs() if pair.id == 3]
    store.close()
    content = Path(loop.store).read_bytes()
    assert content.count(told) == 1
    Path(loop.store).write_bytes(content.replace(told, told.replace(b"answer", b"answex")))


def garbage(loop):
    Path(loop.store).write_bytes(b"garbage " * 1000)


LOST = {
    gone: "is gone",
    emptied: "is empty",
    without_tables: "is empty",
    made_anew: "is another one: no loop has used it",
    of_another: "belongs to another loop",
    older: "is an older one, or was changed: it holds 4 labels of people and 1 finished steps",
    older_but_fuller: "is an older one, or was changed",
    with_an_answer_turned: "is damaged: row 2 of `labels` is not what was written. Bring store-",
    with_a_text_changed: "is damaged: row 6 of `candidates` is not what was written. Bring store-",
    garbage: "cannot be opened",
}


@pytest.mark.parametrize("lose", LOST)
def test_a_lost_store_is_refused_by_all_and_comes_back_from_its_copy(begun, lose):
    loop = begun
    lose(loop)
    before = files(loop.out)
    for name, line in lines_of(loop).items():
        assert LOST[lose] in line, name
        assert "with 4 labels of people and 2 finished steps (the last: `score` of round 0)" in line, name
        assert line.endswith(f": align feedback restore {loop.out}"), name
    after = files(loop.out)
    assert {k: v for k, v in after.items() if not k.endswith(("-shm", "-wal"))} == before  # nothing was made or changed
    if lose is of_another:
        with pytest.raises(BadInput, match="is another loop's than .*; move it away first"):
            restore(str(loop.out))
        Path(loop.store).unlink()
    told = restore(str(loop.out))
    assert told.startswith(f"{loop.store}: 4 labels of people and 2 finished steps")
    is_kept = lose not in (gone, of_another)
    assert ("what was there is kept in" in told) == is_kept == any(loop.out.glob("backups/store-replaced-*.db"))
    store = open_store(loop.out)
    assert len(store.labels()) == 4 and store.steps() == [(0, "collect"), (0, "score")]
    store.close()
    assert run_loop(loop, stopped) == 143


def test_where_no_copy_is_the_refusal_says_so(begun):
    shutil.rmtree(begun.out / "backups")
    gone(begun)
    with pytest.raises(BadInput, match="is gone; this loop's had 4 labels .*No copy is in .*backups: bring it back"):
        run_loop(begun, stopped)


def test_a_loop_of_an_earlier_version_misses_its_store_too(begun):
    """Which did not write how far it was."""
    told = read_loop(begun.out)
    (begun.out / LOOP).write_text(json.dumps({k: v for k, v in told.items() if k not in (KEPT, SUM)}))
    assert run_loop(begun, stopped) == 143  # and then it does
    assert read_loop(begun.out)[KEPT]["labels"] == 4
    (begun.out / LOOP).write_text(json.dumps({k: v for k, v in told.items() if k not in (KEPT, SUM)}))
    (begun.out / "round-0").mkdir()
    gone(begun)
    with pytest.raises(BadInput, match="is gone; this loop's had 4 labels"):
        run_loop(begun, stopped)


def test_labels_that_came_since_the_last_step_are_missed_where_a_copy_has_them(begun):
    then = begun.out.parent / "then.db"
    shutil.copy(copies_in(begun.out, "store")[-1], then)
    store = Store(begun.store)
    label_some(store, 2, round_=1)
    keep_copy(store, begun.out, "store")  # as the page makes it
    store.close()
    for end in ("-wal", "-shm"):
        Path(f"{begun.store}{end}").unlink(missing_ok=True)
    shutil.copy(then, begun.store)
    with pytest.raises(BadInput, match="it holds 4 labels .*had 6 labels of people"):
        run_loop(begun, stopped)


def test_a_store_that_moved_is_known_by_its_mark(begun, base, data):
    folder = begun.out.parent
    moved = folder / "elsewhere.db"
    loop = load_loop(recipe(base, data, folder, store=str(moved)))
    with pytest.raises(BadInput, match=rf"elsewhere.db is gone; .*: align feedback restore {loop.path}$"):
        run_loop(loop, stopped)
    assert not moved.exists()
    shutil.copy(begun.store, moved)
    assert run_loop(loop, stopped) == 143
    other = load_loop(recipe(base, data, folder / "other", store=str(moved)))
    with pytest.raises(BadInput, match="belongs to another loop"):
        run_loop(other, stopped)
    assert not other.out.exists()


def test_a_store_that_is_named_itself_is_held_against_its_own_loop_alone(begun, base, data):
    folder = begun.out.parent
    emptied(begun)
    with pytest.raises(BadInput, match="is empty; this loop's had 4 labels"):
        open_store(begun.store)
    restore(begun.store)
    moved = folder / "elsewhere.db"
    shutil.copy(copies_in(begun.out, "store")[-1], moved)
    loop = load_loop(recipe(base, data, folder, store=str(moved)))
    assert run_loop(loop, stopped) == 143
    Path(begun.store).unlink()
    Store(begun.store, create=True).close()  # no loop's any more
    open_store(begun.store).close()


def test_a_folder_that_is_older_than_its_store_is_refused(begun):
    """As a copied folder's loop that went on with the one store of both."""
    then = (begun.out / LOOP).read_bytes()
    store = Store(begun.store)
    for name in ("route", "label"):
        store.finish(0, name, {})
    store.close()
    with pytest.raises(
        BadInput, match=r"is older than its store, which holds .* 4 finished .* this folder's loop had 2"
    ):
        run_loop(begun, stopped)
    assert (begun.out / LOOP).read_bytes() == then


def test_a_loop_killed_between_a_step_and_its_note_goes_on(begun):
    store = Store(begun.store)
    store.finish(0, "route", {})
    store.close()
    assert run_loop(begun, stopped) == 143
    assert read_loop(begun.out)[KEPT]["steps"] == 3


@pytest.mark.parametrize("url", databases.KINDS, indirect=True)
def test_two_folders_never_work_on_one_store_at_once(url, monkeypatch):
    """Nor a restore beneath a loop: a copied folder has the same mark."""
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    one, two = Store(url, create=True), Store(url)
    with at_work_on(one):
        with pytest.raises(BadInput, match=r"another run is at work .*; wait for it, or stop it"), at_work_on(two):
            pass
        label_some(two, 1)  # the page's labels go on
    with at_work_on(two):
        pass
    one.close()
    two.close()


# ------------------------------------------------------------------------------------------------- a lost loop.json


DAMAGES = {
    "missing": None,
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "a byte flipped": lambda whole: whole.replace(b'"num_rounds": 2', b'"num_rounds": 3'),
    "garbage": lambda whole: b"\x00\xff garbage",
    "of another type": lambda whole: json.dumps(json.loads(whole) | {"store": 3}).encode(),
    "a list": lambda whole: b"[]",
    "nothing in it": lambda whole: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_loop_json_is_one_line_and_made_anew_from_the_store(begun, damage, capsys):
    file = begun.out / LOOP
    (begun.out / "round-0").mkdir()
    whole, written = file.read_bytes(), read_loop(begun.out)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(DAMAGES[damage](whole))
    for ask in (lambda: report(begun.out), lambda: open_store(begun.out), lambda: backup(str(begun.out))):
        if damage != "nothing in it":  # of an earlier version, it may be
            with pytest.raises(BadInput, match=r"loop\.json is (damaged|missing).*`align loop RECIPE` makes it anew"):
                ask()
    assert run_loop(begun, stopped) == 143
    assert "it is made anew from" in capsys.readouterr().out
    assert {k: v for k, v in read_loop(begun.out).items() if k != KEPT} | {SUM: ""} == {
        k: v for k, v in written.items() if k != KEPT
    } | {SUM: ""}
    if damage != "missing":
        assert (begun.out / "loop.json.damaged").read_bytes() == DAMAGES[damage](whole)
    assert run_loop(begun, stopped) == 143 and "anew" not in capsys.readouterr().out


def test_one_that_is_made_anew_still_refuses_another_recipe(begun, base, data):
    (begun.out / LOOP).write_text("{")
    with pytest.raises(BadInput, match=r"another recipe \(`penalty` was 0.5, is 0.1\)"):
        run_loop(load_loop(recipe(base, data, begun.out.parent, penalty=0.1)), stopped)


def test_where_both_are_lost_the_copy_brings_both_back(begun):
    (begun.out / LOOP).write_text("{")
    gone(begun)
    with pytest.raises(BadInput, match=rf"its store cannot tell: .*align feedback restore {begun.path}"):
        run_loop(begun, stopped)
    assert "4 labels of people and 2 finished steps" in restore(str(begun.path))
    assert run_loop(begun, stopped) == 143
    assert read_loop(begun.out)[KEPT]["labels"] == 4


def test_no_password_goes_where_the_loop_did_not_keep_it(begun):
    told = read_loop(begun.out) | {"store": "postgresql+psycopg://me:secret@h/d"}
    from align.loop.keeping import tell_store

    store = Store(begun.store)
    tell_store(store, told)
    assert "secret" not in store.fact(RECIPE) and json.loads(store.fact(RECIPE))["store"] is None
    store.close()
    assert (begun.out / LOOP).stat().st_mode & 0o077 == 0
    assert copies_in(begun.out, "store")[-1].stat().st_mode & 0o077 == 0


# ------------------------------------------------------------------------------------------------------ the copies


def rows(store):
    """All that a store holds, but what a restore does not bring back."""
    from align.feedback.schema import Base

    with store.reading() as session:
        return {
            table.name: [
                tuple(row)
                for row in session.execute(
                    table.select().with_only_columns(*[c for c in table.columns if c.name != "token_hash"])
                )
            ]
            for table in Base.metadata.sorted_tables
            if table.name != "leases"
        }


@pytest.mark.parametrize("url", databases.KINDS, indirect=True)
def test_a_copy_of_either_database_brings_all_of_it_back(url, tmp_path):
    store = Store(url, create=True)
    label_some(store, 300)
    queue = Queue(store)
    token = queue.invite("Ben")
    store.set_metrics(0, {"kappa": float("nan")})
    store.finish(0, "route", {"threshold": float("inf")})
    whole = rows(store)
    path = tmp_path / "copy.db"
    assert backup(url, str(path)) == f"{path}: 300 labels of people and 1 finished steps (the last: `route` of round 0)"
    with pytest.raises(BadInput, match="is there already"):
        backup(url, str(path))
    later = label_some(store, 3, round_=1)
    told = restore(url, str(path))
    assert "what was there is kept in" in told
    assert repr(rows(store)) == repr(whole)  # through the connections that were open
    assert queue.annotator_of(token) is None  # an older store has links that were given up since
    (aside,) = tmp_path.glob("backups/*replaced*.db")
    assert read_copy(aside).extent.labels == 303
    assert [p for p in tmp_path.rglob("*") if p.name.startswith(("copy.db-", "."))] == []
    assert label_some(store, 3, round_=1) == later  # the database's own counters go on
    store.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_copy_is_of_one_moment_whoever_writes(url, tmp_path):
    store = Store(url, create=True)
    ids, me = fill(store, 400), store.add_annotator("Ada")
    ends = threading.Event()

    def write():
        for number, key in enumerate(ids):
            if not ends.is_set():
                store.add_labels([NewLabel(key, "human", "a", f"l-{number}", annotator_id=me)])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            make_copy(store, tmp_path / f"{number}.db")
            extent = read_copy(tmp_path / f"{number}.db").extent
            assert extent.labels == 0 or extent.label == f"l-{extent.labels - 1}"
    finally:
        ends.set()
        writer.join()
        store.close()


def test_the_newest_three_are_kept_and_a_damaged_one_is_passed_over(begun):
    store = Store(begun.store)
    for number in range(4):
        label_some(store, 1, round_=1 + number)
        keep_copy(store, begun.out, "store")
    store.close()
    found = copies_in(begun.out, "store")
    assert len(found) == 3 and newest_copy(begun.out, "store").extent.labels == 8
    with found[-1].open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 20000)
    with pytest.raises(BadInput, match="cannot be brought back"):
        restore(str(begun.out), str(found[-1]))
    gone(begun)
    assert "7 labels of people" in restore(str(begun.out))


def test_a_damaged_store_is_never_copied_over_the_good_copies(begun):
    store = Store(begun.store)
    label_some(store, 200, round_=1)
    with store.connection(writes=False) as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    with Path(begun.store).open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 20)
    before = files(begun.out / "backups")
    store = Store(begun.store)
    with pytest.raises(RunFailed, match="is damaged"):
        keep_copy(store, begun.out, "store")
    store.close()
    assert files(begun.out / "backups") == before
    with pytest.raises(BadInput, match=r"is damaged: .*Bring store-00000\d.db back, .*: align feedback restore"):
        open_store(begun.out)
    assert "4 labels of people" in restore(str(begun.out))
    store = open_store(begun.out)
    assert len(store.labels()) == 4
    store.close()


@pytest.mark.parametrize("what", ["text", "of another version", "missing", "no store"])
def test_what_is_no_copy_is_refused(begun, what):
    file = begun.out.parent / "what.db"
    if what == "text":
        file.write_text("words")
    elif what != "missing":
        connection = sqlite3.connect(file)
        if what == "of another version":
            connection.execute("CREATE TABLE facts (name TEXT, value TEXT)")
            connection.execute("INSERT INTO facts VALUES ('version', '99')")
        connection.commit()
        connection.close()
    before = files(begun.out)
    with pytest.raises(BadInput, match="name another copy|name a file that"):
        restore(str(begun.out), str(file))
    assert files(begun.out) == before


def test_another_loops_copy_is_refused(begun, base, data, tmp_path):
    other = load_loop(recipe(base, data, tmp_path / "other"))
    assert run_loop(other, stopped) == 143
    with pytest.raises(BadInput, match="is of another loop's store"):
        restore(str(begun.out), str(copies_in(other.out, "store")[-1]))


def test_an_older_copy_may_be_brought_back_on_purpose(begun):
    first = copies_in(begun.out, "store")[0]
    extent = read_copy(first).extent
    assert str(extent) in restore(str(begun.out), str(first))
    assert run_loop(begun, stopped) == 143  # what was there is aside, and no longer asked for


def test_nothing_is_restored_under_a_loop_that_is_at_work(begun, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with locks.at_work_in(begun.out), pytest.raises(BadInput, match="another run is at work"):
        restore(str(begun.out))


def test_a_file_that_is_deleted_under_a_page_takes_no_more_labels(tmp_path):
    store = Store(tmp_path / "store.db", create=True)
    label_some(store, 1)
    (tmp_path / "store.db").rename(tmp_path / "other.db")
    with pytest.raises(StoreFailed, match=r"store\.db was deleted while it was in use"):
        store.add_annotator("Ben")
    Store(tmp_path / "store.db", create=True).close()
    with pytest.raises(StoreFailed, match=r"store\.db was replaced while it was in use"):
        store.counts()
    store.close()


def test_the_page_keeps_copies_as_people_label_and_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "LOOK_EVERY", 0.01)
    store = Store(tmp_path / "store.db", create=True)
    told, seen = [], threading.Event()
    make = copies.make_copy
    monkeypatch.setattr(copies, "make_copy", lambda *a: (make(*a), seen.set()))
    home = kept.home_of(tmp_path / "store.db")
    with copied_while_open(store, home, told.append):
        label_some(store, kept.LABELS_BETWEEN)
        assert seen.wait(10)
        label_some(store, 1, round_=1)
    assert newest_copy(tmp_path, "store").extent.labels == kept.LABELS_BETWEEN + 1 and not told
    with copied_while_open(store, home, told.append):
        pass
    assert len(copies_in(tmp_path, "store")) == 2  # nothing new, no new copy
    shutil.rmtree(tmp_path / "backups")
    (tmp_path / "backups").write_text("in the way")
    with copied_while_open(store, home, told.append):
        label_some(store, 1, round_=2)
    (line,) = told
    assert line.startswith("no copy of the labels could be made: ")
    store.close()


def test_the_commands(begun, tmp_path):
    run = CliRunner().invoke
    out = run(cli.app, ["feedback", "backup", str(begun.path), str(tmp_path / "kept.db")])
    assert out.exit_code == 0 and "kept.db: 4 labels of people" in out.output
    gone(begun)
    out = run(cli.app, ["feedback", "restore", str(begun.out), str(tmp_path / "kept.db")])
    assert out.exit_code == 0 and "4 labels of people and 2 finished steps" in out.output


def test_a_copy_that_finds_no_room_is_not_told_as_damage(begun, monkeypatch):
    store = Store(begun.store)

    class Full:
        driver_connection = property(lambda self: self)

        def backup(self, target):
            raise sqlite3.OperationalError("database or disk is full")

        def close(self):
            pass

    monkeypatch.setattr(store.engine, "raw_connection", Full)
    with pytest.raises(
        RunFailed, match=r"no copy of the store .* could be made \(database or disk is full\); it is as"
    ):
        make_copy(store, begun.out / "copy.db")
    assert not (begun.out / "copy.db").exists()
    store.close()


def test_what_a_restored_loop_says_names_its_folder(begun):
    said = restore(str(begun.path))
    assert said.endswith(f"Links of people have ended: align label {begun.out} --add NAME")
