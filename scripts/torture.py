"""Kills runs at random moments, starts them again, and compares with the run that nobody disturbed, bit for bit.

    python scripts/torture.py --kills 100 --seed 0 [--only sft,loop] [--work DIR]

Each kill: a tiny stage, pipeline, loop or labelling page under load is started as a user starts it; at a random moment
SIGKILL, SIGTERM or SIGINT goes to the parent, to one of its children, or to all; sometimes twice. Then the same command
runs until it is done. Weights, figures without times, and labels must be those of the undisturbed one, and nothing may
be left over: no process, no temporary name, no checkpoint. Kill number n of a seed is always the same but for the
machine's speed. Results are added to DIR/results.jsonl as they come; the same command goes on after the last of them.

`database` is a loop of two rounds, its stages in its own process, whose store is on a PostgreSQL server that dies and
is started again every 2 seconds (by SIGKILL to all its processes, or its own immediate shutdown, at random), from the
moment that the loop has its store until it ends. The command is given once; labels and weights must be those of the
quiet loop, whose store is a SQLite file. Only with `--only`, and where PostgreSQL is installed:

    python scripts/torture.py --only database --kills 3
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from align.files import is_temporary  # noqa: E402
from align.processes import processes_with  # noqa: E402
from align.track import read_metrics  # noqa: E402
from tests import databases, test_load, test_loop, tiny  # noqa: E402

ALONE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
MARK = "ALIGN_TORTURE"  # in the environment of all that is started
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("parent", "child", "group")
AGAIN = 0.3  # of the runs are killed a second time
TIMES = ("seconds", "tokens_per_second", "peak_mib", "runtime", "per_second")
TRIES = 4  # of the same command, until it must be done
LIMIT = 900.0  # seconds that a command may take
EVERY = 2.0  # seconds from one death of a database to the next
PEOPLE, PAIRS = 3, 60


@dataclass(frozen=True)
class Result:
    """What became of one kill: `wrong` is empty where all is as it should be."""

    number: int
    what: str
    how: str
    wrong: str


@dataclass(frozen=True)
class Command:
    """What a user types, where it writes, and what of that must be the same in the end."""

    words: tuple[str, ...]
    folder: Path
    outcome: Callable[[], Any]
    module: str = "align.cli"


# --------------------------------------------------------------------------------------------------- what is killed


class World:
    """The tiny base, its data and finished runs, and how each thing that is killed is set up in a new folder."""

    def __init__(self, work: Path):
        self.work, self.base, self.data, self.runs = work, work / "base", work / "data", work / "runs"
        if not (work / "made").exists():
            for folder in (self.base, self.data, self.runs):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            tiny.make_base(self.base)
            tiny.make_data(self.data)
            for stage in ("sft", "reward"):
                tiny.run(tiny.settings(stage, self.base, self.data, self.runs / stage))
            (work / "made").touch()

    def stage(self, name: str, folder: Path, **changes: Any) -> Command:
        values = tiny.recipe(name, self.base, self.data, folder / name, **changes)
        text = yaml.safe_dump(values)
        for parent in ("sft", "reward"):
            if parent != name:
                text = text.replace(str(folder / parent), str(self.runs / parent))
        return self._run(text, folder)

    def pipeline(self, folder: Path) -> Command:
        stages = {}
        for name in ("sft", "reward", "ppo"):
            values = tiny.recipe(name, self.base, self.data, folder / "out" / name)
            stages[name] = {key: value for key, value in values.items() if key not in ("model", "output", "launch")}
        values = {"model": {"base": str(self.base)}, "launch": "cpu", "output": str(folder / "out"), "stages": stages}
        return self._run(yaml.safe_dump(values, sort_keys=False), folder)

    def database(self, folder: Path, **changes: Any) -> Command:
        recipe = test_loop.recipe(self.base, self.data, folder, **changes)
        return Command((recipe,), folder, lambda: _labels_and_weights(recipe, folder), "tests.helpers.loop_here")

    def loop(self, folder: Path) -> Command:
        recipe = test_loop.recipe(self.base, self.data, folder, num_rounds=1)
        return Command(("loop", recipe), folder, lambda: _labels_and_weights(recipe, folder))

    def _run(self, text: str, folder: Path) -> Command:
        path = folder / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return Command(("run", str(path)), folder, lambda: _weights_and_figures(folder))

    def make(self, what: str, folder: Path) -> Command:
        folder.mkdir(parents=True)
        made: dict[str, Callable[[], Command]] = {
            "sft": lambda: self.stage("sft", folder, method={"kind": "lora", "r": 4, "lora_dropout": 0.2}),
            "reward": lambda: self.stage("reward", folder, method={"kind": "lora", "r": 4, "lora_dropout": 0.2}),
            "dpo": lambda: self.stage("dpo", folder),
            "ppo": lambda: self.stage("ppo", folder),
            "two": lambda: self.stage("ppo", folder, launch="ddp"),
            "pipeline": lambda: self.pipeline(folder),
            "loop": lambda: self.loop(folder),
            "database": lambda: self.database(folder),
        }
        return made[what]()


KINDS = ("sft", "reward", "dpo", "ppo", "two", "pipeline", "loop", "page")
BY_NAME = ("database",)  # takes minutes each, and PostgreSQL


def _weights_and_figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.rglob("metrics.jsonl")):
        rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in read_metrics(file.parent)]
        found[str(file.relative_to(folder))] = rows
    for file in sorted(folder.rglob("samples.jsonl")):
        found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _labels_and_weights(recipe: str, folder: Path) -> dict[str, Any]:
    from align.loop.rounds import load_loop

    return test_loop.state(load_loop(recipe), folder)


# ----------------------------------------------------------------------------------------------------- how it is killed


def start(command: Command, mark: str) -> subprocess.Popen[bytes]:
    """The command as a process group of its own, whose every process carries `mark`."""
    return subprocess.Popen(
        [sys.executable, "-m", command.module, *command.words],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=(command.folder / "stderr.txt").open("ab"),
        start_new_session=True,
    )


def strike(
    process: subprocess.Popen[bytes], mark: str, number: signal.Signals, target: str, rng: random.Random
) -> None:
    """Sends the signal to the command, to one of the processes under it, or to all of them."""
    under = [pid for pid in processes_with(MARK, mark) if pid != process.pid]
    struck = {"parent": [process.pid], "child": rng.sample(under, 1) if under else [process.pid]}
    for pid in struck.get(target, [process.pid, *under]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until_gone(process: subprocess.Popen[bytes], mark: str) -> str:
    """Waits for the command and for all under it; what is wrong where they stay."""
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        for pid in processes_with(MARK, mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return f"the command hung for {LIMIT:g} s"
    end = time.monotonic() + 150  # what a stage has to save and end
    while left := processes_with(MARK, mark):
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return f"{len(left)} processes were left over"
        time.sleep(0.05)
    return ""


def left_over(folder: Path) -> str:
    """What of a run under way is still in a folder whose runs are all finished."""
    unwanted = ("checkpoints", ".status.json")
    found = [p for p in folder.rglob("*") if is_temporary(p.name) or p.name.endswith(unwanted)]
    return ", ".join(str(path.relative_to(folder)) for path in found)


def kill_one(number: int, what: str, world: World, whole: dict[str, Any], seconds: float, rng: random.Random) -> Result:
    """One kill of a stage, a pipeline or a loop, and what came of it."""
    folder, mark = world.work / f"kill-{number}", f"{os.getpid()}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    command, told, wrong = world.make(what, folder), [], ""
    strikes = 2 if rng.random() < AGAIN else 1
    moments = [(rng.random() * seconds, rng.choice(SIGNALS), rng.choice(TARGETS)) for _ in range(strikes)]
    code = 1
    for attempt in range(strikes + TRIES):
        process = start(command, mark)
        if attempt < strikes:
            moment, which, target = moments[attempt]
            told.append(f"{which.name} to {target} at {moment:.1f} s")
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                strike(process, mark, which, target, rng)
        wrong = wrong or wait_until_gone(process, mark)
        code = process.returncode
        if code == 0 and attempt >= strikes - 1:
            break
    if code != 0:
        wrong = wrong or f"the same command ends with code {code}: {_last_line(folder / 'stderr.txt')}"
    elif not wrong:
        wrong = _difference(whole, command.outcome()) or left_over(folder)
    if not wrong:
        shutil.rmtree(folder)
    return Result(number, what, "; ".join(told), wrong)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _difference(whole: dict[str, Any], cut: dict[str, Any]) -> str:
    differs = [key for key in sorted(whole.keys() | cut.keys()) if whole.get(key) != cut.get(key)]
    return f"other than undisturbed: {', '.join(differs)}" if differs else ""


# --------------------------------------------------------------------------------------------------------- the page


def kill_page(number: int, world: World, rng: random.Random) -> Result:
    """People label while the page is killed and comes back: every answer that was acknowledged is there, once."""
    folder = world.work / f"kill-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = folder / "store.db"
    test_load.new_run(str(store), PAIRS)
    which, moment = rng.choice(SIGNALS), rng.random() * 2.0
    names = [f"person-{k}" for k in range(PEOPLE)]
    server = test_load.Server(str(store), people=names)
    browsers = [test_load.Browser(server.port, server.tokens[name]) for name in names]
    threads = [threading.Thread(target=browser.label, args=(PAIRS,), daemon=True) for browser in browsers]
    for thread in threads:
        thread.start()
    time.sleep(moment)
    server.stop(which)
    again = test_load.Server(str(store), port=server.port)
    for thread in threads:
        thread.join(LIMIT)
    again.stop()
    wrong = ""
    try:
        test_load.check(str(store), browsers)
    except AssertionError as error:
        wrong = f"other labels than were given: {str(error)[:200]}"
    for browser in browsers:
        browser.close()
    if not wrong:
        shutil.rmtree(folder)
    return Result(number, "page", f"{which.name} to parent at {moment:.1f} s", wrong)


# ------------------------------------------------------------------------------------------------------ the database


def kill_database(number: int, world: World, whole: dict[str, Any], rng: random.Random) -> Result:
    """A loop runs to its end while its database dies every two seconds: what comes of it is that of the quiet one."""
    folder, mark = world.work / f"kill-{number}", f"{os.getpid()}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    server = databases.Server(databases.programs())
    try:
        command = world.database(folder, store=server.url(server.new_database()))
        process = start(command, mark)
        while process.poll() is None and not (folder / "loop" / "loop.json").exists():
            time.sleep(0.01)
        deaths, begun = 0, time.monotonic()
        while process.poll() is None and time.monotonic() < begun + LIMIT:
            deaths += 1
            time.sleep(max(0.0, begun + deaths * EVERY - time.monotonic()))
            server.restart(rng.choice((signal.SIGKILL, signal.SIGQUIT)))
        seconds = time.monotonic() - begun
        wrong = wait_until_gone(process, mark)
        if process.returncode != 0:
            wrong = wrong or f"it ends with code {process.returncode}: {_last_line(folder / 'stderr.txt')}"
        wrong = wrong or _difference(whole, command.outcome()) or left_over(folder)
    finally:
        server.stop()
    if not wrong:
        shutil.rmtree(folder)
    return Result(number, "database", f"{deaths} deaths in {seconds:.0f} s", wrong)


# ------------------------------------------------------------------------------------------------------------- all


def undisturbed(what: str, world: World) -> tuple[dict[str, Any], float]:
    """What an undisturbed run comes to, and the seconds that it takes; kept in the work folder."""
    kept = world.work / f"whole-{what}.json"
    if not kept.exists():
        folder = world.work / f"whole-{what}"
        shutil.rmtree(folder, ignore_errors=True)
        command, begun = world.make(what, folder), time.monotonic()
        process = start(command, f"{os.getpid()}-whole")
        wrong = wait_until_gone(process, f"{os.getpid()}-whole")
        if wrong or process.returncode:
            sys.exit(f"{what} does not run undisturbed: {wrong or _last_line(folder / 'stderr.txt')}")
        seconds = time.monotonic() - begun
        kept.write_text(json.dumps([command.outcome(), seconds]), encoding="utf-8")
    outcome, seconds = json.loads(kept.read_text(encoding="utf-8"))
    return outcome, seconds


def main() -> None:
    """Kills, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    names = ",".join((*KINDS, *BY_NAME))
    parser.add_argument("--only", default=",".join(KINDS), help=f"some of {names}")
    parser.add_argument("--work", type=Path, help="a folder that is kept; else a temporary one")
    given = parser.parse_args()
    os.environ.update(ALONE | {"PYTHONPATH": str(ROOT)})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, as would what we start
    kinds = given.only.split(",")
    if unknown := set(kinds) - {*KINDS, *BY_NAME}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: some of {names}")
    if "database" in kinds and databases.programs() is None:
        parser.error("--only database: PostgreSQL's programs are not installed (Debian's package `postgresql`)")
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        work = (given.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        results = torture(World(work), kinds, given.kills, given.seed)
    show(results)
    sys.exit(any(result.wrong for result in results))


def torture(world: World, kinds: list[str], kills: int, seed: int) -> list[Result]:
    """Goes on after the last result that is there already."""
    file = world.work / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    results = [Result(**json.loads(line)) for line in lines][:kills]
    for number in range(len(results), kills):
        rng = random.Random(f"torture {seed} {number}")
        what = kinds[number % len(kinds)]
        if what == "page":
            result = kill_page(number, world, rng)
        elif what == "database":
            result = kill_database(number, world, undisturbed(what, world)[0], rng)
        else:
            result = kill_one(number, what, world, *undisturbed(what, world), rng)
        results.append(result)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(result)) + "\n")
        print(f"{number + 1}/{kills}  {what}: {result.how}: {result.wrong or 'as undisturbed'}", flush=True)
    return results


def show(results: list[Result]) -> None:
    """A line for each thing that was killed."""
    print(f"\n{'killed':<10} {'kills':>5} {'as undisturbed':>15}")
    for what in (*dict.fromkeys(result.what for result in results), "all"):
        own = [result for result in results if what in (result.what, "all")]
        print(f"{what:<10} {len(own):>5} {sum(not result.wrong for result in own):>15}")


if __name__ == "__main__":
    main()
