"""What is made of an engine's answer, and what of one that cannot be used."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.inference.answers import Answer, first_not_finite
from turnwise.inference.errors import EngineError

URL = "http://127.0.0.1:8000"
CHOICE: dict[str, Any] = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}


def answer(**changes: Any) -> Answer:
    return Answer.of(msgspec.json.encode({"choices": [CHOICE | changes]}), URL, 4)


@given(st.lists(st.one_of(st.floats(-1e4, 0), st.sampled_from([None, math.nan, math.inf, -math.inf]))))
def test_the_first_value_that_is_no_finite_number_is_found(values: list[float | None]):
    wrong = [i for i, value in enumerate(values) if value is None or math.isnan(value) or math.isinf(value)]
    assert first_not_finite(values) == (wrong[0] if wrong else None)


def test_a_sound_reply_is_handed_on():
    assert answer().reply(None) == ([5, 6], [-1.0, -2.0], "stop")


def test_the_words_name_the_token_the_engine_and_the_version_that_sampled_it():
    broken = answer(logprobs={"token_logprobs": [-1.0, None]})
    for version, policy in ((None, 4), (9, 9)):
        with pytest.raises(EngineError) as caught:
            broken.reply(version)
        told = (
            f"{URL}: the logits of policy version {policy} are not finite: the logprob of token 2 of the reply, id 6, is null. "
        )
        assert str(caught.value).startswith(told)
        assert all(key in str(caught.value) for key in ("actor/grad_norm", "trainer.optim.lr", "NaN in the model's files"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "truncated"),
        (b'{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [NaN]}}]}', "malformed"),
        (b'{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [-1e999]}}]}', "out of range"),
        (b'{"choices": [{"token_ids": "none"}]}', "Expected `array"),
        (b'{"object": "error"}', "choices"),
        (b'{"choices": []}', "no choices"),
        (b"\xff" * 10_000, "malformed"),
    ],
)
def test_a_body_of_another_form_is_refused_with_the_url(body: bytes, words: str):
    with pytest.raises(EngineError, match=rf"{URL}.*{words}") as caught:
        Answer.of(body, URL, 0)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": None}, "support return_token_ids"),
        ({"finish_reason": None}, "support return_token_ids"),
        ({"logprobs": None}, "2 token ids with 0 logprobs"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "2 token ids with 1 logprobs"),
    ],
)
def test_a_reply_that_lacks_a_part_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(EngineError, match=f"{URL}: .*{words}"):
        answer(**changes).reply(None)


def test_logprobs_of_a_prompt_are_those_of_its_own_ids():
    told = [None, {"6": {"logprob": -0.5}, "1": {"logprob": -0.1}}, {"7": {"logprob": -1.5}}]
    assert answer(prompt_logprobs=told).prompt_logprobs([5, 6, 7], None) == [-0.5, -1.5]
    with pytest.raises(EngineError, match="for 1 of 2 tokens"):
        answer(prompt_logprobs=told).prompt_logprobs([5, 6, 8], None)
    with pytest.raises(EngineError, match=r"version 4 .* token 2 of the prompt after its first token, id 7, is null"):
        answer(prompt_logprobs=[*told[:2], {"7": {"logprob": None}}]).prompt_logprobs([5, 6, 7], None)
