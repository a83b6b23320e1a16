"""Bodies that the embedded engine reads and writes: vLLM's, as far as it understands them."""

from typing import Any

import msgspec


class CompletionBody(msgspec.Struct):
    """`POST /v1/completions`. Fields of vLLM that are not named here are ignored, like there."""

    model: str | None = None
    prompt: list[int] | str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    stream: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False


class LoadBody(msgspec.Struct):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(msgspec.Struct):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


class RpcBody(msgspec.Struct):
    """`POST /collective_rpc`."""

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class ServedLogprobs(msgspec.Struct):
    """`choices[0].logprobs`; tokens stand as `token_id:N`, since this engine has no tokenizer. NaN is written as null."""

    token_logprobs: list[float]
    tokens: list[str]
    text_offset: list[int] = []
    top_logprobs: list[dict[str, float] | None] = []


class ServedChoice(msgspec.Struct):
    """`choices[0]`."""

    finish_reason: str
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: ServedLogprobs | None = None
    prompt_logprobs: list[dict[str, dict[str, float]] | None] | None = None
    stop_reason: int | None = None
    text: str = ""
    index: int = 0


class ServedCompletion(msgspec.Struct):
    """Answer of `POST /v1/completions`."""

    id: str
    model: str
    created: int
    choices: list[ServedChoice]
    usage: dict[str, int]
    object: str = "text_completion"


class RequestError(Exception):
    """A request that is answered with an HTTP error status and a message, in the form that vLLM uses."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def body(self) -> bytes:
        error = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return msgspec.json.encode({"error": error})


def bad_request(message: str) -> RequestError:
    return RequestError(400, "BadRequestError", message)


def not_found(message: str) -> RequestError:
    return RequestError(404, "NotFoundError", message)
