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
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from torch import Tensor

from align.artifact import DRAWN, SERVED
from align.errors import BadInput, RunFailed
from align.files import folder_in_one_go
from align.models.roles import Role, adapter_weights
from align.models.saving import save_role
from align.replies import Replies, Reply
from align.rollout.draw import check_finite
from align.rollout.reading import read_all
from align.rollout.rollouts import by_row, cut_at_end, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.rollout.vllm_api import AS_IT_SAYS, PLAIN, Api, Choice, Gone
from align.servers import BEAT, Again, Checked, all_of, read_as
from align.settings import Sampling

AT_ONCE = 256  # answers that are asked for, unless `batch_size` says how many: the server itself makes its batches
PROBED = 48  # tokens of a prompt that a version is probed with, at the most
ANSWERED = 8  # tokens of its answer to it, at the most
# mean nats a token that a probe may be off. In float32 two engines differ by 1e-6 to 1e-5, in 16 bits by a hundredth;
# over a base in 4 bits here, and in 16 there, by what the 4 bits cost
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
IN_4_BITS = 0.5
KNOWN = "known.json"  # in a version's folder: what it is known by
CURE = "see to it and run the same command again: what it has drawn is kept"


Request = dict[str, Any]


class _Drawn(Reply):
    """An answer, by the hash of the policy, the prompt, its seed and the sampling. Without one: which `version` the
    answers of a step are drawn from, by the hash of its seed, stream and number."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    version: str | None = None


class _Known(Checked):
    """A prompt's tokens, and how likely a version of the policy holds each but the first: what it is known by."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class VllmSampler(Sampler):
    """One policy behind a server."""

    server: "Server"

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> Sampled:
        """There is no reading: another engine's numbers are its own."""
        own = version_of(self.role)
        version = self.server.begun(_key_of(seeds), self.beat) or own
        asked = self._requests(version, prompts, sampling, seeds)
        if version != own and self.server.lacks(asked) and not self.server.has(version):
            version, asked = own, self._requests(own, prompts, sampling, seeds)  # its folder is gone
        if self.server.lacks(asked):
            policy = self._policy(version, is_own=version == own)
            asyncio.run(self.server.answer(policy, asked, self.batch_size or AT_ONCE, self.beat))
        answers = [self.server.drawn.found[_hash(request)] for request in asked]
        rollouts = rollouts_of(prompts, [answer.tokens for answer in answers], end_ids=self.end_ids)
        return Sampled(rollouts, by_row([answer.logprobs for answer in answers], rollouts.width))

    def ahead(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds) -> None:
        policy = self._policy(version_of(self.role), is_own=True)
        asked = self._requests(policy.version, prompts, sampling, seeds)
        self.server.begin(policy, _key_of(seeds), asked, self.batch_size or AT_ONCE, self.beat)

    def forget(self) -> None:
        self.server.forget()

    def close(self) -> None:
        asyncio.run(self.server.close())

    def _policy(self, version: str | None, *, is_own: bool) -> "Policy":
        tolerance = self.server.tolerance or tolerance_of(self.role)
        return Policy(version, self.role if is_own else None, self.role.num_logits, tolerance)

    def _requests(
        self, version: str | None, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Seeds
    ) -> list[Request]:
        """All that each answer depends on."""
        common = PLAIN | {
            "model": version,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "stop_token_ids": list(self.end_ids),
        }
        rows = zip(prompts, seeds.numbers(), strict=True)
        return [common | {"prompt": list(prompt), "seed": seed} for prompt, seed in rows]


@dataclass(frozen=True)
class Policy:
    """What answers are asked of. `role`: the policy itself, unless it has been trained since."""

    version: str | None  # None: the base alone
    role: Role | None
    num_tokens: int  # of the vocabulary
    tolerance: float  # mean nats a token that a probe may be off


class Server:
    """A vLLM server as one process of a stage asks it. What is kept of it goes with the run's `folder`; without one,
    nothing is.

    Raises:
        BadInput: the key's environment variable is not set.
    """

    def __init__(self, sampling: Sampling, folder: Path | None):
        self.api, self.tolerance = Api(sampling), sampling.tolerance
        self._run = _hash(str(folder and folder.resolve()))[:12]
        self.adapters = _adapters(sampling, folder, self._run)
        self._place = None if folder is None else folder / DRAWN
        earlier = [] if self._place is None else sorted(self._place.glob("*.jsonl"))
        self._files = [[*earlier]]  # of what was drawn since the last checkpoint, and since the one before
        self.drawn = self._new_drawn()
        for file in earlier:
            self.drawn.read(file)
        self._old = set[str]()  # keys of what was drawn before the last checkpoint
        self._ready: dict[str | None, str] = {}  # version -> the name that the server has for it
        self._last: _Known | None = None  # of the version that was made ready last
        self._ahead: tuple[str, Future[None]] | None = None  # what is drawn meanwhile: the key of its step
        self._keeping = threading.Lock()  # of `drawn`, which that adds to

    # ------------------------------------------------------------------------------------------------------- answers

    async def answer(
        self, policy: Policy, asked: Sequence[Request], at_once: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Has `drawn` hold an answer to each of `asked`.

        Raises:
            BadInput: this is no server for the recipe.
            Diverged: the policy's logits are not finite.
            RunFailed: it fails again and again, or what it serves is another policy; what was drawn is kept.
        """
        free, alone, api = asyncio.Semaphore(at_once), asyncio.Lock(), self.api

        async def one(client: httpx.AsyncClient, key: str, request: Request) -> None:
            async def once() -> _Drawn:
                async with alone:
                    name = await self._made_ready(client, policy, request)
                try:
                    choice = await api.complete(client, request | {"model": name})
                except Gone:
                    self._ready.pop(policy.version, None)
                    raise
                self._check_answer(choice, request, policy)
                return _Drawn(key=key, tokens=choice.token_ids, logprobs=choice.logprobs.token_logprobs)

            async with free:
                self._keep(await api.endpoint.tried(once, api.name, CURE))

        missing = {key: request for request in asked if (key := _hash(request)) not in self.drawn.found}
        async with api.endpoint.client() as client:
            await api.endpoint.tried(partial(self._check_room, client, asked), api.name, CURE)
            await all_of([one(client, key, request) for key, request in missing.items()], beat)

    def begin(
        self, policy: Policy, step: str, asked: Sequence[Request], at_once: int, beat: Callable[[], None]
    ) -> None:
        """Has the policy as it is made ready, and its answers drawn in a thread, until `begun` is asked for them."""

        async def made_ready() -> None:
            async with self.api.endpoint.client() as client:
                once = partial(self._made_ready, client, policy, asked[0])
                await all_of([self.api.endpoint.tried(once, self.api.name, CURE)], beat)

        if asked:
            asyncio.run(made_ready())
        self._keep(_Drawn(key=step, version=policy.version))
        work = self.answer(replace(policy, role=None), asked, at_once)
        self._ahead = step, _in_a_thread(work)

    def begun(self, step: str, beat: Callable[[], None]) -> str | None:
        """The version that this step's answers are drawn from, where that was begun before, and perhaps by a run that
        was killed since; waits until they are there."""
        if self._ahead is not None and self._ahead[0] == step:
            future, self._ahead = self._ahead[1], None
            while not wait([future], timeout=BEAT).done:
                beat()
            future.result()
        found = self.drawn.found.get(step)
        return None if found is None else found.version

    def lacks(self, asked: Sequence[Request]) -> bool:
        """Whether any of these has still to be answered."""
        return any(_hash(request) not in self.drawn.found for request in asked)

    def has(self, version: str | None) -> bool:
        """Whether a version that is no role's any more can be drawn from."""
        return version in self._ready or (self._folder(version) / KNOWN).is_file()

    async def _check_room(self, client: httpx.AsyncClient, requests: Sequence[Request]) -> None:
        room = (await self.api.base(client)).max_model_len
        longest = max((len(request["prompt"]) + request["max_tokens"] for request in requests), default=0)
        if room is not None and longest > room:
            raise self.api.unfit(
                f"holds {room} tokens, and a prompt with `sampling.max_new_tokens` has {longest}: start it with "
                f"--max-model-len {longest} or more"
            )

    def _check_answer(self, choice: Choice, request: Request, policy: Policy) -> None:
        tokens, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        most, end_ids = request["max_tokens"], request["stop_token_ids"]
        wrong = None
        if not 1 <= len(tokens) <= most or len(logprobs) != len(tokens):
            wrong = f"{len(tokens)} tokens, where {most} are most, and {len(logprobs)} log-probabilities"
        elif not all(0 <= token < policy.num_tokens for token in tokens):
            wrong = f"tokens that the base does not have ({max(tokens)}, of {policy.num_tokens})"
        elif len(cut_at_end(tokens, end_ids)) < len(tokens):
            wrong = "an answer that goes on after its end token"
        elif len(tokens) < most and tokens[-1] not in end_ids:
            wrong = f"an answer that ends with token {tokens[-1]}, which is none of its ends ({list(end_ids)})"
        if wrong:
            raise RunFailed(f"{self.api.name} gave {wrong}; {AS_IT_SAYS}")

    # ------------------------------------------------------------------------------------------------------- versions

    async def _made_ready(self, client: httpx.AsyncClient, policy: Policy, request: Request) -> str:
        """The name to ask for: the version's, loaded and probed, or the base's."""
        if policy.version in self._ready:
            return self._ready[policy.version]
        known = self._known(policy, request)
        if policy.version is None:
            name = (await self.api.base(client)).id
        else:
            name = self._name(policy.version)
            await self.api.load(client, name, self._written(policy, known))
        await self._check(client, policy, name, request, known)
        self._last, self._ready[policy.version] = known, name
        ahead = self._ahead and self.drawn.found[self._ahead[0]].version
        for old in [version for version in self._ready if version not in (policy.version, ahead)]:
            await self._unload(client, self._ready.pop(old))
        return name

    def _known(self, policy: Policy, request: Request) -> _Known:
        """What the policy is known by: as it says itself, or as it once said.

        Raises:
            Diverged: its logits are not finite.
        """
        if policy.role is None:
            return read_as(_Known, (self._folder(policy.version) / KNOWN).read_bytes())
        ids = request["prompt"][-PROBED:] if self._last is None else self._last.ids
        own = _logprobs(policy.role, ids[:1], [*ids[1:], request["stop_token_ids"][0]], 1.0)
        check_finite(own)
        return _Known(ids=ids, logprobs=tuple(own[:-1].tolist()))  # the end was there for a prompt of one token

    def _name(self, version: str) -> str:
        """A run's own: another may leave the same policy while this one needs it."""
        return f"{version}-{self._run}"

    def _folder(self, version: str | None) -> Path:
        assert version is not None, "the base alone is nobody's folder"
        return self.adapters / self._name(version)

    def _written(self, policy: Policy, known: _Known) -> str:
        """The folder of this version, made by whichever process comes first."""
        folder = self._folder(policy.version)
        if not folder.is_dir() and policy.role is not None:
            self.adapters.mkdir(parents=True, exist_ok=True)
            with folder_in_one_go(folder, first_stays=True) as temporary:
                save_role(Role(policy.role.model), temporary, base_name=str(policy.role.causal.config.name_or_path))
                (temporary / KNOWN).write_text(known.model_dump_json(), encoding="utf-8")
        return str(folder.resolve())

    async def _unload(self, client: httpx.AsyncClient, name: str) -> None:
        with suppress(Again):  # gone itself, perhaps, and the adapter with it
            await self.api.unload(client, name)
        shutil.rmtree(self.adapters / name, ignore_errors=True)

    async def _check(
        self, client: httpx.AsyncClient, policy: Policy, name: str, request: Request, known: _Known
    ) -> None:
        """Whether what is served under this name is the policy that it should be: by the tokens of a prompt, and, where
        the policy itself is here, by those that it answers with, at the temperature."""
        few = min(ANSWERED, request["max_tokens"])
        plain = {"model": name, "prompt": list(known.ids), "max_tokens": few, "seed": 0, "top_k": -1, "top_p": 1.0}
        asked = request | plain | {"prompt_logprobs": 0}
        choice = await self.api.complete(client, asked)
        self._check_answer(choice, asked, policy)
        listed, rest = choice.prompt_logprobs or (), known.ids[1:]
        said = [at[token].logprob for at, token in zip(listed[1:], rest, strict=False) if at and token in at]
        if len(said) != len(rest):
            raise self.api.unfit("does not tell how likely the tokens of a prompt are; vLLM does")
        theirs, own = torch.tensor(said), torch.tensor(known.logprobs)
        off = (theirs - own).abs()
        if policy.role is not None:
            drawn = _logprobs(policy.role, known.ids, choice.token_ids, request["temperature"])
            check_finite(drawn)
            off = torch.cat([off, (torch.tensor(choice.logprobs.token_logprobs) - drawn).abs()])
        if len(off) and not float(off.mean()) <= policy.tolerance:
            raise RunFailed(
                f"{self.api.name} does not serve this policy: {name} is off by {float(off.mean()):.2g} nats a token of "
                f"the probe, over {policy.tolerance:g}; see to its base, --dtype and --logprobs-mode ({AS_IT_SAYS}), "
                "or give `sampling.tolerance` if the precision explains it"
            )
        before = None if self._last is None or self._last.ids != known.ids else torch.tensor(self._last.logprobs)
        if before is not None and len(before) and (theirs - before).abs().mean() < 0.5 * (theirs - own).abs().mean():
            raise RunFailed(
                f"{self.api.name} still answers with the policy before {name}: its log-probabilities are nearer to "
                "that one's; restart it and run the same command again"
            )

    # -------------------------------------------------------------------------------------------------- what is kept

    def _keep(self, drawn: _Drawn) -> None:
        with self._keeping:
            self.drawn.add(drawn)

    def _new_drawn(self) -> Replies[_Drawn]:
        path = None if self._place is None else self._place / f"{uuid.uuid4().hex}.jsonl"
        self._files[-1] += [] if path is None else [path]
        return Replies(_Drawn, path, is_synced=False)

    def forget(self) -> None:
        """A checkpoint has what became of it. What the last one has goes; what came since stays until the next, since
        a newest checkpoint that is damaged is passed over."""
        with self._keeping:
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
            with suppress(Again, BadInput):  # the run is done, whatever becomes of the server
                names = [model.id for model in await self.api.models(client) if model.id.endswith(f"-{self._run}")]
                for name in names:
                    await self._unload(client, name)
        self._ready.clear()
        shutil.rmtree(self.adapters, ignore_errors=True)


def _in_a_thread(work: Coroutine[Any, Any, None]) -> Future[None]:
    """What it comes to; a process that ends does not wait for it."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _key_of(seeds: Seeds) -> str:
    """Of a step, on one process."""
    return _hash([seeds.seed, seeds.stream, seeds.step, list(seeds.rows)])


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
