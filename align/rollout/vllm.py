"""Draws from a vLLM server over HTTP: token ids go out, token ids and their log-probabilities come in.

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
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor

from align.artifact import DRAWN, SERVED
from align.errors import BadInput, RunFailed
from align.files import folder_in_one_go
from align.models.roles import Role, adapter_weights
from align.models.saving import save_role
from align.replies import Replies, Reply
from align.rollout.reading import read_all
from align.rollout.rollouts import by_row, cut_at_end, rollouts_of
from align.rollout.sampler import Sampled, Sampler, Seeds
from align.servers import Again, Checked, Endpoint, Response, Schema, all_of, api_key_of, read_as
from align.settings import Sampling

AT_ONCE = 256  # answers that are asked for, unless `batch_size` says how many: the server itself makes its batches
PROBED = 48  # tokens of a prompt that a version is probed with, at the most
ANSWERED = 8  # tokens of its answer to it
# mean nats a token that a probe may be off. In float32 two engines differ by 1e-6 to 1e-5, in 16 bits by a hundredth;
# over a base in 4 bits here, and in 16 there, by what the 4 bits cost
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
IN_4_BITS = 0.5
MAX_BYTES = 1 << 28  # of a response
AS_IT_SAYS = "start it as `align serve RECIPE` says"
NO_SUCH_PLACE = '"Not Found"'  # of a server without this address, in FastAPI's words

Logprob = Annotated[float, Field(le=1e-3)]  # 0 at the most, but for what 16 bits round


class _Likely(Checked):
    logprob: Logprob


class _Logprobs(Checked):
    token_logprobs: tuple[Logprob, ...]


class _Choice(Checked):
    token_ids: tuple[int, ...]
    logprobs: _Logprobs
    prompt_logprobs: tuple[dict[int, _Likely] | None, ...] | None = None


class _Completion(Checked):
    """vLLM's completion, as far as it is read."""

    choices: Annotated[tuple[_Choice, ...], Field(min_length=1, max_length=1)]


class _Model(Checked):
    id: str
    parent: str | None = None  # of an adapter: its base
    max_model_len: int | None = None


class _Models(Checked):
    data: tuple[_Model, ...]


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
        asked = [
            self._request(version, prompt, sampling, seed)
            for prompt, seed in zip(prompts, seeds.numbers(), strict=True)
        ]
        keys = [hashlib.sha256(json.dumps(request).encode()).hexdigest() for request in asked]
        kept = self.server.drawn
        missing = {key: request for key, request in zip(keys, asked, strict=True) if key not in kept.found}
        if missing:
            asyncio.run(self.server.answer(self.role, version, missing, self.end_ids, self.batch_size or AT_ONCE))
        answers = [kept.found[key] for key in keys]
        rollouts = rollouts_of(prompts, [answer.tokens for answer in answers], end_ids=self.end_ids)
        return Sampled(rollouts, by_row([answer.logprobs for answer in answers], rollouts.width))

    def forget(self) -> None:
        self.server.forget(version_of(self.role))

    def close(self) -> None:
        self.server.close()

    def _request(self, version: str | None, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """All that an answer depends on. What the server was started with, or its model brings, has no say."""
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


PLAIN = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # the ends are those of `stop_token_ids`
    "logprobs": 0,  # of the drawn tokens alone
    "return_token_ids": True,
    "add_special_tokens": False,
    "skip_special_tokens": False,
}


class Server:
    """A vLLM server as one process of a stage asks it. What is kept of it goes with the run's `folder` (None: nothing).

    Raises:
        BadInput: the key's environment variable is not set.
    """

    def __init__(self, sampling: Sampling, folder: Path | None):
        assert sampling.url is not None, "the settings see to it"
        self.endpoint = Endpoint(
            sampling.url.rstrip("/").removesuffix("/v1"),
            key="sampling.url",
            timeout=sampling.timeout,
            max_retries=sampling.max_retries,
            most_bytes=MAX_BYTES,
            api_key=api_key_of(sampling.api_key_env, "sampling.api_key_env"),
        )
        self.tolerance = sampling.tolerance
        self.adapters = _adapters(sampling, folder)
        here = None if folder is None else folder / DRAWN
        earlier = [] if here is None else sorted(here.glob("*.jsonl"))
        self.drawn = Replies(_Drawn, None if here is None else here / f"{uuid.uuid4().hex}.jsonl", is_synced=False)
        for file in earlier:
            self.drawn.read(file)
        self._earlier = earlier
        self._ready: dict[str | None, str] = {}  # version -> the name that the server has for it
        self._loaded: set[str] = set()
        self._probe: tuple[list[int], Tensor] | None = None  # the tokens, and what the last version says of them

    @property
    def _who(self) -> str:
        return f"vLLM at {self.endpoint.url}"

    # ------------------------------------------------------------------------------------------------------- answers

    async def answer(
        self, role: Role, version: str | None, asked: dict[str, dict[str, Any]], end_ids: Sequence[int], at_once: int
    ) -> None:
        """Has `drawn` hold an answer to each of `asked`.

        Raises:
            BadInput: this is no server for the recipe.
            RunFailed: it fails again and again, or what it serves is another policy; what was drawn is kept.
        """
        free, alone = asyncio.Semaphore(at_once), asyncio.Lock()
        cure = "see to it and run the same command again: what it has drawn is kept"

        async def one(client: httpx.AsyncClient, key: str, request: dict[str, Any]) -> None:
            async def once() -> _Drawn:
                async with alone:
                    name = await self._made_ready(client, role, version, request)
                response = await self._sent(client, request | {"model": name}, "/v1/completions", expected=(404,))
                if response.status == 404:
                    self._ready.pop(version, None)
                    self._loaded.discard(name)
                    raise Again(f"it has been started again, or has dropped {name}")
                return self._drawn(key, request, self._read(response), role, end_ids)

            async with free:
                self.drawn.add(await self.endpoint.tried(once, self._who, cure))

        async with self.endpoint.client() as client:
            await self.endpoint.tried(partial(self._check_room, client, asked.values()), self._who, cure)
            await all_of([one(client, key, request) for key, request in asked.items()])

    def _drawn(self, key: str, request: dict[str, Any], choice: _Choice, role: Role, end_ids: Sequence[int]) -> _Drawn:
        tokens, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        wrong = None
        if not 1 <= len(tokens) <= request["max_tokens"] or len(logprobs) != len(tokens):
            most = request["max_tokens"]
            wrong = f"{len(tokens)} tokens, where {most} are most, and {len(logprobs)} log-probabilities"
        elif not all(0 <= token < role.num_logits for token in tokens):
            wrong = f"tokens that the base does not have ({max(tokens)}, of {role.num_logits})"
        elif len(cut_at_end(tokens, end_ids)) < len(tokens):
            wrong = "an answer that goes on after its end token"
        elif len(tokens) < request["max_tokens"] and tokens[-1] not in end_ids:
            wrong = f"an answer that ends with token {tokens[-1]}, which is none of its ends ({list(end_ids)})"
        if wrong:
            raise RunFailed(f"{self._who} gave {wrong}")
        return _Drawn(key=key, tokens=tokens, logprobs=logprobs)

    # ------------------------------------------------------------------------------------------------------- versions

    async def _made_ready(
        self, client: httpx.AsyncClient, role: Role, version: str | None, request: dict[str, Any]
    ) -> str:
        """The name to ask for: the version's, loaded and probed, or the base's."""
        if version in self._ready:
            return self._ready[version]
        name = version
        if name is None:
            name = (await self._served_base(client)).id
        else:
            await self._load(client, role, name)
        await self._check(client, role, name, request)
        self._ready = {version: name}
        for old in sorted(self._loaded - {name}):
            await self._unload(client, old)
        return name

    async def _served_base(self, client: httpx.AsyncClient) -> _Model:
        models = self._read_as(_Models, await self._sent(client, None, "/v1/models")).data
        found = next((model for model in models if model.parent is None), None)
        if found is None:
            raise self._unfit("serves no model")
        return found

    async def _check_room(self, client: httpx.AsyncClient, requests: Iterable[dict[str, Any]]) -> None:
        room = (await self._served_base(client)).max_model_len
        longest = max(len(request["prompt"]) + request["max_tokens"] for request in requests)
        if room is not None and longest > room:
            raise self._unfit(
                f"holds {room} tokens, and a prompt with `sampling.max_new_tokens` has {longest}: start it with "
                f"--max-model-len {longest} or more"
            )

    async def _load(self, client: httpx.AsyncClient, role: Role, name: str) -> None:
        folder = self.adapters / name
        if not folder.is_dir():
            self.adapters.mkdir(parents=True, exist_ok=True)
            with folder_in_one_go(folder, first_stays=True) as temporary:
                save_role(Role(role.model), temporary, base_name=str(role.causal.config.name_or_path))
        asked = {"lora_name": name, "lora_path": str(folder.resolve())}
        response = await self._sent(client, asked, "/v1/load_lora_adapter", expected=(400, 404))
        self._loaded.add(name)
        if response.is_good or "already" in response.text:
            return
        if response.status == 404 and NO_SUCH_PLACE in response.text:
            raise self._unfit(f"takes no adapters while it runs; {AS_IT_SAYS}")
        raise self._unfit(
            f"does not take the policy in {folder} ({self.endpoint.said(response)}); {AS_IT_SAYS}, and let "
            "`sampling.adapter_dir` be a folder that it sees too"
        )

    async def _unload(self, client: httpx.AsyncClient, name: str) -> None:
        self._loaded.discard(name)
        with suppress(Again):  # gone itself, perhaps, and the adapter with it
            await self.endpoint.send(client, {"lora_name": name}, "/v1/unload_lora_adapter")

    async def _check(self, client: httpx.AsyncClient, role: Role, name: str, request: dict[str, Any]) -> None:
        """Whether what is served under this name is the policy as it is here: by a few tokens of a prompt, and by those
        that it answers with."""
        if self._probe is None:
            self._probe = list(request["prompt"][-PROBED:]), torch.empty(0)
        ids, before = self._probe
        asked = request | {"model": name, "prompt": ids, "max_tokens": ANSWERED, "top_k": -1, "top_p": 1.0, "seed": 0}
        choice = self._read(await self._sent(client, asked | {"prompt_logprobs": 0}, "/v1/completions"))
        listed = choice.prompt_logprobs or ()
        said = [at[token].logprob for at, token in zip(listed[1:], ids[1:], strict=False) if at and token in at]
        if len(said) != len(ids) - 1 or len(choice.token_ids) != len(choice.logprobs.token_logprobs):
            raise self._unfit("does not tell how likely the tokens of a prompt are; vLLM does")
        own = _logprobs(role, ids[:1], ids[1:], 1.0) if len(ids) > 1 else torch.empty(0)
        drawn = _logprobs(role, ids, choice.token_ids, request["temperature"])
        theirs = torch.tensor([*said, *choice.logprobs.token_logprobs])
        self._compare(theirs, torch.cat([own, drawn]), before, role, name)
        self._probe = ids, own

    def _compare(self, theirs: Tensor, own: Tensor, before: Tensor, role: Role, name: str) -> None:
        off = float((theirs - own).abs().mean())
        is_in_4_bits = bool(getattr(role.causal, "is_quantized", False))
        tolerance = self.tolerance or (IN_4_BITS if is_in_4_bits else TOLERANCES.get(role.multiplies_in, 0.1))
        if not off <= tolerance:
            raise RunFailed(
                f"{self._who} does not serve this policy: {name} is off by {off:.2g} nats a token of the "
                f"probe, over {tolerance:g}; see to its base, its --dtype and --logprobs-mode ("
                f"{AS_IT_SAYS}), or give `sampling.tolerance` if the precision explains it"
            )
        if len(before):
            prompt = slice(0, len(before))
            to_before = float((theirs[prompt] - before).abs().mean())
            if to_before < 0.5 * float((theirs[prompt] - own[prompt]).abs().mean()):
                raise RunFailed(
                    f"{self._who} still answers with the policy before {name}: its log-probabilities "
                    "are nearer to that one's; restart it and run the same command again"
                )

    # -------------------------------------------------------------------------------------------------- what is kept

    def forget(self, version: str | None) -> None:
        """What was drawn, and the folders of all versions but this one, whose answers may be asked for next."""
        for file in (*self._earlier, *([self.drawn.path] if self.drawn.path else ())):
            file.unlink(missing_ok=True)
        self._earlier = []
        self.drawn.found.clear()
        for folder in self.adapters.glob("align-*"):
            if folder.name != version:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Unloads what was loaded, and deletes its folders."""

        async def unload() -> None:
            async with self.endpoint.client() as client:
                for name in sorted(self._loaded):
                    await self._unload(client, name)

        asyncio.run(unload())
        shutil.rmtree(self.adapters, ignore_errors=True)

    # -------------------------------------------------------------------------------------------------------- requests

    async def _sent(
        self, client: httpx.AsyncClient, body: dict[str, Any] | None, path: str, expected: Sequence[int] = ()
    ) -> Response:
        """A response that is good, or whose status is `expected`.

        Raises:
            Again: there is none, for now.
            BadInput: the server takes no such request.
        """
        response = await self.endpoint.send(client, body, path)
        if response.is_good or response.status in expected:
            return response
        if response.may_pass:
            raise self.endpoint.again(response)
        said = self.endpoint.said(response)
        if response.status in (401, 403):
            raise self._unfit(f"lets nobody in with this key; set what `sampling.api_key_env` names ({said})")
        raise self._unfit(f"refuses a request, as no vLLM does that {AS_IT_SAYS} ({said})")

    def _read(self, response: Response) -> _Choice:
        return self._read_as(_Completion, response).choices[0]

    def _read_as(self, schema: type[Schema], response: Response) -> Schema:
        try:
            return read_as(schema, response.text)
        except ValueError as error:  # a proxy's page, or an older vLLM's
            raise Again(f"its response is not as vLLM's are ({self.endpoint.clean(str(error))})") from error

    def _unfit(self, why: str) -> BadInput:
        return BadInput(f"`sampling.url`: {self.endpoint.url} {why}")


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


def _adapters(sampling: Sampling, folder: Path | None) -> Path:
    """The folder for one run's versions, which holds nothing else."""
    run = Path.cwd() if folder is None else folder.resolve()
    if sampling.adapter_dir is None:
        return run / SERVED
    return Path(sampling.adapter_dir) / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:12]}"
