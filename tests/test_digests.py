"""A row that is not what was written is noticed by whoever reads it; and what was written is never taken for damaged."""

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from math import inf, nan

import pytest
from sqlalchemy import Boolean, DateTime, Float, Integer, text

from align.errors import BadInput, RunFailed
from align.feedback.backup import export_labels, import_labels
from align.feedback.copies import copies_in, keep_copy, newest_copy, read_copy
from align.feedback.database import StoreDamaged
from align.feedback.digests import DamagedRow, Json, Sealed
from align.feedback.exchange import export_run, labelled
from align.feedback.kept import open_store
from align.feedback.queue import Answer, Queue
from align.feedback.rows import NewLabel, check_rows
from align.feedback.store import Store
from align.loop.keeping import restore
from tests import databases
from tests.databases import fill

NOT_SEALED = {"token_hash"}  # of an annotator: who comes with another link is not let in
TABLES = {table.__tablename__: table.__table__ for table in Sealed.__subclasses__()}
COLUMNS = [(name, c.name) for name, table in TABLES.items() for c in table.columns if c.name not in NOT_SEALED]


@pytest.fixture(params=databases.KINDS)
def url(request, tmp_path):
    return databases.new_url(request, tmp_path)


@pytest.fixture
def store(url):
    """With a row in each table that has a value in each column."""
    store = filled(url)
    yield store
    store.close()


def filled(url):
    store = Store(url, create=True)
    first, second, *_ = ids = fill(store, 4)
    ada, ben = store.add_annotator("Ada"), store.add_annotator("Ben", is_simulated=True)
    Queue(store).invite("Ada", is_admin=True)
    store.set_scores({id_: [0.5, -0.25 * id_] for id_ in range(1, 9)})
    said = {"margins": (1.5, -0.5), "judge_probability": 0.75, "judge_flipped": False, "rechecked": 1}
    store.set_comparisons(dict.fromkeys(ids, said))
    moment = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=2)))
    how = {"probability": 0.9, "strength": 2, "seconds": 1.25, "comment": "clear", "created": moment}
    store.add_labels([NewLabel(first, "human", "a", "first", annotator_id=ada, **how)])
    store.add_labels([NewLabel(first, "human", "b", "corrected", annotator_id=ada, supersedes=1, **how)])
    store.add_labels([NewLabel(second, "reward", "b", "machine", probability=1)])
    Queue(store).submit(ben, Answer(second, "tie", "of-a-person", strength=1, seconds=3, comment="no"))
    store.finish(0, "collect", {"answers": 8})
    store.set_metrics(0, {"kappa": 0.5})
    return store


def another(column):
    """SQL of another value of the same type than the one that is there."""
    name = column.name
    if name == "supersedes":
        return "3"  # unique, and of a label
    if name == "digest":
        return "'0123456789abcdef'"
    if isinstance(column.type, Boolean):
        return f"NOT {name}"
    if isinstance(column.type, DateTime) or name in ("finished", "created"):
        return "'2026-01-01 00:00:00.000000'"
    if isinstance(column.type, Integer):
        return f"{name} + {-1 if name == 'a_id' else 1000}"  # a is before b
    if isinstance(column.type, Float):
        return f"{name} + 0.0000001"
    if isinstance(column.type, Json):
        return f"replace({name}, '5', '6')" if name in ("scores", "margins") else f"replace({name}, 'e', 'f')"
    return f"substr({name}, 2) || 'x'"


@pytest.mark.parametrize("url", databases.KINDS, indirect=True)
def test_every_column_of_every_table(store):
    """Each is changed once, and each time the whole store is not what was written."""
    check(store)
    assert len(COLUMNS) > 50
    for name, column_name in COLUMNS:
        column = TABLES[name].columns[column_name]
        with store.writing() as session:
            if store.is_sqlite:
                session.execute(text("PRAGMA defer_foreign_keys=ON"))
            else:
                session.execute(text("SET LOCAL session_replication_role = replica"))  # no foreign keys
            which = {"steps": "round = 0", "metrics": "round = 0", "labels": "id = 2"}.get(name, "id = 1")
            update = f"UPDATE {name} SET {column_name} = {another(column)} WHERE {which} RETURNING {column_name}"
            changed = session.execute(text(update)).scalar()
            assert changed is not None, f"{name}.{column_name} has no value to change"
            with pytest.raises(DamagedRow, match=f"of `{name}`"):
                check_rows(session)
            session.rollback()
    check(store)


def check(store):
    with store.reading() as session:
        check_rows(session)


def change(store, statement):
    with store.connection(writes=True) as connection:
        assert connection.execute(text(statement)).rowcount == 1


def test_whoever_reads_it_meets_it(store, tmp_path):
    """Also what was opened while it was whole: texts for training, routing, people and exports."""
    queue = Queue(store)
    reads = {
        "UPDATE candidates SET text = 'answex 3.0' WHERE text = 'answer 3.0'": [
            store.pairs,
            lambda: store.candidates(0),
            lambda: labelled(store),
            lambda: queue.next(1, count=4),
        ],
        "UPDATE prompts SET content = replace(content, 'number', 'numbes') WHERE id = 3": [
            store.pairs,
            store.prompts,
            lambda: labelled(store),
            lambda: queue.next(1, count=4),
        ],
        "UPDATE comparisons SET margins = '[1.5, -0.6]' WHERE id = 3": [store.pairs, lambda: queue.next(1, count=4)],
        "UPDATE labels SET outcome = 'a' WHERE key = 'machine'": [
            store.labels,
            lambda: labelled(store),
            lambda: export_labels(store, tmp_path / "out.jsonl"),
        ],
        "UPDATE annotators SET name = 'Adb' WHERE name = 'Ada'": [
            store.annotators,
            lambda: export_labels(store, tmp_path / "out.jsonl"),
        ],
        "UPDATE steps SET result = '{\"answers\": 9}'": [lambda: store.result(0, "collect")],
        "UPDATE metrics SET value = 0.25": [store.metrics],
    }
    for statement, asked in reads.items():
        table = statement.split()[1]
        for ask in asked:
            ask()
        before = keep(store, table)
        change(store, statement)
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        for ask in asked:
            with pytest.raises(
                StoreDamaged, match=rf"the store .* is damaged: row .* of `{table}` .*align feedback res"
            ):
                ask()
        assert not (tmp_path / "out.jsonl").exists()
        put_back(store, table, before)
    check(store)


def keep(store, table):
    with store.connection(writes=False) as connection:
        return [dict(row._mapping) for row in connection.execute(TABLES[table].select())]


def put_back(store, table, rows):
    keys = [column.name for column in TABLES[table].primary_key]
    with store.connection(writes=True) as connection:
        for row in rows:
            where = [TABLES[table].columns[key] == row[key] for key in keys]
            connection.execute(TABLES[table].update().where(*where).values(**row))


def test_a_number_of_answers_that_labels_do_not_bear_out(store):
    """By it the queue asks people, and the loop waits for them."""
    change(store, "UPDATE comparisons SET answered = answered + 1 WHERE id = 3")
    with pytest.raises(StoreDamaged, match="row 3 of `comparisons` has another number of answers than labels say"):
        check(store)


def test_what_cannot_be_read_any_more_is_damaged_too(store):
    for statement in (
        "UPDATE prompts SET content = 'no json' WHERE id = 1",
        "UPDATE prompts SET content = '[1]' WHERE id = 1",
        *(("UPDATE labels SET created = 'yesterday' WHERE id = 2", CAST_TEXT) if store.is_sqlite else ()),
    ):
        table = statement.split()[1]
        before = keep(store, table)
        change(store, statement)
        for read in (check, labelled):
            with pytest.raises(StoreDamaged, match="the store .* is damaged: "):
                read(store)
        put_back(store, table, before)


CAST_TEXT = "UPDATE candidates SET text = CAST(x'ff41' AS TEXT) WHERE id = 1"  # no UTF-8


def test_what_was_written_is_whole_however_a_database_keeps_it(store):
    """Numbers of another type, moments of another zone, NaN (SQLite's NULL), the zero that is less than none."""
    ids = fill(store, 6, round_=1)
    odd = [1, -0.0, nan, inf, 0.1 + 0.2, 0]
    store.set_comparisons(
        {key: {"judge_probability": value, "wanted": True} for key, value in zip(ids, odd, strict=True)}
    )
    store.set_comparisons({ids[0]: {"margins": (1, nan, -0.0, 1e300), "judge_flipped": 1}})
    store.add_labels(NewLabel(key, "judge", "a", f"odd-{key}", probability=p) for key, p in zip(ids, odd, strict=True))
    store.add_candidates(1, "odd", {"stop": ("a", "b"), "1": 2}, [(1, 0, 'quo"te \N{SNOWMAN}\r\n\u2028 \0 \ud800')])
    store.add_prompts([([{"role": "user", "content": "é\n"}], {"kwargs": {"a": None, "b": [1, 2.0]}})], "train")
    store.finish(1, "odd", {"threshold": inf, "none": None})
    store.set_metrics(1, {"one": 1, "none": nan})
    store.set_metrics(1, {"one": 2})
    check(store)


def test_what_is_set_later_gets_a_new_digest(store):
    """A prompt that came with labels and is one of the recipe's, an annotator who is invited anew."""
    rows = [("from a file", {"source": "file"})]
    assert store.add_prompts(rows, "imported") == store.add_prompts([("from a file", {"gold": "x"})], "train")
    Queue(store).invite("Ada", is_admin=False)
    store.set_scores({1: [3.0]})
    check(store)
    assert store.prompts()[5]["columns"] == {"gold": "x"} and store.candidates(0)[0].scores == [3.0]


def test_damage_is_never_sealed_by_what_is_written_later(store):
    change(store, "UPDATE comparisons SET prompt_id = 2 WHERE id = 3")
    with pytest.raises(StoreDamaged, match="row 3 of `comparisons`"):
        store.set_comparisons({3: {"route": "machine"}})
    change(store, "UPDATE metrics SET value = 0.25")
    with pytest.raises(StoreDamaged, match="row 0 kappa of `metrics`"):
        store.set_metrics(0, {"kappa": 0.75})


# ------------------------------------------------------------------------------------------------- stores and copies


def as_earlier(store):
    """The same store as version 2 made it."""
    with store.connection(writes=True) as connection:
        for name in TABLES:
            connection.execute(text(f"ALTER TABLE {name} DROP COLUMN digest"))
        connection.execute(text("UPDATE facts SET value = '2' WHERE name = 'version'"))


def test_a_store_of_the_version_before_gets_its_digests(url, tmp_path):
    store = filled(url)
    whole = {name: keep(store, name) for name in TABLES}
    as_earlier(store)
    store.close()
    for _ in range(2):
        store = Store(url)
        assert {name: keep(store, name) for name in TABLES} == whole
        assert store.fact("version") == "3"
        check(store)
        store.close()


def test_a_row_without_a_digest_is_damaged(store):
    """A header that says "no columns" makes SQLite read a row of NULLs."""
    change(store, "UPDATE labels SET digest = NULL WHERE id = 1")
    with pytest.raises(StoreDamaged, match="row 1 of `labels`"):
        check(store)


def test_a_row_whose_other_half_is_gone(tmp_path):
    """No join would find it, and an export would lack its labels."""
    file = tmp_path / "own.db"
    store = filled(str(file))
    store.close()
    with sqlite3.connect(file) as other:  # which knows of no foreign keys
        other.execute("DELETE FROM prompts WHERE id = 4")
    other.close()
    with pytest.raises(BadInput, match="belongs to a row of `prompts` that is not there"):
        open_store(str(file))


def test_a_copy_of_the_version_before_comes_back(tmp_path):
    store = filled(str(tmp_path / "store.db"))
    whole = {name: keep(store, name) for name in TABLES}
    copy = keep_copy(store, tmp_path, "store")
    earlier = Store(copy)
    as_earlier(earlier)
    earlier.close()
    extent = read_copy(copy).extent
    store.close()
    assert "3 labels" in restore(str(tmp_path / "store.db"), str(copy))
    store = Store(tmp_path / "store.db")
    for rows in (*whole.values(),):
        for row in rows:
            row.pop("token_hash", None)  # links end
    found = {name: keep(store, name) for name in TABLES}
    for row in found["annotators"]:
        row.pop("token_hash")
    assert found == whole
    assert store.fact("version") == "3" and newest_copy(tmp_path, "store").extent == extent
    check(store)
    store.close()


def test_a_damaged_store_is_not_copied_and_a_damaged_copy_is_passed_over(store, tmp_path):
    for _ in range(2):
        keep_copy(store, tmp_path, "store")
    first, second = copies_in(tmp_path, "store")
    change(store, "UPDATE candidates SET text = 'answex' WHERE id = 3")
    with pytest.raises(RunFailed, match=r"is damaged \(row 3 of `candidates` is not what was written\); no copy"):
        keep_copy(store, tmp_path, "store")
    assert copies_in(tmp_path, "store") == [first, second]
    second.write_bytes(second.read_bytes().replace(b"answer 2.1", b"answer 2.0"))
    with pytest.raises(BadInput, match=r"cannot be brought back \(row 4 of `candidates`"):
        read_copy(second)
    assert newest_copy(tmp_path, "store").path == first


def test_a_store_that_is_named_itself(tmp_path):
    """One line, nothing written."""
    file = tmp_path / "own.db"
    filled(str(file)).close()
    assert file.read_bytes().count(b"answer 2.1") == 1
    file.write_bytes(file.read_bytes().replace(b"answer 2.1", b"answer 2.0"))
    with pytest.raises(
        BadInput, match=r"own.db is damaged: row 4 of `candidates` .*align feedback restore .*own.db FILE"
    ):
        open_store(str(file))
    with pytest.raises(BadInput, match="is damaged"):
        export_run(str(file), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_export_of_all_labels_goes_into_a_store_that_is_whole(store, tmp_path):
    export_labels(store, tmp_path / "out.jsonl")
    other = Store(tmp_path / "other.db", create=True)
    assert import_labels(other, tmp_path / "out.jsonl").taken == 4
    check(other)
    assert other.labels()[0].created.astimezone(UTC) == store.labels()[0].created
    other.close()
