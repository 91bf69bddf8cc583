"""The report of several runs on one page: a pipeline's stages one after the other, runs of one kind side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from align.errors import BadInput
from align.manifest import MANIFEST, about, read_manifest
from align.report.page import NONE, Page, Section, Table, number, table
from align.report.stage_page import curves_of, page_of
from align.report.tables import plain
from align.settings import Curve
from align.track import read_metrics


def runs_in(folder: Path) -> list[Path]:
    """The runs of a pipeline's folder, in the order in which they ended; none where it is no such folder."""
    runs = [file.parent for file in folder.glob(f"*/{MANIFEST}")]
    return sorted(runs, key=lambda run: (run / MANIFEST).stat().st_mtime)


def page_of_several(folders: Sequence[Path], title: str) -> Page:
    """The page of two or more runs.

    Raises:
        BadInput: one is no run's folder, or is named twice.
    """
    names = _names(folders)
    pages = {
        name: page_of(folder, among=f"run-{i}-") for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    }
    kinds: dict[str, list[str]] = {}
    for name, folder in zip(names, folders, strict=True):
        kinds.setdefault(str(read_manifest(folder).get("kind")), []).append(name)
    places = dict(zip(names, folders, strict=True))
    sections: list[Section] = []
    for kind, of_kind in kinds.items():
        if len(of_kind) > 1:
            sections.append(_beside(kind, {name: places[name] for name in of_kind}, len(sections)))
        else:
            (name,) = of_kind
            sections += [replace(each, title=f"{plain(name, 60)}: {each.title}") for each in pages[name].sections]
    told = {plain(name, 60): page for name, page in pages.items()}
    facts = {name: dict(page.facts) for name, page in told.items()}
    return Page(
        title,
        tuple((name, f"{own['stage']}, {own['state']}") for name, own in facts.items()),
        " ".join(page.headline.replace("The run is", f"{name} is", 1) for name, page in told.items()),
        tuple(sections),
        "\n".join(f"# {name}\n{page.recipe}" for name, page in told.items()),
        tuple(f"{name}: {alarm}" for name, page in told.items() for alarm in page.alarms),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with the folder above where two are alike."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise BadInput("a run is named twice; name each once")
    for parts in range(1, max(len(place.parts) for place in places) + 1):  # as many folders above as tell them apart
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _beside(kind: str, runs: dict[str, Path], place: int) -> Section:
    """Runs of one kind: a line for each in each picture, and a column for each in a table of their figures."""
    stage = about(read_manifest(next(iter(runs.values()))))
    curves = [Curve(curve.title, curve.x, tuple(curve.figures)) for curve in stage.curves]
    drawn = curves_of({name: read_metrics(folder) for name, folder in runs.items()}, f"beside-{place}", curves)
    return Section(f"{plain(kind, 60)}, side by side", pictures=drawn, tables=(_figures(runs),))


def _figures(runs: dict[str, Path]) -> Table:
    manifests = [read_manifest(folder) for folder in runs.values()]
    found = [{**(m.get("metrics") or {}), **(m.get("cost") or {})} for m in manifests]
    keys = dict.fromkeys(k for each in found for k, v in each.items() if isinstance(v, (int, float)))
    rows = [(k.replace("_", " "), *(_shown(each.get(k)) for each in found)) for k in keys]
    return table("Figures", ("figure", *runs), rows)


def _shown(value: object) -> str:
    return number(value) if isinstance(value, (int, float)) else NONE
