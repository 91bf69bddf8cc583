"""A loop under way: where its steps stand, and how they run a stage."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifact import tidy
from align.feedback.store import Store
from align.loop.rounds import SFT, Loop
from align.manifest import read_manifest
from align.resumption import state_of
from align.settings import StageSettings

Start = Callable[[StageSettings, Path], tuple[int, str]]
Result = dict[str, Any]  # of a step


class Halt(Exception):
    """The loop goes no further now: a stage stopped or failed, or people have labels to give."""

    def __init__(self, code: int, reason: str = ""):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Context:
    """A loop under way, in one of its rounds."""

    loop: Loop
    store: Store
    round: int
    start: Start

    @property
    def folder(self) -> Path:
        return self.loop.folder(self.round)

    def before(self, step: str) -> Result:
        """The result of a step of the round before."""
        return self.store.result(self.round - 1, step) or {}

    @property
    def current(self) -> str:
        """The policy that this round collects from and goes on with: the one that was kept, where the loop's folder is
        now."""
        return self.loop.policies(self.round - 1)[self.start_name]

    @property
    def start_name(self) -> str:
        """The name of that policy among those that are evaluated."""
        return str(self.before("decide").get("kept", SFT))

    @property
    def previous(self) -> str:
        """The one before it."""
        began = self.store.result(self.round - 2, "decide") or {}
        return self.loop.policies(self.round - 2)[str(began.get("kept", SFT))]

    def run(self, settings: StageSettings) -> dict[str, Any]:
        """Runs a stage unless it is finished; its manifest."""
        for line in self.loop.change(settings):
            print(f"changed: {line}", flush=True)
        if state_of(settings) != "finished":
            code, reason = self.start(settings, Path(f"{settings.output}.yaml"))
            if code:
                raise Halt(code, reason)
        tidy(settings.output)
        return read_manifest(settings.output)
