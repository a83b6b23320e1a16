"""What an engine's answer to a completion request holds, or in words why it cannot be used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import msgspec

from turnwise.inference.errors import EngineError
from turnwise.inference.wire import Choice, CompletionResponse, decoded, error_message

PATH = "/v1/completions"
WHAT_TO_LOOK_AT = (
    "The engine computes NaN or infinity with these weights. If it served earlier versions well, the policy has diverged: see "
    "actor/grad_norm, actor/loss and mismatch/logprob_abs/mean in metrics.jsonl, and start again with a lower trainer.optim.lr. "
    "At version 0, look for NaN in the model's files, for a quantisation that does not fit them, and for a type too narrow for "
    "the model's activations, such as float16."
)
NAN_REFUSED = "Out of range float values"  # Python's json, by which vLLM's own route writes logprobs of a prompt

_decoder = msgspec.json.Decoder(CompletionResponse)  # what a decoder learns of a type is kept in it


@dataclass(frozen=True, slots=True)
class Answer:
    """The first choice of an answer, and where it comes from.

    Args:
        url: of the engine.
        served: version of the full weights when the request was sent.
    """

    url: str
    choice: Choice
    served: int

    @classmethod
    def of(cls, content: bytes, url: str, served: int) -> Self:
        """The answer in a body.

        Raises:
            EngineError: the body is something else.
        """
        choices = decoded(content, _decoder, f"POST {url}{PATH}").choices
        if not choices:
            raise EngineError(f"{url}: the engine's answer to POST {PATH} has no choices")
        return cls(url, choices[0], served)

    def reply(self, version: int | None) -> tuple[list[int], list[float], str]:
        """Ids, their logprobs in nats, and why they end.

        Args:
            version: LoRA version that was asked for; None for the full weights.

        Raises:
            EngineError: a part is missing, or the logits of a token were not finite.
        """
        ids, reason = self.choice.token_ids, self.choice.finish_reason
        if ids is None or reason is None:
            raise EngineError(f"{self.url}: the reply has no token_ids or finish_reason; engines must support return_token_ids")
        logprobs = self.choice.logprobs.token_logprobs if self.choice.logprobs is not None else []
        if len(logprobs) != len(ids):
            raise EngineError(f"{self.url}: the engine returned {len(ids)} token ids with {len(logprobs)} logprobs")
        return ids, self._finite(logprobs, ids, "reply", version), reason

    def prompt_logprobs(self, ids: Sequence[int], version: int | None) -> list[float]:
        """Logprobs in nats of ids[1:], the prompt that was asked for.

        Raises:
            EngineError: there are more or fewer of them, or logits of the prompt were not finite.
        """
        entries = self.choice.prompt_logprobs or []
        named = [(entry or {}).get(str(token)) for token, entry in zip(ids[1:], entries[1:], strict=False)]
        told = [entry.logprob for entry in named if entry is not None]
        if len(entries) != len(ids) or len(told) != len(ids) - 1:
            raise EngineError(f"{self.url}: the engine returned prompt_logprobs for {len(told)} of {len(ids) - 1} tokens")
        return self._finite(told, ids[1:], "prompt after its first token", version)

    def _finite(self, logprobs: list[float | None], ids: Sequence[int], what: str, version: int | None) -> list[float]:
        place = first_not_finite(logprobs)
        if place is None:
            return cast(list[float], logprobs)
        policy = self.served if version is None else version
        value = "null" if logprobs[place] is None else logprobs[place]
        raise EngineError(
            f"{self.url}: the logits of policy version {policy} are not finite: the logprob of token {place + 1} of the {what}, "
            f"id {ids[place]}, is {value}. {WHAT_TO_LOOK_AT}"
        )


def refusal(url: str, status: int, body: bytes) -> str:
    """Why an engine answered with a status other than 200, in its own words, and what they mean where they hide it."""
    words = error_message(body)
    meaning = f". The logits are not finite. {WHAT_TO_LOOK_AT}" if NAN_REFUSED in words else ""
    return f"{url}: HTTP {status}: {words}{meaning}"


def first_not_finite(values: Sequence[float | None]) -> int | None:
    """Index of the first value that is None, NaN or infinite. JSON knows neither of the last two, so that engines send null."""
    try:
        if math.isfinite(sum(cast(Sequence[float], values))):  # all of them, in one pass that is not Python's
            return None
    except TypeError:
        pass
    return next((i for i, value in enumerate(values) if value is None or not math.isfinite(value)), None)
