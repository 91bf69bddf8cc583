"""PPO's critic: where it starts, and how it is kept beside the policy, for another run to begin with.

<run>/critic    value_head.safetensors (weight (1, H), bias (1,)); of a critic of its own also its adapter or whole
                model, as PEFT and transformers open a sequence classifier. The run's manifest says over which base.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from align.artifact import where_base_is
from align.files import folder_in_one_go
from align.identity import base_of, has_adapter, of_whole_file
from align.manifest import MANIFEST, kept_critic, read_manifest
from align.models.base import Base
from align.models.roles import Bases, Role, new_head
from align.models.saving import save_role
from align.records import CRITIC
from align.settings import AnyMethod, Lora, PpoSettings

VALUE_HEAD = "value_head.safetensors"


def critic_of_its_own(bases: Bases, settings: PpoSettings, policy_method: AnyMethod | None) -> Role:
    """An adapter or a whole model that starts from another run's critic, from a reward run, or where the policy starts
    with a head of zeros."""
    path = settings.critic.path
    if path is None:
        critic = bases.role(settings.policy.path, method=policy_method, trainable=True)
        critic.head = new_head(critic.hidden_size, bases.device, bias=True)
        return critic
    kept = kept_critic(path)
    folder = path if kept is None else str(Path(path) / CRITIC)
    method = None if has_adapter(folder) else settings.policy.method or Lora()
    over = base_of_critic(bases, settings)
    critic = bases.role(folder, method=method, trainable=True, head=True, over=over if kept else None)
    critic.head = _of_a_reward(critic, path) if kept is None else _kept_head(path, bases.device)
    return critic


def head_on_trunk(policy: Role, settings: PpoSettings) -> nn.Linear:
    """The head that reads the policy's states: of zeros, or as another run has left it."""
    path = settings.critic.path
    return new_head(policy.hidden_size, policy.device, bias=True) if path is None else _kept_head(path, policy.device)


def base_of_critic(bases: Bases, settings: PpoSettings) -> Base:
    """The base that a critic of its own stands over."""
    path = settings.critic.path
    kept = None if path is None else kept_critic(path)
    if path is None or kept is None:
        return bases.base_of(path or settings.policy.path)
    if not has_adapter(folder := str(Path(path) / CRITIC)):  # a whole model: what goes over it stands on it
        return bases.base_of(folder)
    manifest = read_manifest(path)
    place = base_of(manifest | kept, path, recipes=bases.settings.base)
    return bases.load(place, revision=manifest["recipe"]["model"].get("revision"))


def moments_of_scores(settings: PpoSettings) -> list[float] | None:
    """Of the run whose critic goes on, if both measure scores by what they have seen: its values are on that scale."""
    path = settings.critic.path
    if settings.ppo.normalize_scores == "none" or path is None or kept_critic(path) is None:
        return None
    found: list[float] | None = read_manifest(path).get("metrics", {}).get("score_moments")
    return found


def remarks_on_critic(settings: PpoSettings) -> list[str]:
    """Sentences on a critic that goes on, and was trained to something else than it says here."""
    path, own, remarks = settings.critic.path, settings.ppo.normalize_scores, []
    kept = None if path is None else kept_critic(path)
    if path is None or kept is None:
        return []
    theirs = read_manifest(path)["recipe"].get("ppo", {}).get("normalize_scores", "none")
    if theirs != own:
        remarks.append(
            f"warning: the critic of {path} learnt with `ppo.normalize_scores: {theirs}`, and here it is {own}: its "
            "values are on another scale (`critic.warmup_iterations` lets it learn first)"
        )
    start = settings.policy.path
    if kept["kind"] == "trunk" and (start is None or os.path.realpath(start) != os.path.realpath(path)):
        remarks.append(
            f"warning: the critic of {path} is a head on that run's policy, and reads another one here "
            "(`critic.warmup_iterations` lets it learn first)"
        )
    return remarks


def save_critic(valuer: Role | None, base: Base | None, tokenizer: Any, run: Path) -> None:
    """Writes what says the values into `run`/critic, complete or not at all; `base`: that a critic of its own stands
    over (None: the values are said by a head on the policy's trunk)."""
    if valuer is None or valuer.head is None:
        return
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in valuer.head.state_dict().items()}
    with folder_in_one_go(run / CRITIC) as folder:
        if base is not None:
            save_role(valuer, folder, base_name=base.name, revision=base.revision)
            tokenizer.save_pretrained(folder)
        save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})


def about_critic(run: Path, base: Base | None) -> dict[str, Any]:
    """What the manifest of a finished run says of the critic in its folder; nothing where there is none."""
    if not (run / CRITIC).is_dir():
        return {}
    over = {} if base is None else where_base_is(base.name, base.fingerprint, run)
    files = {path.name: of_whole_file(path) for path in sorted((run / CRITIC).iterdir())}
    return {"critic": {"kind": "trunk" if base is None else "adapter", "files": files} | over}


def _kept_head(run: str, device: torch.device) -> nn.Linear:
    weights = load_file(Path(run) / CRITIC / VALUE_HEAD)
    head = new_head(weights["weight"].shape[1], device, bias=True)
    head.load_state_dict(weights)
    return head


def _of_a_reward(critic: Role, folder: str) -> nn.Linear:
    """The reward model's head with its normalisation folded in: values start on the scale of normalised scores."""
    assert critic.head is not None
    manifest = read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else {}  # made elsewhere: as it is
    head = new_head(critic.head.in_features, critic.device, bias=True)
    std = max(float(manifest.get("score_std", 1.0)), 1e-8)
    head.weight.data.copy_(critic.head.weight.data / std)
    head.bias.data.fill_(-float(manifest.get("score_mean", 0.0)) / std)
    return head
