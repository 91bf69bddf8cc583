"""Breaks the code in many small ways and counts how many of them a test notices.

    python -m pip install pytest-cov
    python scripts/mutants.py --count 200 --seed 0 --work /tmp/mutants

The whole suite runs once under coverage, to learn which tests run which lines. Then a seeded sample of places in
align/{stages,rewards,rollout,models,data,loop} is changed one at a time, in a copy of this tree: a comparison, a sign,
a constant, a condition, a statement left out. The tests that run what was changed are run, the quickest first, until
one fails; where none is known to (what runs as a module is imported, or in a process of its own), the files that name
it. Each verdict is written to `mutants.jsonl` in the work folder as it comes; started again, the command goes on with
what is left, and with what survived where `--seconds` gives it more tests. `--show` lists what survived.
"""

import argparse
import ast
import copy
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("stages", "rewards", "rollout", "models", "data", "loop")
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
LIBRARIES = ["torch", "transformers", "peft", "trl", "accelerate", "datasets", "pytest", "matplotlib.pyplot"]
FILES = 12  # test files of a mutant that no test is known to run
SECONDS = 900  # for all of them; what takes longer hangs, and is noticed by that


@dataclass(frozen=True)
class Site:
    """A place that can be changed: the number of its node in the order of `ast.walk`."""

    file: str
    node: int
    line: int
    function: str
    lines: tuple[int, int]  # of the statement that it is in, or of its head


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="of tests a mutant, as they took under coverage")
    parser.add_argument("--show", action="store_true", help="list what survived, and run nothing")
    options = parser.parse_args()
    log = options.work / "mutants.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries are loaded that go by it
    if not options.show:
        options.work.mkdir(parents=True, exist_ok=True)
        every = [
            site
            for package in PACKAGES
            for path in sorted((ROOT / "align" / package).rglob("*.py"))
            for site in sites(path)
        ]
        chosen = random.Random(options.seed).sample(every, options.count)
        run_under_coverage(options.work, options.processes)
        of_place = tests_by_line(options.work, options.seconds)
        tried = {(row["file"], row["node"]): row for row in done}
        left = [site for site in chosen if not is_settled(tried.get((site.file, site.node)), of_place(site))]
        done += try_all(left, of_place, log, options)
    done = list({(row["file"], row["node"]): row for row in done}.values())  # the last word on each
    survived = [row for row in done if not row["by"]]
    for row in survived:
        print(f"{row['file']}:{row['line']} {row['function']}: {row['was']}  ->  {row['becomes']}")
    print(f"{len(done) - len(survived)} of {len(done)} noticed")
    return 0


def sites(path: Path) -> Iterator[Site]:
    """The places of a file that `change` can change, but for what messages, annotations and `zip(strict=)` say."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out, function_of, lines_of = set(), {}, {}
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += [node.exc] if isinstance(node, ast.Raise) else []
        parts += getattr(node, "decorator_list", [])
        parts += [node.value] if isinstance(node, ast.keyword) and node.arg == "strict" else []  # as an assertion is
        left_out |= {id(inner) for part in parts if isinstance(part, ast.AST) for inner in ast.walk(part)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function_of |= {id(inner): node.name for inner in ast.walk(node)}
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            lines_of |= {id(inner): (node.lineno, max(node.lineno, last or 0)) for inner in ast.walk(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in left_out and change(copy.deepcopy(node)):
            line = getattr(node, "lineno", 0)
            where = str(path.relative_to(ROOT)), number, line, function_of.get(id(node), "")
            yield Site(*where, lines_of.get(id(node), (line, line)))


def change(node: ast.AST) -> bool:
    """Changes a node in place; whether it is one that can be."""
    match node:
        case ast.Compare(ops=[operator]):
            node.ops = [SWAPS[type(operator)]()]
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in SWAPS:
            if any(isinstance(side, (ast.JoinedStr, ast.List)) for side in ast.iter_child_nodes(node)):
                return False
            node.op = SWAPS[type(operator)]()
        case ast.BoolOp(op=operator):
            node.op = SWAPS[type(operator)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
            if isinstance(node.op, ast.Not):
                node.operand = ast.UnaryOp(ast.Not(), node.operand)
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value = node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            node.id = NAMES[name]
        case ast.If() | ast.IfExp() | ast.While():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.Expr(value=ast.Call()):
            node.value = ast.Constant(None)
        case _:
            return False
    return True


def is_settled(row: dict | None, tests: list[str]) -> bool:
    """Whether a place was tried: one that survived is tried again when there is time for more tests."""
    return row is not None and (bool(row["by"]) or row["tests"] >= len(tests))


def run_under_coverage(work: Path, processes: int) -> None:
    """Runs the whole suite, unless that is done: which tests run which lines, and how long each takes."""
    if (work / "times.xml").is_file():
        return
    tree = _copy_of_the_tree(work / "covered")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(processes + 1)]
    command += ["--dist", "worksteal", "--cov=align", "--cov-context=test", "--cov-report=", "--junitxml=times.xml"]
    env = _environment(tree) | {"COVERAGE_FILE": str(work / "coverage"), "COVERAGE_CORE": "ctrace"}
    subprocess.run(command, cwd=tree, env=env, check=False)
    (tree / "times.xml").replace(work / "times.xml")


def tests_by_line(work: Path, most: float) -> Callable[[Site], list[str]]:
    """Of a place: the tests that run it, the quickest first."""
    import coverage

    data = coverage.CoverageData(str(work / "coverage"))
    data.read()
    seconds = {}
    for case in ElementTree.parse(work / "times.xml").iter("testcase"):
        module = str(case.get("classname")).replace(".", "/")
        seconds[f"{module}.py::{case.get('name')}"] = float(case.get("time", 0.0))

    def found(site: Site) -> list[str]:
        contexts = data.contexts_by_lineno(str(work / "covered" / site.file))
        first, last = site.lines
        running = {each.partition("|")[0] for line in range(first, last + 1) for each in contexts.get(line, ())}
        left, chosen = most, []
        for test in sorted(running & seconds.keys(), key=lambda test: seconds[test]):
            left -= seconds[test]
            if left < 0 and chosen:
                break
            chosen.append(test)
        return chosen

    return found


def try_all(
    left: list[Site], of_place: Callable[[Site], list[str]], log: Path, options: argparse.Namespace
) -> list[dict]:
    """The verdict on each place, written as it comes."""
    copies: Queue[Path] = Queue()
    for number in range(options.processes):
        copies.put(_copy_of_the_tree(options.work / f"tree-{number}"))
    begun = time.time()
    if found := _noticed(copies.queue[0], ["tests/test_house.py", "tests/maths"]):
        raise SystemExit(f"the tests do not pass where nothing was changed: {found}")

    def verdict(site: Site) -> dict:
        tree = copies.get()
        try:
            row = try_one(site, tree, of_place(site) or test_files(site))
        finally:
            copies.put(tree)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.time() - begun:6.0f} s  {row['by'] or 'SURVIVED':60.60}  {site.file}:{site.line}", flush=True)
        return row

    with ThreadPoolExecutor(options.processes) as pool:
        return list(pool.map(verdict, left))


def _copy_of_the_tree(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    leave = shutil.ignore_patterns(".git", ".venv", "runs", "wandb", "__pycache__", ".*_cache", "*.whl")
    shutil.copytree(ROOT, place, ignore=leave, symlinks=True)
    return place


def try_one(site: Site, tree: Path, tests: list[str]) -> dict:
    """The first of the tests that notices the change, by name, or nothing."""
    path, whole = tree / site.file, (ROOT / site.file).read_text(encoding="utf-8")
    parsed = ast.parse(whole)
    node = list(ast.walk(parsed))[site.node]
    was = ast.unparse(node).partition("\n")[0]
    change(node)
    path.write_text(ast.unparse(ast.fix_missing_locations(parsed)), encoding="utf-8")
    try:
        by = _noticed(tree, tests)
    finally:
        path.write_text(whole, encoding="utf-8")
    return asdict(site) | {"was": was, "becomes": ast.unparse(node).partition("\n")[0], "by": by, "tests": len(tests)}


def test_files(site: Site) -> list[str]:
    """Those that name the function or its module, the ones that do so most first."""
    module = Path(site.file).with_suffix("")
    dotted = ".".join(module.parts)
    scores = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        own = len(re.findall(rf"\b{re.escape(site.function)}\b", text)) if site.function else 0
        imports = dotted in text or re.search(
            rf"from {re.escape('.'.join(module.parts[:-1]))} import .*\b{module.name}\b", text
        )
        scores[str(path.relative_to(ROOT))] = 3 * min(own, 5) + (5 if imports else 0) + (module.name in path.stem) * 4
    return sorted((name for name in scores if scores[name]), key=lambda name: -scores[name])[:FILES]


def _noticed(tree: Path, tests: list[str]) -> str:
    said = tree / "said.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=_run_tests, args=(tree, tests, said))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "it hangs"
    if process.exitcode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said.read_text(errors="replace"), re.MULTILINE)
    return failed[1] if failed else f"exit code {process.exitcode}"


def _run_tests(tree: Path, tests: list[str], said: Path) -> None:
    """In a process of its own, which has the libraries already: ends with pytest's code."""
    import pytest

    os.chdir(tree)
    os.environ.update(_environment(tree))
    sys.path.insert(0, str(tree))
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    already = "ignore:Module already imported"  # so that its own assertions are not rewritten: none of ours is
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", already, *tests])))


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    sys.exit(main())
