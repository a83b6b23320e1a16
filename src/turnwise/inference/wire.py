"""The part of vLLM's HTTP protocol that we speak, as typed structs.

Fields that we do not read are skipped while decoding, which is most of the cost of a completion.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from turnwise.inference.errors import EngineError

FLOAT32_NORMS = "turnwise_float32_norms"  # in vLLM's additional_config, which also keeps compiled code of the two types apart
SHOWN = 200  # bytes of a body that cannot be read
T = TypeVar("T")


class CompletionRequest(msgspec.Struct, omit_defaults=True):
    """Body of `POST /v1/completions` with a prompt of token ids."""

    model: str
    prompt: Sequence[int]
    max_tokens: int = 16
    temperature: float | None = None
    seed: int | None = None
    logprobs: int | None = None  # 0: only the sampled token's logprob
    prompt_logprobs: int | None = None
    stop_token_ids: Sequence[int] = ()
    return_token_ids: bool = False
    add_special_tokens: bool = True
    skip_special_tokens: bool = True


class Logprobs(msgspec.Struct):
    """`choices[0].logprobs`: nats, one for each sampled token; null where its logits were not finite."""

    token_logprobs: list[float | None]


class PromptLogprob(msgspec.Struct):
    """One entry of `prompt_logprobs[i]`, keyed there by the token id as a string; null as in `Logprobs`."""

    logprob: float | None


class Choice(msgspec.Struct):
    """`choices[0]`: ids as sampled, the stop token among them."""

    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(msgspec.Struct):
    """Answer of `POST /v1/completions`."""

    choices: list[Choice]


class RpcResponse(msgspec.Struct):
    """Answer of `POST /collective_rpc`: one result for each worker of the engine."""

    results: list[Any] = []


class NormReport(msgspec.Struct):
    """One norm after `apply_noise`, read back from where requests read it."""

    name: str
    elements: int
    sigma: float  # root mean square of what its weight differs by from the clean one
    changed: float  # share of elements that differ
    resolution: float  # how far rounding to the weight's type may have moved sigma
    magnitude: float  # root mean square of the clean weight


class NoiseReport(msgspec.Struct):
    """Answer of a worker to `apply_noise`."""

    digest: str  # `tensor_digest` of the weights of all norms
    norms: list[NormReport]


def noise_reports(results: Sequence[Sequence[Any]]) -> list[NoiseReport]:
    """The reports of all workers, from the answers of `apply_noise` of each engine.

    Raises:
        EngineError: a worker answered something else.
    """
    try:
        return [msgspec.convert(worker, NoiseReport) for engine in results for worker in engine]
    except msgspec.ValidationError as error:
        raise EngineError(f"apply_noise: a worker did not say what its norms hold: {error}") from error


class CacheReset(msgspec.Struct):
    """Answer of `POST /reset_prefix_cache`, where there is one."""

    success: bool = True


def decoded(content: bytes, decoder: "msgspec.json.Decoder[T]", where: str) -> T:
    """The body of an answer.

    Args:
        where: method and URL of the request.

    Raises:
        EngineError: it is not JSON, or not of the expected form.
    """
    try:
        return decoder.decode(content)
    except msgspec.MsgspecError as error:
        shown = content[:SHOWN].decode(errors="replace")
        raise EngineError(
            f"{where}: the answer cannot be read: {error}. It begins with {shown!r}. Is it an engine of this run that listens "
            "there, and not a proxy or another program?"
        ) from error


def error_message(body: bytes) -> str:
    """The words of an error body: `{"error": {"message": ...}}`, or the text itself when it has another form."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:500]
    if isinstance(content, dict):
        inner = content.get("error", content)
        if isinstance(inner, dict):
            inner = inner.get("message", inner.get("detail", inner))
        return str(inner)
    return str(content)
