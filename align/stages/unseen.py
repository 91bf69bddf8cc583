"""Whether prompts are unseen: what the runs behind a policy were trained on is read again, and compared by prompt."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from align.data import Demonstration, Example, Kind, Prompt, load
from align.data.mixtures import prompt_key
from align.errors import BadInput
from align.hub import may_run
from align.manifest import MANIFEST, about, read_manifest
from align.plugins import is_reference
from align.settings import Data, DemonstrationData
from align.wording import one_line


@dataclass(frozen=True)
class Seen:
    """How many of some rows have a prompt that a run was trained on, in all and by run; why others cannot be told."""

    count: int
    by_run: dict[str, int]
    unknown: tuple[str, ...]

    @property
    def figure(self) -> int | None:
        """As the manifest keeps it; None: not known."""
        return None if self.unknown and not self.count else self.count

    def messages(self, what: str) -> list[str]:
        """Sentences for the user, none where all is well; `what` names the rows, such as "98 prompts"."""
        said = []
        if self.count:
            runs = ", ".join(f"{run} ({count})" for run, count in self.by_run.items())
            said.append(f"warning: {self.count} of the {what} were seen in training, by {runs}")
        if self.unknown:
            more = f" (and {len(self.unknown) - 1} more)" if len(self.unknown) > 1 else ""
            said.append(f"warning: whether the {what} were seen in training is not known: {self.unknown[0]}{more}")
        return said


def seen_prompts(runs: Iterable[str | None], rows: Sequence[Example]) -> Seen:
    """Compares the prompts of `rows` with those that `runs`, and all runs that these come from, were trained on.

    None among `runs` is the base itself. Data that is gone or cannot be read is no error here.
    """
    sections, unknown = _trained_on(run for run in runs if run is not None)
    keys = [prompt_key(row) for row in rows]
    seen: set[str] = set()
    by_run: dict[str, int] = {}
    for (data, kind), run in sections.items():
        try:
            examples = load(data, cast(Any, kind)).train
        except BadInput as error:
            unknown.append(f"{run}: {error}")
            continue
        if num_plain := sum(isinstance(example, Demonstration) and not example.prompt for example in examples):
            unknown.append(f"{run}: {num_plain} rows of its data are plain text, in which no prompt can be told")
        shared = {prompt_key(asked) for example in examples for asked in _asked(example)} & set(keys)
        if shared:
            by_run[run] = by_run.get(run, 0) + sum(key in shared for key in keys)
        seen |= shared
    return Seen(sum(key in seen for key in keys), by_run, tuple(unknown))


def _trained_on(runs: Iterable[str]) -> tuple[dict[tuple[Data, Kind], str], list[str]]:
    """What `runs` and those behind them were trained on, with a run that was, and why some of it cannot be told."""
    sections: dict[tuple[Data, Kind], str] = {}
    unknown: list[str] = []
    waiting, known = list(dict.fromkeys(runs)), set[str]()
    while waiting:
        run = waiting.pop(0)
        if os.path.realpath(run) in known:
            continue
        known.add(os.path.realpath(run))
        try:
            manifest = read_manifest(run)
            sections.setdefault(_data_of(manifest, run), run)
        except BadInput as error:
            unknown.append(f"{run}: {one_line(error)}" if run not in str(error) else one_line(error))
            continue
        waiting += [str(parent["path"]) for parent in manifest.get("parents", {}).values()]
        bases = {manifest.get("base"), (manifest["recipe"].get("model") or {}).get("base")}
        waiting += [str(base) for base in bases if base and (Path(base) / MANIFEST).is_file()]  # a fully tuned run
    return sections, unknown


def _data_of(manifest: dict[str, Any], run: str) -> tuple[Data, Kind]:
    """What a run was trained on, and what rows that has.

    Raises:
        BadInput: it does not say so, or its rows are read by code that its manifest names, and this recipe does not.
    """
    reads = about(manifest).reads
    try:
        if reads is None:
            raise KeyError
        section = DemonstrationData if reads.rows == "demonstrations" else Data
        data = section.model_validate(manifest["recipe"][reads.key])
    except (KeyError, TypeError, ValidationError) as error:
        raise BadInput(f"{run} does not say what it was trained on") from error
    for source in (*data.train, *data.validation):
        if is_reference(source.format) and not may_run(source.format):
            raise BadInput(f"{run}: its rows are read by code that this recipe does not name, and that is not run")
    return data, reads.rows


def _asked(example: Example) -> Iterator[Example]:
    """What a model was shown before an answer that it learnt: the prompt, and the turns before each further answer."""
    yield example
    if isinstance(example, Demonstration) and not isinstance(example.completion, str):
        turns = (*cast(Any, example.prompt), *example.completion)
        for end in range(len(example.prompt) + 1, len(turns)):
            if turns[end]["role"] == "assistant" and all(isinstance(turn["content"], str) for turn in turns[:end]):
                yield Prompt(turns[:end], {}, example.where)
