"""The ensemble stage: one reward model after another on the same pairs, each with a seed and an order of its own.

What they disagree on is what the labels do not settle: it is what people should be asked, and what PPO should not be
paid for. Each member is a reward run of its own, in `<output>/member-<k>`; one that is finished is passed over.
"""

from pathlib import Path

from align.artifact import finish, tidy
from align.identity import fingerprint
from align.libraries import seed_everything
from align.manifest import read_manifest
from align.resumption import state_of
from align.settings import EnsembleSettings
from align.stages import reward
from align.stages.running import running
from align.worker import Worker


def run(settings: EnsembleSettings, worker: Worker) -> None:
    """Trains the members that are not finished; then joins their figures."""
    with running(settings, worker, fingerprint(settings.model.base, settings.model.revision)):
        _train_members(settings, worker)


def _train_members(settings: EnsembleSettings, worker: Worker) -> None:
    members = settings.members()
    for number, own in enumerate(members, 1):
        if state_of(own) == "finished":
            if worker.is_main:
                tidy(own.output)
            continue
        if worker.is_main:
            print(f"member {number} of {len(members)}:", flush=True)
        worker.release_signals()  # of the member before: while models and data load there is nothing to save
        seed_everything(own.seed, full_determinism=own.full_determinism)
        reward.run(own, worker)
    if worker.is_main:
        found = [read_manifest(own.output)["metrics"] for own in members]
        metrics = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
        finish(settings.output, metrics=metrics, members=[Path(own.output).name for own in members])
