"""The house: imports point down, recipes are sound, light things stay light."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from align.errors import BadInput, RunFailed
from align.loop.rounds import load_loop
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.settings import STAGES
from align.stages import runner
from align.worker import Stopped
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # a module may import from lower floors and from its own package
    {"errors", "libraries", "registering", "resources", "processes", "wording", "plain_json", "maths"},
    {"endings", "files", "hub", "limits", "locks", "plugins", "records", "servers", "sizes"},
    {"replies"},
    {"settings"},
    {"identity", "recipe_file"},
    {"recipe_errors"},
    {"manifest"},
    {"recipe", "phases", "surroundings"},
    {"schema", "model_card"},
    {"artifact"},
    {"resumption"},
    {"keys"},
    {"trackers"},
    {"track", "data"},
    {"feedback"},
    {"models"},
    {"rewards", "rollout"},
    {"report"},
    {"parents"},
    {"launch_plan"},
    {"worker", "preflight", "launch"},
    {"stages", "attempts", "machines"},
    {"pipeline", "entry", "compare", "loop", "push", "chat", "watch", "planning"},
    {"algorithms", "new", "serve"},
    {"cli_words"},
    {"cli_people"},
    {"cli", "public"},
]


def floor_of(name: str) -> int:
    found = [i for i, names in enumerate(FLOORS) if name in names]
    assert found, f"align/{name} is on no floor: say in FLOORS which it is on"
    return found[0]


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("align."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.ImportFrom) and node.module == "align":
            yield from (alias.name for alias in node.names)


def test_imports_point_down():
    files = [
        path for path in (ROOT / "align").rglob("*.py") if path.name != "__init__.py" or path.parent.name != "align"
    ]
    assert len(files) >= 45
    for path in files:
        own = path.relative_to(ROOT / "align").parts[0].removesuffix(".py")
        for other in imports(path):
            allowed = other == own or floor_of(other) < floor_of(own)
            assert allowed, f"{path.relative_to(ROOT)} imports align.{other}, which is not below align/{own}"


def test_a_name_is_imported_from_where_it_is_made():
    """But for the public names and those of a package."""
    files = [path for path in (ROOT / "align").rglob("*.py") if path.name != "__init__.py"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    made = {".".join(path.relative_to(ROOT).with_suffix("").parts): names_of(tree) for path, tree in trees.items()}
    found = 0
    for path in [*files, *(ROOT / "tests").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(trees.get(path) or ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in made:
                found += 1
                elsewhere = {alias.name for alias in node.names} - made[node.module]
                assert not elsewhere, f"{path}:{node.lineno}: {node.module} itself imports {elsewhere}"
    assert found >= 400


def names_of(tree: ast.Module) -> set[str]:
    """What a module makes at its top, and does not import."""
    made = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return made | {node.id for node in stored}


def test_every_module_is_on_a_floor():
    names = {
        p.stem if p.is_file() else p.name for p in (ROOT / "align").iterdir() if p.is_dir() or p.suffix == ".py"
    } - {
        "__init__",
        "__pycache__",
    }
    floors = set().union(*FLOORS)
    assert not names - floors, f"on no floor: {', '.join(sorted(names - floors))}"
    assert not floors - names, f"on a floor, but not there: {', '.join(sorted(floors - names))}"
    assert sum(map(len, FLOORS)) == len(floors), "on two floors"


def test_no_module_imports_one_that_imports_it():
    """Within a package, where floors say nothing: not even inside of a function."""
    files = [path for path in (ROOT / "align").rglob("*.py") if path.name != "__init__.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        needs[name] = found & names.keys()
    reached: dict[str, set[str]] = {}

    def reach(name: str, way: tuple[str, ...]) -> set[str]:
        assert name not in way, "a circle of imports: " + " -> ".join((*way[way.index(name) :], name))
        if name not in reached:
            reached[name] = needs[name].union(*(reach(other, (*way, name)) for other in needs[name]))
        return reached[name]

    for name in names:
        reach(name, ())


def test_every_recipe_that_travels_is_valid_and_opens_with_its_command():
    paths = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"]
    assert len(paths) >= 30
    kinds = set()
    for path in paths:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        name = path.relative_to(ROOT)
        assert first.startswith("# ") and (str(name) in first or path.stem in first), f"{name} opens with its command"
        if path.parent.name == "loops":
            loop = load_loop(str(path))
            stages = [loop.collect(0, "", ""), loop.score(0), loop.reward(0), loop.ppo(0, ""), loop.evaluate(0, True)]
        else:
            stages = list(load_recipe(str(path)).stages.values())
        kinds |= {stage.stage for stage in stages}
    assert kinds == set(STAGES)


def test_light_modules_stay_light():
    code = (
        "import sys, align, align.cli, align.recipe, align.preflight, align.pipeline, align.launch, align.loop.rounds\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate', 'matplotlib', 'wandb'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_stage_of_ones_own_runs(base, data, tmp_path, capsys):
    path = tmp_path / "count.yaml"
    values = {
        "stage": f"{ROOT}/recipes/custom/stage.py:CountTokens",
        "model": {"base": str(base)},
        "data": {"train": str(data / "sft.jsonl")},
        "output": str(tmp_path / "count"),
    }
    path.write_text(yaml.safe_dump(values))
    tiny.run(load_recipe(str(path)).stages["count"])
    assert "tokens in 40 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("raise ValueError('one\\n two')", RunFailed, r"own.py:Own` failed \(.*own.py:6\): ValueError: one two$"),
        ("sys.exit(0)", RunFailed, "SystemExit: 0"),
        ("self.run(worker)", RunFailed, "RecursionError"),
        ("raise BadInput('no such file')", BadInput, "^no such file$"),
        ("raise Stopped(143)", Stopped, "stopped by a signal"),
    ],
)
def test_a_stage_of_ones_own_that_fails_is_one_line(body, error, says, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import sys\nfrom align.errors import BadInput\nfrom align.settings import StageSettings\n"
        f"from align.worker import Stopped\nclass Own(StageSettings):\n    def run(self, worker): {body}\n"
    )
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump({"stage": f"{path}:Own", "model": {"base": "x/y"}, "output": "out"}))
    settings = next(iter(load_recipe(str(recipe)).stages.values()))
    with pytest.raises(error, match=says) as caught:
        runner(settings)(settings, SimpleNamespace(device=torch.device("cpu")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "@field_validator('x')\n    def no(cls, v): raise RuntimeError('one\\n two')",
            "own.py:6.: RuntimeError: one two",
        ),
        ("@field_validator('x')\n    def no(cls, v): sys.exit(0)", "own.py:6.: SystemExit: 0"),
        ("@field_validator('x')\n    def no(cls, v): raise ValueError('three only')", "`x`.*: three only"),
        ("def parents(self):\n        sys.exit(0)", "own.py:6.: SystemExit: 0"),
        ("def data_sections(self):\n        return 1 / 0", "own.py:6.: ZeroDivisionError"),
    ],
)
def test_what_a_stage_of_ones_own_says_of_itself_may_fail_too(body, says, base, tmp_path):
    (tmp_path / "own.py").write_text(
        "import sys\nfrom align.settings import StageSettings\nfrom pydantic import field_validator\n"
        f"class Own(StageSettings):\n    {body}\n    x: int = 1\n    def run(self, worker): pass\n"
    )
    recipe = tmp_path / "own.yaml"
    values = {"stage": f"{tmp_path}/own.py:Own", "model": {"base": str(base)}, "output": str(tmp_path / "out"), "x": 2}
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(BadInput, match=says) as caught:
        check_recipe(load_recipe(str(recipe)))
    assert "\n" not in str(caught.value)


def test_the_custom_functions_do_what_they_say():
    from align.plugins import load_object

    custom = ROOT / "recipes" / "custom"
    brevity = load_object(f"{custom}/brevity.py:brevity")
    assert brevity(["p"] * 2, ["a b", "a b c d"], target_words=2) == [0.0, -1.0]
    number = load_object(f"{custom}/final_number.py:final_number")
    texts = [[{"role": "assistant", "content": text}] for text in ("2 and so 1,200.", "none", "it is 7")]
    assert number(["p"] * 3, texts, ["1200", "3", "8"]) == [1.0, 0.0, 0.0]
    to_prompt = load_object(f"{custom}/chatlog.py:to_prompt")
    assert to_prompt({"who": "bot"}) is None
    assert to_prompt({"who": "visitor", "said": "hi"})["prompt"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("failing", [None, "ruff", "mypy", "python"])
def test_the_test_command_fails_when_a_part_of_it_does(failing, tmp_path):
    """A trap's last command once made it fail though nothing had."""
    (tmp_path / "test.sh").write_text((ROOT / "scripts/test.sh").read_text())
    (tmp_path / "environment.sh").write_text(f'set -euo pipefail\nexport PATH="{tmp_path}:$PATH"\n')
    for part in ("ruff", "mypy", "python"):
        (tmp_path / part).write_text(f"#!/bin/sh\nexit {int(part == failing)}\n")
        (tmp_path / part).chmod(0o755)
    ended = subprocess.run(["bash", tmp_path / "test.sh"], capture_output=True, text=True)
    assert ended.returncode == int(failing is not None), ended.stderr
