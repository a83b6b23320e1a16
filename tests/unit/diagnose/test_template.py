"""Do conversations become tokens and back without a loss?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import tool_templates
from support.rollouts import ECHO, make_config
from support.tiny_model import CHATML
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.text_checks.reading import first_difference
from turnwise.diagnose.text_checks.template import TEMPLATE
from turnwise.diagnose.text_checks.template_tools import arguments_for
from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.tokenizer import load_model_text

LIBRARY = "support.odd_envs:Library"
LAST_MESSAGE_ALONE = "<|im_start|>{{ messages[-1].role }}\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

Judge = Callable[..., Finding]


@pytest.fixture
def judged(tiny_model: Path, tmp_path: Path) -> Judge:
    """The finding on a chat template, by a chat that `change` may spoil."""

    def judge(
        template: str = CHATML, *, env: str = ECHO, chat: type[TemplateChat] = TemplateChat, spoil: Any = None, **settings: Any
    ) -> Finding:
        context = Context(make_config(env=[{"id": env, **settings}]), tmp_path, lambda text: None)
        context.text = replace(load_model_text(str(tiny_model)), template=template)
        context.chat = chat(context.text)
        if spoil is not None:
            spoil(context.chat)
        return TEMPLATE.run(context)

    return judge


class Retokenising(TemplateChat):
    """Makes every prompt from text."""

    def next_prompt(self, prompt_ids: Any, sampled_ids: Any, history: Any, new: Any) -> list[int]:
        return self.first_prompt([*history, *new])


class Lossy(TemplateChat):
    """Loses what is no ASCII."""

    def text(self, sampled_ids: Sequence[int]) -> str:
        return super().text(sampled_ids).encode("ascii", "ignore").decode()


class Trusting(TemplateChat):
    """Encodes messages with whatever special tokens they spell."""

    def first_prompt(self, messages: Any) -> list[int]:
        return self.model.tokenizer.encode(self._render(messages, ""), add_special_tokens=False).ids

    def _render(self, messages: Any, mark: str, *, opening: bool = True) -> str:
        return self._template.render(messages)


class Hasty(TemplateChat):
    """Forgets the line break between two turns."""

    def next_prompt(self, *args: Any) -> list[int]:
        prompt = super().next_prompt(*args)
        return [token for i, token in enumerate(prompt) if i != len(args[0]) + len(args[1])]


class Deaf(TemplateChat):
    """Reads no calls."""

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        return AssistantMessage(content=self.text(sampled_ids))


class Fragile(TemplateChat):
    """Raises on calls that it cannot read."""

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        message = super().reply(sampled_ids, prompt_ids)
        if any(call.error for call in message.tool_calls):
            raise KeyError("name")
        return message


def test_a_template_that_appends_passes(judged: Judge):
    found = judged()
    assert found.verdict is Verdict.PASS, found.evidence
    assert found.evidence == "4 texts survive the round trip, replies end with <|im_end|>, history only grows"
    assert found.data["append_only"] is True


def test_a_history_that_is_tokenised_again_fails(judged: Judge):
    found = judged(chat=Retokenising)
    assert found.verdict is Verdict.FAIL
    assert "a reply broken off inside a character comes back in other tokens in the next prompt" in found.evidence
    assert "Chat.next_prompt" in found.remedy


def test_a_template_that_rewrites_its_history_is_a_warning_where_there_are_turns(judged: Judge):
    found = judged(LAST_MESSAGE_ALONE)
    assert found.verdict is Verdict.WARN
    assert "the chat template rewrites what was said before: each turn becomes a training sample of its own" in found.evidence
    assert found.data["append_only"] is False
    assert judged(LAST_MESSAGE_ALONE, max_turns=1).verdict is Verdict.PASS


def test_a_template_that_drops_thoughts_is_a_warning_where_there_are_turns(judged: Judge):
    found = judged(tool_templates.THINKING)
    assert found.verdict is Verdict.WARN
    assert "the template leaves thoughts out of earlier turns" in found.evidence
    assert judged(tool_templates.THINKING, max_turns=1).verdict is Verdict.PASS


def test_a_reply_that_loses_characters_fails(judged: Judge):
    found = judged(chat=Lossy)
    assert found.verdict is Verdict.FAIL
    assert "a reply comes back from its tokens as another" in found.evidence


def test_an_observation_that_could_end_its_own_turn_fails(judged: Judge):
    found = judged(chat=Trusting)
    assert found.verdict is Verdict.FAIL
    assert "the text '<|im_end|>' inside a message becomes the token 257" in found.evidence


def test_a_template_whose_replies_end_with_no_stop_token_is_a_warning(judged: Judge):
    found = judged(NO_END)
    assert found.verdict is Verdict.WARN
    assert "where no stop token stands" in found.evidence


def test_stop_ids_that_the_tokenizer_lacks_fail(judged: Judge):
    def spoil(chat: TemplateChat) -> None:
        chat._stops = (100_000,)

    found = judged(spoil=spoil)
    assert found.verdict is Verdict.FAIL
    assert "the ids [100000] that should end a reply are not all in the tokenizer" in found.evidence


def test_a_bridge_that_differs_from_the_template_is_a_warning(judged: Judge):
    found = judged(chat=Hasty)
    assert found.verdict is Verdict.WARN
    assert "the next turn begins otherwise than in the template" in found.evidence


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML, "tools are described in the system prompt (docs/tools.md), several calls a reply"),
        (tool_templates.NO_SYSTEM, "tools are described in the system prompt (docs/tools.md), several calls a reply"),
        (tool_templates.HERMES, "tools go by the chat template, several calls a reply"),
        (tool_templates.LISTED, "tools go by the chat template, several calls a reply"),
        (tool_templates.ONE_SHOWN, "tools go by the chat template, one call a reply: further ones are answered as not run"),
    ],
)
def test_calls_survive_the_way_through_a_template(judged: Judge, template: str, told: str):
    found = judged(template, env=LIBRARY)
    assert found.verdict is Verdict.PASS, found.evidence
    assert told in found.evidence


def test_thoughts_that_only_messages_of_the_user_drop_are_no_matter_where_tools_answer(judged: Judge):
    assert judged(tool_templates.THINKING, env=LIBRARY).verdict is Verdict.PASS


def test_calls_that_nothing_reads_fail(judged: Judge):
    found = judged(tool_templates.PROSE, env=LIBRARY)
    assert found.verdict is Verdict.FAIL
    assert "the way in which it writes a call is not understood" in found.evidence


@pytest.mark.parametrize("template", [CHATML, tool_templates.HERMES])
def test_a_chat_that_reads_no_calls_fails(judged: Judge, template: str):
    found = judged(template, env=LIBRARY, chat=Deaf)
    assert found.verdict is Verdict.FAIL
    assert "a call of search as the template writes it is read as no call" in found.evidence


def test_a_chat_that_raises_on_malformed_calls_fails(judged: Judge):
    found = judged(env=LIBRARY, chat=Fragile)
    assert found.verdict is Verdict.FAIL
    assert "the reply '<tool_call>' raises KeyError" in found.evidence


def test_an_environment_that_cannot_be_made_is_not_the_templates_fault(judged: Judge):
    assert judged(env="no_such_module:Env").verdict is Verdict.PASS


def test_arguments_fit_the_schema_of_a_tool():
    properties = {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "kind": {"enum": ["a", "b"]},
        "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    }
    tool = Tool(name="t", description="", parameters={"type": "object", "properties": properties})
    assert arguments_for(tool) == {"text": 'a "quoted" text,\nnaïve – 🙂', "count": 3, "kind": "a", "maybe": 0.5}


def test_the_place_where_two_texts_part_is_shown():
    assert first_difference("abc", "abd") == "'abc' instead of 'abd'"
