"""The policy that a KL budget keeps: it lies beside the run until the run is finished.

Each is in a folder of its own: a checkpoint that is gone back to must find the one that it names.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from align.files import folder_in_one_go, write_atomically
from align.models.roles import Role
from align.models.saving import save_role
from align.records import CRITIC
from align.settings import PpoSettings
from align.stages import checkpoint, kl_budget
from align.stages.costs import kl_to_base
from align.stages.ppo_critic import save_critic
from align.stages.ppo_roles import Roles
from align.worker import Worker


def keep(
    settings: PpoSettings,
    worker: Worker,
    roles: Roles,
    progress: dict[str, Any],
    *,
    iteration: int,
    score: float,
    kl: float,
    budget: float,
) -> None:
    """Saves the policy, and notes it in `progress`, if it is the one to keep so far. All processes call it."""
    place = kl_budget.place(progress, score, kl, budget)
    if place is None:
        return
    moved = kl_to_base(roles.policy, roles.bases, settings.policy.path)
    progress[place] = {"iteration": iteration, "score": score, "kl": kl, "kl_to_base": moved}
    if worker.is_main:
        with folder_in_one_go(_folder(settings, iteration)) as folder:
            save_role(Role(roles.policy.model), folder, base_name=roles.base.name, revision=roles.base.revision)
            save_critic(roles.valuer, roles.critic_base, roles.tokenizer, folder)
            checkpoint.seal(folder)


def kept_beside(settings: PpoSettings, progress: dict[str, Any]) -> list[Path]:
    """The folder of the policy that a run with this progress would keep."""
    kept = kl_budget.kept(progress) if settings.ppo.kl_budget is not None else None
    return [] if kept is None else [_folder(settings, kept["iteration"])]


def make_it_the_runs(settings: PpoSettings, kept: dict[str, Any]) -> None:
    """Copies the files of the policy that is kept into the run's folder, and the critic of that time."""
    folder = _folder(settings, kept["iteration"])
    if (folder / CRITIC).is_dir():
        with folder_in_one_go(Path(settings.output) / CRITIC) as copy:
            shutil.copytree(folder / CRITIC, copy, dirs_exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != checkpoint.CHECKSUMS:
            write_atomically(Path(settings.output) / file.name, partial(_copy, file))


def clear(settings: PpoSettings) -> None:
    """Deletes the policies beside the run."""
    for left in Path(settings.output).glob("best-*"):
        shutil.rmtree(left)


def _folder(settings: PpoSettings, iteration: int) -> Path:
    return Path(settings.output) / f"best-{iteration:08d}"


def _copy(file: Path, to: Path) -> None:
    shutil.copyfile(file, to)
