"""Runs a loop's rounds, step by step, from where it stopped."""

import json
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from align.data import Prompt
from align.endings import last
from align.errors import BadInput
from align.feedback.copies import BACKUPS
from align.feedback.database import BESIDE, KEPT, MADE_OF, MARK, NoStore, write_loop
from align.feedback.kept import at_work_on
from align.feedback.store import Store
from align.files import clear_temporaries
from align.hub import name_all
from align.identity import changed_part, data_parts, equal_paths, model_parts
from align.launch import check_here, start
from align.launch_plan import plan
from align.locks import LOCK, at_work_in
from align.loop.context import Context, Halt, Result, Start
from align.loop.keeping import keep, open_loop, put_away_damaged, tell_store, told_of
from align.loop.patience import outlast
from align.loop.rounds import Loop
from align.loop.steps import STEPS, Prompts, bring_back_files, prompts_of, why_to_stop
from align.manifest import MANIFEST, which_run
from align.parents import check_start, resolved
from align.preflight import check_ahead, check_data, check_recipe, launches
from align.recipe import Recipe
from align.recipe_errors import first_error
from align.recipe_file import is_within
from align.report.loop_page import report
from align.resumption import CHANGEABLE, differences, goes_on, is_harmless, state_of
from align.rewards import check_columns, check_rewards
from align.rewards.columns import missing_columns
from align.settings import Reward, StageSettings
from align.settings.about import POLICIES
from align.settings.loop import OURS, LoopSettings, Simulated
from align.wording import brief, safe

# while a loop stands still; a store has its mark
MAY_CHANGE = {"full_determinism", "launch", "track", "num_rounds", "stop", "store", "output"}
# section -> the round and the step (and its folder) that read it first: until then what was wrong may be put right
FIRST_READ = {"ensemble": (0, "reward"), "ppo": (0, "ppo"), "evaluation": (0, "evaluate"), "judge": (1, "score")}


def run_loop(loop: Loop, start_stage: Start | None = None) -> int:
    """Runs what is not done. Returns 0 when the loop is over or waits for people, else a stage's exit code.

    Raises:
        BadInput: something is wrong with the recipe, or the output holds another loop; nothing was started.
    """
    prompts = check_loop(loop)
    if start_stage is None:
        launch = plan(loop.settings.launch)

        def start_stage(settings: StageSettings, path: Path) -> tuple[int, str]:
            return start(launch, settings, path)

        print(f"{loop.settings.num_rounds} rounds in {loop.out}, {launch.description}", flush=True)
    with at_work_in(loop.out):  # what goes away meanwhile is waited for below; here, while the store is opened
        return outlast(lambda: _run(loop, prompts, start_stage))


def _run(loop: Loop, prompts: Prompts, start_stage: Start) -> int:
    clear_temporaries(loop.out, *loop.out.glob("round-*"))
    try:
        with _opened(loop) as (store, told):
            for split, rows in prompts.items():
                outlast(partial(store.add_prompts, rows, split))
            sft = loop.sft()
            for line in loop.change(sft) if sft is not None else ():
                print(f"changed: {line}", flush=True)
            if sft is not None and state_of(sft) != "finished":
                code, reason = start_stage(sft, Path(f"{sft.output}.yaml"))
                if code:
                    raise Halt(code, reason)
            for number in range(loop.settings.num_rounds):
                this = Context(loop, store, number, start_stage)
                _round(this, lambda: keep(loop, store, told))
                verdict = outlast(partial(store.result, number, "decide")) or {}
                # not the stored reason: the recipe may allow more now
                if why := outlast(partial(why_to_stop, this, verdict)):
                    print(f"ends after round {number}: {why}", flush=True)
                    break
        print(f"kept: {verdict['kept']}, {loop.policies(number)[verdict['kept']]}", flush=True)
        print(outlast(partial(report, loop.out, loop.store), was_open=True), flush=True)
        return 0
    except Halt as halt:
        if halt.code:
            last.say(str(halt))
        elif str(halt):
            print(str(halt), flush=True)
        return halt.code


@contextmanager
def _opened(loop: Loop) -> Iterator[tuple[Store, dict]]:
    """The loop's store, and what loop.json says. They carry one mark, by which each knows the other as its own.

    Raises:
        BadInput: the store cannot be opened, is not the one that the loop had, or is another loop's, whose rounds would
            be taken for this one's.
    """
    told, remark = told_of(loop)
    mark = told.get(MARK) or uuid.uuid4().hex
    store = open_loop(loop, told) or Store(loop.store, create=True)
    try:
        _check_mark(loop, store, mark)
        with at_work_on(store):
            if remark:
                print(safe(f"note: {remark}"), flush=True)
                put_away_damaged(loop)
            now = {MARK: mark, MADE_OF: _made_of(loop)} | _values(loop.settings)
            write_loop(loop.out, now | {key: told[key] for key in (KEPT,) if key in told})
            store.fact(MARK, mark)
            tell_store(store, now)
            keep(loop, store, now)  # last: from here on the store is missed where it is not found
            yield store, now
    finally:
        store.close()


def _round(this: Context, done: Callable[[], None]) -> None:
    for name, step in STEPS.items():
        if outlast(partial(this.store.result, this.round, name)) is not None:
            continue
        begun = time.perf_counter()
        outlast(partial(bring_back_files, this))
        print(f"[round {this.round}] {name}", flush=True)
        result = outlast(partial(_step, this, name, step))
        outlast(done)
        print(f"[round {this.round}] {name}: {_told(name, result)}{time.perf_counter() - begun:.0f} s", flush=True)


def _step(this: Context, name: str, step: Callable[[Context], Result]) -> Result:
    result = step(this)
    this.store.finish(this.round, name, result)
    return result


def _told(name: str, result: dict) -> str:
    """A step's result in a line."""
    if "compare" in result:
        by_judge = result.get("compare_by_judge", [])
        return _won(result["compare"]) + (f"by the judge {_won(by_judge)}" if by_judge else "")
    if name == "decide":
        raised = "".join(f"{alarm}; " for alarm in result["alarms"])
        return f"keeps {result['kept']}; {'ALARM: ' + raised if raised else ''}"
    shown = {k: v for k, v in result.items() if isinstance(v, (int, float))}
    return "".join(f"{key} {value:.3g}, " for key, value in list(shown.items())[:6])


def _won(compare: list[dict]) -> str:
    return "".join(
        f"{row['win_rate']:.1%} against {row['incumbent']} ({row['low']:.1%} to {row['high']:.1%}), " for row in compare
    )


def check_loop(loop: Loop) -> Prompts:
    """Everything that can be wrong with a loop before it runs; returns its prompts (`prompts_of`).

    Raises:
        BadInput: with the recipe's file, the key and the cure.
    """
    name_all(_values(loop.settings))  # all of it, also what only its later stages read
    stages: dict[str, StageSettings] = {}
    sft = loop.sft()
    if sft is not None:
        stages["sft"] = sft
    else:
        check_start(loop.sft_folder, POLICIES, f"{loop.path}: `sft.from`")
    # prompts are read as a stage would read them; what stages start from is made on the way
    reads = loop.collect(0, loop.sft_folder, loop.sft_folder)
    for name, data in (("prompts", loop.settings.prompts), ("evaluation", loop.settings.evaluation.prompts)):
        stages[name] = reads.model_copy(update={"prompts": data, "output": str(loop.out / f".{name}")})
    check_recipe(Recipe(loop.path, stages, is_pipeline=True), [f"stages.{word}" for word in loop.changes])
    later = later_stages(loop)
    for launch in launches(Recipe(loop.path, stages | later, is_pipeline=True), [*stages, *later]).values():
        with _naming(loop):
            check_here(launch)
    _check_later(loop, later)
    if isinstance(loop.settings.annotators, Simulated):
        with _naming(loop):
            check_rewards([Reward(use=loop.settings.annotators.use)], "annotators")
    _check_output(loop)
    prompts = prompts_of(loop)
    _check_columns(loop, prompts)
    return prompts


@contextmanager
def _naming(loop: Loop, section: str = "") -> Iterator[None]:
    """Puts the recipe's file, and a section in which the stage's keys stand, before what is wrong."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{loop.path}: {f'in `{section}`: ' if section else ''}{error}") from error


def later_stages(loop: Loop) -> dict[str, StageSettings]:
    """The stages that run only after people have labelled, by their section in the recipe, if they have one."""
    return {
        "score": loop.score(1),
        "ensemble": loop.reward(0),
        "ppo": loop.ppo(0, loop.sft_folder),
        "evaluation": loop.evaluate(0, has_held_out=True),
    }


def _check_later(loop: Loop, later: Mapping[str, StageSettings]) -> None:
    """What would fail only after people have labelled: methods, runs, functions, judges and data that the recipe
    names."""
    sft, collect, ensemble = loop.sft(), loop.collect(1, loop.sft_folder, loop.sft_folder), loop.reward(0)
    own = [sft, collect, ensemble, *ensemble.members(), loop.held_out(0), later["ppo"]]
    made = {resolved(each.output): each for each in own if each is not None}
    for name, settings in later.items():
        with _naming(loop, name if name in LoopSettings.model_fields else ""):
            check_ahead(settings, made)
            for key, (kind, data) in settings.data_sections().items():
                if name in OURS and key not in OURS[name]:
                    check_data(key, kind, data, {})


def _check_columns(loop: Loop, prompts: Prompts) -> None:
    """What reward functions ask for is in the prompts that they will see."""
    train, unseen = (
        [Prompt(prompt, dict(columns), "") for prompt, columns in prompts[s]] for s in ("train", "evaluation")
    )
    with _naming(loop):
        check_columns(loop.evaluate(0, has_held_out=True), unseen, "evaluation.")
        check_columns(loop.score(1), train)
        check_columns(loop.ppo(0, loop.sft_folder), train, "ppo.")
        if isinstance(loop.settings.annotators, Simulated):
            missing_columns(loop.settings.annotators.use, {}, [*train, *unseen], key="annotators", place="")


def _check_output(loop: Loop) -> None:
    """The folder is new, or this loop's, and its store is the one that it had."""
    written, _ = told_of(loop)
    if set(written) - set(BESIDE):
        parts_before, parts = written.get(MADE_OF, {}), _made_of(loop)
        before, now = _values(_as_read_now(loop, written)), _values(loop.settings)
        equal = equal_paths(parts_before, parts)
        others = [section for section in now if section not in MAY_CHANGE and before[section] != now[section]]
        done = _steps_done(loop, written) if others else []
        for section in others:
            found = differences(before[section], now[section], section)  # none: a key that is null, or left out
            changed = [
                (key, was, becomes)
                for key, was, becomes in found
                if key not in equal and not _may_be(key, loop, done) and not goes_on(key, was, becomes)
            ]
            if not changed and (found or _may_be(section, loop, done)):
                continue
            key, was, becomes = changed[0] if changed else (section, before[section], now[section])
            how = "to go on with it so, give the key after `--set`; else " if _may_change(key) else ""
            raise BadInput(
                f"{loop.path}: `output`: {loop.out} holds a loop of another recipe (`{key}` was {brief(was)}, is "
                f"{brief(becomes)}); {how}write it as it was, or choose another output"
            )
        what = changed_part(parts_before, parts)
        if what is not None:
            raise BadInput(
                f"{loop.path}: `output`: {loop.out} holds a loop of other contents: {what}; bring them back, or choose "
                "another output"
            )
    elif MARK in written:
        pass  # made anew from the store of an earlier version, which did not keep the recipe
    elif loop.out.is_file() or (loop.out.is_dir() and any(not _may_be_there(p.name) for p in loop.out.iterdir())):
        raise BadInput(f"{loop.path}: `output`: {loop.out} holds files that are no loop; choose another folder")
    if (loop.out / MANIFEST).is_file():
        raise BadInput(f"{loop.path}: `output`: {loop.out} is a run's folder; choose another")
    store = open_loop(loop, written)
    if store is None:
        with _naming(loop), suppress(NoStore):  # it is made
            store = Store(loop.store, migrates=False)
    if store is not None:
        with closing(store):
            _check_mark(loop, store, written.get(MARK))


def _check_mark(loop: Loop, store: Store, mark: str | None) -> None:
    if store.fact(MARK) not in (None, mark):
        raise BadInput(f"{loop.path}: `store`: {store} belongs to another loop; name a database of its own")


def _steps_done(loop: Loop, written: dict) -> list[tuple[int, str]]:
    store = open_loop(loop, written)
    if store is None:
        return []
    with closing(store):
        return store.steps()


def _may_be(key: str, loop: Loop, done: Container[tuple[int, str]]) -> bool:
    """Whether a key may be another than the loop began with; `done` are its steps."""
    first = None if is_within(key, "evaluation.prompts") else FIRST_READ.get(key.partition(".")[0])
    is_unread = first is not None and first not in done and not (loop.folder(first[0]) / first[1]).exists()
    return is_unread or is_harmless(key) or (_may_change(key) and loop.names(key))


def _may_change(key: str) -> bool:
    """Whether a key of a stage's section may become another where the loop's user says so."""
    section, _, own = key.partition(".")
    return section in OURS and CHANGEABLE.fullmatch(own) is not None


def _made_of(loop: Loop) -> dict[str, dict[str, str]]:
    """What a loop is made of beside its recipe's words: base, template, prompts, and the SFT run that it names."""
    s = loop.settings
    found = model_parts(s.model) | data_parts(s.prompts, "prompts")
    found |= data_parts(s.evaluation.prompts, "evaluation.prompts")
    if loop.sft() is None:
        found["sft.from"] = {"what": "run", "path": loop.sft_folder, "fingerprint": which_run(loop.sft_folder)}
    return found


def _may_be_there(name: str) -> bool:
    """What may be in a loop's folder before it runs: its SFT run, and a store that labels were brought into."""
    return name in ("sft", LOCK, BACKUPS) or name.startswith("store.db")


def _as_read_now(loop: Loop, written: dict) -> LoopSettings:
    """A recipe that was written by this version, or by an earlier one, which knew fewer keys."""
    try:
        return LoopSettings.model_validate({k: v for k, v in written.items() if k not in BESIDE})
    except ValidationError as error:
        raise BadInput(
            f"{loop.path}: `output`: {loop.out} holds a loop whose recipe this version does not take "
            f"({first_error(error, LoopSettings, '')}); choose another output"
        ) from error


def _values(settings: LoopSettings) -> dict:
    """A loop's recipe as JSON values."""
    return dict(json.loads(settings.model_dump_json(by_alias=True)))
