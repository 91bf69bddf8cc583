"""Breaks the code in many small ways and counts how many of them a test notices.

    python scripts/mutants.py --count 200 --seed 0 --work /tmp/mutants

A seeded sample of places in align/{stages,rewards,rollout,models,data,loop} is changed one at a time, in a copy of this
tree: a comparison, a sign, a constant, a condition, a statement left out. The test files that name what was changed run
first, then those that run its whole package, until one fails. Each verdict is written to `mutants.jsonl` in the work
folder as it comes; started again, the command goes on with what is left. `--show` lists what survived.
"""

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

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
ALSO = {  # test files that run a package whole, beside those that name what was changed
    "stages": [
        *(f"test_whole_{stage}" for stage in ("ppo", "reward", "sft", "dpo")),
        *("test_ppo", "test_supervised", "test_stages", "test_loss_scale"),
    ],
    "rewards": [
        *("test_rewards", "test_reward_functions", "test_judge", "test_judge_server"),
        *("test_classifiers", "test_strangers"),
    ],
    "rollout": ["test_rollout", "test_flat", "test_samplers", "test_draw"],
    "models": ["test_methods", "test_flat", "test_memory", "test_quantised", "test_identity", "test_parents"],
    "data": [f"data/{path.stem}" for path in sorted((ROOT / "tests" / "data").glob("test_*.py"))],
    "loop": ["test_whole_labels", "test_loop", "test_labels_kept", "test_people"],
}
FILES = 18  # test files a mutant, at most
SECONDS = 900  # for all of them; what takes longer hangs, and is noticed by that


@dataclass(frozen=True)
class Site:
    """A place that can be changed: the number of its node in the order of `ast.walk`."""

    file: str
    node: int
    line: int
    function: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="list what survived, and run nothing")
    options = parser.parse_args()
    log = options.work / "mutants.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if not options.show:
        options.work.mkdir(parents=True, exist_ok=True)
        every = [
            site
            for package in PACKAGES
            for path in sorted((ROOT / "align" / package).rglob("*.py"))
            for site in sites(path)
        ]
        chosen = random.Random(options.seed).sample(every, options.count)
        seen = {(row["file"], row["node"]) for row in done}
        done += try_all([site for site in chosen if (site.file, site.node) not in seen], log, options)
    survived = [row for row in done if not row["by"]]
    for row in survived:
        print(f"{row['file']}:{row['line']} {row['function']}: {row['was']}  ->  {row['becomes']}")
    print(f"{len(done) - len(survived)} of {len(done)} noticed")
    return 0


def sites(path: Path) -> Iterator[Site]:
    """The places of a file that `change` can change, but for what messages and annotations say."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out, function_of = set(), {}
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += [node.exc] if isinstance(node, ast.Raise) else []
        parts += getattr(node, "decorator_list", [])
        left_out |= {id(inner) for part in parts if isinstance(part, ast.AST) for inner in ast.walk(part)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function_of |= {id(inner): node.name for inner in ast.walk(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in left_out and change(copy.deepcopy(node)):
            line = getattr(node, "lineno", 0)
            yield Site(str(path.relative_to(ROOT)), number, line, function_of.get(id(node), ""))


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


def try_all(left: list[Site], log: Path, options: argparse.Namespace) -> list[dict]:
    """The verdict on each place, written as it comes."""
    copies: Queue[Path] = Queue()
    for number in range(options.processes):
        copies.put(_copy_of_the_tree(options.work / f"tree-{number}"))
    begun = time.time()

    def verdict(site: Site) -> dict:
        tree = copies.get()
        try:
            row = try_one(site, tree)
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


def try_one(site: Site, tree: Path) -> dict:
    """The test that notices the change, by name, or nothing."""
    path, whole = tree / site.file, (ROOT / site.file).read_text(encoding="utf-8")
    parsed = ast.parse(whole)
    node = list(ast.walk(parsed))[site.node]
    was = ast.unparse(node).partition("\n")[0]
    change(node)
    path.write_text(ast.unparse(ast.fix_missing_locations(parsed)), encoding="utf-8")
    try:
        by = _noticed(tree, test_files(site))
    finally:
        path.write_text(whole, encoding="utf-8")
    return asdict(site) | {"was": was, "becomes": ast.unparse(node).partition("\n")[0], "by": by}


def test_files(site: Site) -> list[str]:
    """Those that name the function or its module, the ones that do so most first, and those of the whole package."""
    module = Path(site.file).with_suffix("")
    dotted, package = ".".join(module.parts), module.parts[1]
    scores = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        own = len(re.findall(rf"\b{re.escape(site.function)}\b", text)) if site.function else 0
        imports = dotted in text or re.search(
            rf"from {re.escape('.'.join(module.parts[:-1]))} import .*\b{module.name}\b", text
        )
        scores[str(path.relative_to(ROOT))] = 3 * min(own, 5) + (5 if imports else 0) + (module.name in path.stem) * 4
    named = sorted((name for name in scores if scores[name]), key=lambda name: -scores[name])
    also = [f"tests/{name}.py" for name in ALSO[package] if f"tests/{name}.py" in scores]
    return list(dict.fromkeys([*named[: FILES // 2], *also, *named[FILES // 2 :]]))[:FILES]


def _noticed(tree: Path, files: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "it hangs"
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
