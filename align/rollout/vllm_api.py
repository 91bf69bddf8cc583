"""vLLM's HTTP interface, as far as it is used: its models, adapters that come and go, completions from token ids."""

from collections.abc import Sequence
from typing import Annotated, Any

import httpx
from pydantic import Field

from align.errors import BadInput
from align.servers import Again, Checked, Endpoint, Response, Schema, api_key_of, read_as
from align.settings import Sampling

MAX_BYTES = 1 << 28  # of a response
LONGEST_WAIT = 10.0  # seconds between two tries: a server that is started again is soon found
TO_UNLOAD = 10.0  # seconds: nothing depends on it
AS_IT_SAYS = "start it as `align serve RECIPE` says"
NO_SUCH_PLACE = '"Not Found"'  # of a server without this address, in FastAPI's words
PLAIN = {  # what it was started with, or its model brings, has no say
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

Logprob = Annotated[float, Field(le=1e-3)]  # 0 at the most, but for what 16 bits round


class Likely(Checked):
    logprob: Logprob


class _Logprobs(Checked):
    token_logprobs: tuple[Logprob, ...]


class Choice(Checked):
    """An answer: its tokens, how likely each was, and where they were asked for how likely the prompt's are."""

    token_ids: tuple[int, ...]
    logprobs: _Logprobs
    prompt_logprobs: tuple[dict[int, Likely] | None, ...] | None = None


class _Completion(Checked):
    choices: Annotated[tuple[Choice, ...], Field(min_length=1, max_length=1)]


class Model(Checked):
    """What can be asked: a base, or an adapter over its parent."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(Checked):
    data: tuple[Model, ...]


class Gone(Again):
    """It does not know this policy, or not any more."""


class Api:
    """One server. Whatever does not answer, for now, raises Again; what never will, BadInput."""

    def __init__(self, sampling: Sampling):
        assert sampling.url is not None, "the settings see to it"
        self.endpoint = Endpoint(
            sampling.url.rstrip("/").removesuffix("/v1"),
            key="sampling.url",
            timeout=sampling.timeout,
            max_retries=sampling.max_retries,
            longest_wait=LONGEST_WAIT,
            most_bytes=MAX_BYTES,
            api_key=api_key_of(sampling.api_key_env, "sampling.api_key_env"),
        )
        self.name = f"vLLM at {self.endpoint.url}"

    async def models(self, client: httpx.AsyncClient) -> tuple[Model, ...]:
        return self._read(_Models, await self._sent(client, None, "/v1/models")).data

    async def base(self, client: httpx.AsyncClient) -> Model:
        found = next((model for model in await self.models(client) if model.parent is None), None)
        if found is None:
            raise self.unfit("serves no model")
        return found

    async def load(self, client: httpx.AsyncClient, name: str, folder: str) -> None:
        asked = {"lora_name": name, "lora_path": folder}
        response = await self._sent(client, asked, "/v1/load_lora_adapter", expected=(400, 404, 500))
        if response.is_good or (response.status == 400 and "already been loaded" in response.text):
            return
        if response.status == 404 and NO_SUCH_PLACE in response.text:
            raise self.unfit(f"takes no adapters while it runs; {AS_IT_SAYS}")
        if response.status == 500 and not await self._is_well(client):  # else it is the adapter that it cannot load
            raise self.endpoint.again(response)
        raise self.unfit(
            f"does not take the policy in {folder} ({self.endpoint.said(response)}); {AS_IT_SAYS}, and let "
            "`sampling.adapter_dir` be a folder that it sees too"
        )

    async def unload(self, client: httpx.AsyncClient, name: str) -> None:
        """Raises Again: the server is gone itself, perhaps, and the adapter with it."""
        await self.endpoint.send(client, {"lora_name": name}, "/v1/unload_lora_adapter", timeout=TO_UNLOAD)

    async def complete(self, client: httpx.AsyncClient, request: dict[str, Any]) -> Choice:
        """Raises Gone (an Again): there is no such model."""
        response = await self._sent(client, request, "/v1/completions", expected=(404,))
        if response.status == 404:
            raise Gone(f"it has been started again, or has dropped {request['model']}")
        return self._read(_Completion, response).choices[0]

    async def _is_well(self, client: httpx.AsyncClient) -> bool:
        return (await self.endpoint.send(client, None, "/health", timeout=TO_UNLOAD)).is_good

    async def _sent(
        self, client: httpx.AsyncClient, body: dict[str, Any] | None, path: str, expected: Sequence[int] = ()
    ) -> Response:
        """A response that is good, or whose status is `expected`."""
        response = await self.endpoint.send(client, body, path)
        if response.is_good or response.status in expected:
            return response
        if response.may_pass:
            raise self.endpoint.again(response)
        said = self.endpoint.said(response)
        if response.status in (401, 403):
            raise self.unfit(f"lets nobody in with this key; set what `sampling.api_key_env` names ({said})")
        raise self.unfit(f"refuses a request; {AS_IT_SAYS} ({said})")

    def _read(self, schema: type[Schema], response: Response) -> Schema:
        try:
            return read_as(schema, response.text)
        except ValueError as error:  # a proxy's page, or an older vLLM's
            raise Again(f"its response is not as vLLM's are ({self.endpoint.clean(str(error))})") from error

    def unfit(self, why: str) -> BadInput:
        return BadInput(f"`sampling.url`: {self.endpoint.url} {why}")
