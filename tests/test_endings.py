"""How commands and stages end: the exit code, and the one line that comes last."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from align import endings
from align.endings import Ending, ending_of, keep_traceback, without_secrets
from align.errors import BadInput, RunFailed

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds


def raised(error):
    """The error with a traceback and a cause."""
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise error from inner
    except BaseException as caught:
        return caught


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").touch()
    return folder


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (BadInput("no\nsuch"), Ending(2, r"no\nsuch")),
        (RunFailed("diverged"), Ending(1, "diverged")),
        (KeyboardInterrupt(), Ending(130, "interrupted")),
        (OSError(errno.ENOSPC, "No space left on device"), Ending(1, "No space left on device")),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), Ending(1, "a/b: Permission denied")),
    ],
)
def test_what_has_words_of_its_own_leaves_no_log(error, ending, begun):
    assert ending_of(raised(error), begun) == ending
    assert [path.name for path in begun.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), SystemExit(0), MemoryError(), BrokenPipeError(32, "of a socket")]
)
def test_what_nobody_foresaw_is_one_line_that_names_the_log(error, begun):
    for _ in range(2):
        ending = ending_of(raised(error), begun / "other", begun)
        assert ending.code == 1 and "\n" not in ending.line and ending.line.startswith(type(error).__name__)
        assert ending.line.endswith(f"(full traceback: {begun}/error.log)")
    log = (begun / "error.log").read_text()
    assert log.count("Traceback") == 4 and "KeyError: 'inner'" in log and log.count(" UTC, process ") == 2
    assert (begun / "error.log").stat().st_mode & 0o077 == 0


def test_a_folder_that_was_not_begun_takes_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(endings.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = keep_traceback(raised(ValueError("x")), [tmp_path])
    assert path.parent.name == "temporary" and "ValueError: x" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["temporary"]
    monkeypatch.setattr(endings.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert keep_traceback(raised(ValueError("x"))) == Path("/dev/null")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_strangers_log_is_not_written_through(kind, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(endings.tempfile, "tempdir", str(tmp_path))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    log = begun / "error.log"
    {"link": lambda: log.symlink_to(victim), "pipe": lambda: os.mkfifo(log), "folder": log.mkdir}[kind]()
    assert keep_traceback(raised(ValueError("x")), [begun]).name.startswith("align-error-")
    assert victim.read_text() == "mine"


def test_secrets_stay_out_of_lines_and_logs(begun, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-hidden-1")
    monkeypatch.setenv("HF_TOKEN", "hf_hidden-2\n")
    ending = ending_of(raised(ValueError("sk-hidden-1 hf_hidden-2 postgresql://me:pw-3@host/db")), begun)
    for text in (ending.line, (begun / "error.log").read_text()):
        assert "hidden" not in text and "pw-3" not in text and "postgresql://***@host/db" in text
    monkeypatch.setenv("EMPTY_TOKEN", "")
    assert without_secrets("as it was") == "as it was"


# ------------------------------------------------------------------------------------------------------- the command


def align(*words, code=None, **options):
    """`align words`, or the command with a line of Python before it."""
    start = (
        ["-c", f"{code}\nimport sys\nfrom align import cli\ncli.main()"] if code is not None else ["-m", "align.cli"]
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, *start, *map(str, words)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options,
    )


def ended(*words, **options):
    """Exit code, standard output and standard error."""
    with align(*words, **options) as process:
        out, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, errors


BREAKING = "import align.resources as module\ndef recipes_folder():\n    {body}\nmodule.recipes_folder = recipes_folder"


def test_a_fault_of_ours_is_one_line_after_all_that_others_print(tmp_path):
    noisy = """
        import atexit, threading, time
        atexit.register(print, "a library says goodbye", flush=True)
        threading.Thread(target=lambda: (time.sleep(0.2), print("so does a thread", flush=True))).start()
        class Late:
            def __del__(self): print("and a destructor")
        kept = Late()
    """
    code = (
        "from align.endings import last; last.hold()\n"
        + textwrap.dedent(noisy)
        + BREAKING.format(body="raise ValueError('odd')")
    )
    code, both, _ = ended("recipes", code=code, stderr=subprocess.STDOUT, environment={"TMPDIR": str(tmp_path)})
    assert code == 1
    *before, final = both.splitlines()
    (log,) = tmp_path.iterdir()
    assert final == f"align: ValueError: odd (full traceback: {log})" and "in recipes_folder" in log.read_text()
    assert set(before) == {"a library says goodbye", "so does a thread"}


def test_a_reader_that_goes_away_ends_a_command_quietly():
    code = BREAKING.format(
        body="from pathlib import Path; import time; time.sleep(1); return Path('recipes').resolve()"
    )
    with align("recipes", code=code, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=TIMEOUT) == 141


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        assert ended("recipes", stdout=full) == (1, None, "align: No space left on device\n")


def test_closed_streams_are_no_place_for_the_next_file(tmp_path):
    code = BREAKING.format(body=f"open({str(tmp_path / 'store')!r}, 'w').write('rows'); raise ValueError('odd')")
    words = [sys.executable, "-c", f"{code}\nfrom align import cli\ncli.main()", "recipes"]
    shell = " ".join(f"'{word}'" if "'" not in word else '"$CODE"' for word in words) + " >&- 2>&- <&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CODE": words[2], "TMPDIR": str(tmp_path)}
    done = subprocess.run(["sh", "-c", shell], env=environment, timeout=TIMEOUT)
    assert done.returncode == 1 and (tmp_path / "store").read_text() == "rows"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_with_its_finally_blocks_run(number, tmp_path):
    mark = str(tmp_path / "mark")
    # the mark is made inside of the `try`: a signal that came between the two would find no `finally` to run
    waiting = f"open({mark!r}, 'w').close(); time.sleep(60)"
    body = f"import time\n    try: {waiting}\n    finally: open({mark + '.end'!r}, 'w').close()"
    with align("recipes", code=BREAKING.format(body=body)) as process:
        end = time.monotonic() + TIMEOUT
        while not os.path.exists(mark) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        out, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, errors) == (128 + number, "", f"align: stopped by {number.name}\n")
    assert os.path.exists(f"{mark}.end")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["chekc"], "align: No such command 'chekc'. Did you mean 'check'? (see `align --help`)"),
        (["check"], "align: Missing argument 'RECIPE' (see `align check --help`)"),
        (["run", "--qqq", "x.yaml"], "align: No such option: --qqq (see `align run --help`)"),
    ],
)
def test_words_that_the_command_does_not_take_are_one_line(words, line):
    code, out, errors = ended(*words)
    assert (code, out) == (2, "") and errors.replace("python -m align.cli", "align") == f"{line}\n"


# ------------------------------------------------------------------------------------------------------------ a stage


def own_stage(folder, base, body):
    """A recipe with a stage of one's own, whose `run` has this body after the folder was begun."""
    (folder / "own.py").write_text(
        "from align.artifact import begin\nfrom align.settings import StageSettings\n"
        "class Own(StageSettings):\n    stage: str\n    def run(self, worker):\n        begin(self, 'x')\n"
        + textwrap.indent(textwrap.dedent(body), " " * 8)
    )
    values = {
        "stage": f"{folder}/own.py:Own",
        "model": {"base": str(base)},
        "output": str(folder / "out"),
        "launch": "cpu",
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    return folder / "own.yaml"


def test_what_ends_a_stage_from_within_is_the_last_line_and_a_log(base, tmp_path):
    body = """
        import align.worker, subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); print('a child says goodbye')"])
        class Broken:
            def end_training(self): raise SystemExit(0)  # as a library may, within ours
        worker.accelerator = Broken()
    """
    code, both, _ = ended("run", own_stage(tmp_path, base, body), stderr=subprocess.STDOUT, cwd=ROOT)
    assert code == 1, both
    log = tmp_path / "out" / "error.log"
    assert both.splitlines()[-1] == f"align: SystemExit: 0 (full traceback: {log})"
    assert "Traceback" not in both and "in end_training" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_has_nothing_to_save_ends_at_once(number, base, tmp_path):
    """Even while a library reads and does not come back to Python; and no lock stays."""
    mark = tmp_path / "mark"
    body = f"import ctypes; open({str(mark)!r}, 'w').close(); [ctypes.CDLL(None).sleep(1) for _ in range(60)]"
    with align("run", own_stage(tmp_path, base, body), cwd=ROOT) as process:
        end = time.monotonic() + TIMEOUT
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.02)
        begun = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number and time.monotonic() - begun < 20
    assert errors.splitlines()[-1] == f"align: stopped by {number.name} before there was anything to save"
    assert os.listdir(tmp_path / "out") == ["manifest.json"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
