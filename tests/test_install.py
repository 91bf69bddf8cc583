"""What is installed: every dependency has a lower bound that was tried, and the wheel holds what the README names."""

import configparser
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [Requirement(each) for each in [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]]
DIRECT = [each for each in ALL if each.name != PROJECT["name"]]
DIRECT_NAMES = [each.name for each in DIRECT]


def lower_bound(requirement: Requirement) -> Version | None:
    bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    return bounds[0] if bounds else None


def versions(path: Path) -> dict[str, Version]:
    """By canonical name, of the lines `name==version`."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("requirement", DIRECT, ids=DIRECT_NAMES)
def test_the_tested_versions_keep_the_bounds(requirement):
    assert lower_bound(requirement), f"{requirement.name} has no lower bound"
    version = versions(ROOT / "constraints.txt").get(canonicalize_name(requirement.name))
    assert version is not None and version in requirement.specifier


@pytest.mark.parametrize("requirement", DIRECT, ids=DIRECT_NAMES)
def test_a_bound_is_a_version_that_was_tried(requirement):
    """So that none is lowered, and none raised, without `bash scripts/lowest.sh`."""
    assert lower_bound(requirement) == versions(ROOT / "scripts" / "lowest.txt")[canonicalize_name(requirement.name)]


def test_what_builds_is_in_the_environment_of_the_tests():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert build == [each for each in EXTRAS["dev"] if each.startswith("hatchling")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], check=True, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


def files_of(folder: str) -> set[str]:
    """Files of a folder of this checkout, but for what Python leaves there."""
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_holds_the_package_and_its_recipes(wheel):
    names = set(wheel.namelist())
    wanted = files_of("align") | {f"align/{name}" for name in files_of("recipes")}
    assert wanted <= names, sorted(wanted - names)
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert not others, sorted(others)
    for pattern, least in {"*.jinja": 7, "static/*.*": 3, "recipes/*/*.yaml": 28, "quickstart/data/*.jsonl": 5}.items():
        assert sum(Path(name).match(pattern) for name in names) >= least, pattern


def test_every_file_of_the_recipes_that_the_readme_names_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\brecipes/[\w/.-]+\.(?:yaml|py|md|jsonl|png)", page)
    assert len(named) >= 3
    assert not [name for name in named if f"align/{name}" not in names]


def test_the_wheel_says_what_it_is(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    about = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert (about["Name"], about["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert set(about.get_all("Provides-Extra")) == set(EXTRAS)
    assert about["Requires-Python"] == PROJECT["requires-python"]
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == {"align": "align.cli:main"}


def test_the_wheel_finds_its_recipes_from_another_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from align.cli import main; sys.argv[1:] = ['recipes']; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
