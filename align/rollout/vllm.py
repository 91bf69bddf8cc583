"""Draws from a vLLM server: token ids go out, token ids and their log-probabilities come in.

There the policy is a LoRA adapter over the served base. Each version of it has a name of its own, made of its weights,
and a folder of that name, which the server reads: what it has cached of one version it never takes for another's.

A version may answer only after it has said how likely it holds a few tokens, whose log-probabilities are known here. So
another base, another precision, other sampling than was asked for, or a version that is not this one end the run.

What vLLM draws does not repeat. It is kept beside the checkpoints until one has what became of it, so that a run that
was killed goes on with the same answers. A server that was started again is given the policy again.
"""

import asyncio
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from torch import Tensor

from align.artifact import DRAWN, SERVED
from align.errors import RunFailed
from align.files import folder_in_one_go
from align.models.roles import Role, adapter_weights
from align.models.saving import save_role
from align.replies import Replies, Reply
from align.rollout.draw import check_finite
from align.rollout.reading import read_all
from align.rollout.rollouts import by_row, cut_at_end, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.rollout.vllm_api import AS_IT_SAYS, PLAIN, Api, Choice, Gone
from align.servers import Again, all_of
from align.settings import Sampling

AT_ONCE = 256  # answers that are asked for, unless `batch_size` says how many: the server itself makes its batches
PROBED = 48  # tokens of a prompt that a version is probed with, at the most
ANSWERED = 8  # tokens of its answer to it, at the most
# mean nats a token that a probe may be off. In float32 two engines differ by 1e-6 to 1e-5, in 16 bits by a hundredth;
# over a base in 4 bits here, and in 16 there, by what the 4 bits cost
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
IN_4_BITS = 0.5
CURE = "see to it and run the same command again: what it has drawn is kept"


class _Drawn(Reply):
    """An answer, by the hash of the policy, the prompt, its seed and the sampling."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class VllmSampler(Sampler):
    """One policy behind a server."""

    server: "Server"

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """There is no reading: another engine's numbers are its own."""
        version = version_of(self.role)
        numbers = seeds.numbers()
        asked = [self._request(version, *row, sampling) for row in zip(prompts, numbers, strict=True)]
        keys = [hashlib.sha256(json.dumps(request).encode()).hexdigest() for request in asked]
        kept = self.server.drawn
        missing = {key: request for key, request in zip(keys, asked, strict=True) if key not in kept.found}
        if missing:
            at_once = self.batch_size or AT_ONCE
            asyncio.run(self.server.answer(self.role, version, missing, self.end_ids, at_once, self.beat))
        answers = [kept.found[key] for key in keys]
        rollouts = rollouts_of(prompts, [answer.tokens for answer in answers], end_ids=self.end_ids)
        return Sampled(rollouts, by_row([answer.logprobs for answer in answers], rollouts.width))

    def forget(self) -> None:
        self.server.forget()

    def close(self) -> None:
        asyncio.run(self.server.close())

    def _request(self, version: str | None, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        """All that an answer depends on."""
        return {
            "model": version,
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "stop_token_ids": list(self.end_ids),
        } | PLAIN


class Server:
    """A vLLM server as one process of a stage asks it. What is kept of it goes with the run's `folder`; without one,
    nothing is.

    Raises:
        BadInput: the key's environment variable is not set.
    """

    def __init__(self, sampling: Sampling, folder: Path | None):
        self.api, self.tolerance = Api(sampling), sampling.tolerance
        self._run = hashlib.sha256(str(folder and folder.resolve()).encode()).hexdigest()[:12]
        self.adapters = _adapters(sampling, folder, self._run)
        self._place = None if folder is None else folder / DRAWN
        earlier = [] if self._place is None else sorted(self._place.glob("*.jsonl"))
        self._files = [[*earlier]]  # of what was drawn since the last checkpoint, and since the one before
        self.drawn = self._new_drawn()
        for file in earlier:
            self.drawn.read(file)
        self._old = set[str]()  # keys of what was drawn before the last checkpoint
        self._ready: dict[str | None, str] = {}  # version -> the name that the server has for it
        self._loaded = set[str]()
        self._probe: tuple[list[int], Tensor] | None = None  # the tokens, and what the last version says of them

    # ------------------------------------------------------------------------------------------------------- answers

    async def answer(
        self,
        role: Role,
        version: str | None,
        asked: dict[str, dict[str, Any]],
        end_ids: Sequence[int],
        at_once: int,
        beat: Callable[[], None],
    ) -> None:
        """Has `drawn` hold an answer to each of `asked`.

        Raises:
            BadInput: this is no server for the recipe.
            Diverged: the policy's logits are not finite.
            RunFailed: it fails again and again, or what it serves is another policy; what was drawn is kept.
        """
        free, alone = asyncio.Semaphore(at_once), asyncio.Lock()
        api, longest = self.api, max(len(request["prompt"]) + request["max_tokens"] for request in asked.values())

        async def one(client: httpx.AsyncClient, key: str, request: dict[str, Any]) -> None:
            async def once() -> _Drawn:
                async with alone:
                    name = await self._made_ready(client, role, version, request)
                try:
                    choice = await api.complete(client, request | {"model": name})
                except Gone:
                    self._drop(version)
                    raise
                self._check_answer(choice, request["max_tokens"], role, end_ids)
                return _Drawn(key=key, tokens=choice.token_ids, logprobs=choice.logprobs.token_logprobs)

            async with free:
                self.drawn.add(await api.endpoint.tried(once, api.name, CURE))

        async with api.endpoint.client() as client:
            await api.endpoint.tried(partial(self._check_room, client, longest), api.name, CURE)
            await all_of([one(client, key, request) for key, request in asked.items()], beat)

    async def _check_room(self, client: httpx.AsyncClient, longest: int) -> None:
        room = (await self.api.base(client)).max_model_len
        if room is not None and longest > room:
            raise self.api.unfit(
                f"holds {room} tokens, and a prompt with `sampling.max_new_tokens` has {longest}: start it with "
                f"--max-model-len {longest} or more"
            )

    def _check_answer(self, choice: Choice, most: int, role: Role, end_ids: Sequence[int]) -> None:
        tokens, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        wrong = None
        if not 1 <= len(tokens) <= most or len(logprobs) != len(tokens):
            wrong = f"{len(tokens)} tokens, where {most} are most, and {len(logprobs)} log-probabilities"
        elif not all(0 <= token < role.num_logits for token in tokens):
            wrong = f"tokens that the base does not have ({max(tokens)}, of {role.num_logits})"
        elif len(cut_at_end(tokens, end_ids)) < len(tokens):
            wrong = "an answer that goes on after its end token"
        elif len(tokens) < most and tokens[-1] not in end_ids:
            wrong = f"an answer that ends with token {tokens[-1]}, which is none of its ends ({list(end_ids)})"
        if wrong:
            raise RunFailed(f"{self.api.name} gave {wrong}; {AS_IT_SAYS}")

    # ------------------------------------------------------------------------------------------------------- versions

    async def _made_ready(
        self, client: httpx.AsyncClient, role: Role, version: str | None, request: dict[str, Any]
    ) -> str:
        """The name to ask for: the version's, loaded and probed, or the base's."""
        if version in self._ready:
            return self._ready[version]
        ids, before = self._probe or (list(request["prompt"][-PROBED:]), torch.empty(0))
        own = _logprobs(role, ids[:1], [*ids[1:], request["stop_token_ids"][0]], 1.0)
        check_finite(own)
        own = own[:-1]  # without the end that no prompt has: it was there for a prompt of one token
        if version is None:
            name = (await self.api.base(client)).id
        else:
            name = f"{version}-{self._run}"  # a run's own: another may leave the same policy
            self._loaded.add(name)
            await self.api.load(client, name, self._written(role, name))
        await self._check(client, role, name, request | {"prompt": ids}, own, before)
        self._probe, self._ready = (ids, own), {version: name}
        for old in sorted(self._loaded - {name}):
            await self._unload(client, old)
        return name

    def _drop(self, version: str | None) -> None:
        self._loaded.discard(self._ready.pop(version, ""))

    def _written(self, role: Role, name: str) -> str:
        """The folder of this version, made by whichever process comes first."""
        folder = self.adapters / name
        if not folder.is_dir():
            self.adapters.mkdir(parents=True, exist_ok=True)
            with folder_in_one_go(folder, first_stays=True) as temporary:
                save_role(Role(role.model), temporary, base_name=str(role.causal.config.name_or_path))
        return str(folder.resolve())

    async def _unload(self, client: httpx.AsyncClient, name: str) -> None:
        self._loaded.discard(name)
        with suppress(Again):  # gone itself, perhaps, and the adapter with it
            await self.api.unload(client, name)
        shutil.rmtree(self.adapters / name, ignore_errors=True)

    async def _check(
        self, client: httpx.AsyncClient, role: Role, name: str, request: dict[str, Any], own: Tensor, before: Tensor
    ) -> None:
        """Whether what is served under this name is the policy as it is here: by the tokens of a prompt, whose
        log-probabilities are `own` here and were `before` by the last version, and by those that it answers with."""
        ids, few = request["prompt"], min(ANSWERED, request["max_tokens"])
        plain = {"model": name, "max_tokens": few, "top_k": -1, "top_p": 1.0, "seed": 0, "prompt_logprobs": 0}
        choice = await self.api.complete(client, request | plain)
        self._check_answer(choice, few, role, request["stop_token_ids"])
        listed = choice.prompt_logprobs or ()
        said = [at[token].logprob for at, token in zip(listed[1:], ids[1:], strict=False) if at and token in at]
        if len(said) != len(own):
            raise self.api.unfit("does not tell how likely the tokens of a prompt are; vLLM does")
        drawn = _logprobs(role, ids, choice.token_ids, request["temperature"])
        check_finite(drawn)
        theirs, of_prompt = torch.tensor([*said, *choice.logprobs.token_logprobs]), slice(len(own))
        off = (theirs - torch.cat([own, drawn])).abs()
        tolerance = self.tolerance or tolerance_of(role)
        if not float(off.mean()) <= tolerance:
            raise RunFailed(
                f"{self.api.name} does not serve this policy: {name} is off by {float(off.mean()):.2g} nats a token of "
                f"the probe, over {tolerance:g}; see to its base, its --dtype and --logprobs-mode ({AS_IT_SAYS}), or "
                "give `sampling.tolerance` if the precision explains it"
            )
        if len(before) and (theirs[of_prompt] - before).abs().mean() < 0.5 * off[of_prompt].mean():
            raise RunFailed(
                f"{self.api.name} still answers with the policy before {name}: its log-probabilities are nearer to "
                "that one's; restart it and run the same command again"
            )

    # -------------------------------------------------------------------------------------------------- what is kept

    def _new_drawn(self) -> Replies[_Drawn]:
        path = None if self._place is None else self._place / f"{uuid.uuid4().hex}.jsonl"
        self._files[-1] += [] if path is None else [path]
        return Replies(_Drawn, path, is_synced=False)

    def forget(self) -> None:
        """A checkpoint has what became of it. What the last one has goes; what came since stays until the next, since
        a newest checkpoint that is damaged is passed over."""
        for file in self._files.pop(0) if len(self._files) > 1 else ():
            file.unlink(missing_ok=True)
        found = {key: reply for key, reply in self.drawn.found.items() if key not in self._old}
        self._old = set(found)
        self._files.append([])
        self.drawn = self._new_drawn()
        self.drawn.found.update(found)

    async def close(self) -> None:
        """Unloads whatever of this run is there, by whichever of its processes, and deletes its folders."""
        async with self.api.endpoint.client() as client:
            with suppress(Again):
                names = [model.id for model in await self.api.models(client) if model.id.endswith(f"-{self._run}")]
                for name in names:
                    await self._unload(client, name)
        self._loaded.clear()
        self._ready.clear()
        shutil.rmtree(self.adapters, ignore_errors=True)


def tolerance_of(role: Role) -> float:
    """Mean nats a token that a probe may be off."""
    is_in_4_bits = bool(getattr(role.causal, "is_quantized", False))
    return IN_4_BITS if is_in_4_bits else TOLERANCES.get(role.multiplies_in, 0.1)


def version_of(role: Role) -> str | None:
    """A name made of the adapter's weights and configuration; None: the role has no adapter."""
    if not isinstance(role.model, PeftModel):
        return None
    config = role.model.peft_config["default"].to_dict()
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=_sorted).encode())
    for name, weight in sorted(adapter_weights(role.model).items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"align-{found.hexdigest()[:24]}"


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _logprobs(role: Role, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> Tensor:
    """Of an answer's tokens, as the role itself has them: (R,)."""
    rollouts = rollouts_of([prompt], [answer], end_ids=())
    return read_all(role, rollouts, temperature=temperature).logprobs[0]


def _adapters(sampling: Sampling, folder: Path | None, run: str) -> Path:
    """The folder for one run's versions, which holds nothing else."""
    if sampling.adapter_dir is not None:
        return Path(sampling.adapter_dir) / f"{'' if folder is None else folder.resolve().name}-{run}"
    return Path(tempfile.mkdtemp(prefix="align-served-")) if folder is None else folder.resolve() / SERVED
