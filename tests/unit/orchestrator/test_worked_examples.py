"""Worked examples of an environment: where they stand, and that each template shows their calls as its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from support import tool_templates
from support.musique_rows import bridge_row
from turnwise.config import EnvConfig
from turnwise.envs.musique import MuSiQue
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.tokenizer import load_model_text


@pytest.fixture
def setup() -> EnvSetup:
    rows = [bridge_row()]
    (made,) = load_setups([EnvConfig(id="musique", args={"train": rows, "validation": rows, "shown_examples": 2})], "train")
    return made


def test_examples_stand_between_the_instructions_and_the_first_observation(setup: EnvSetup) -> None:
    messages = setup.opening("Question: ?")
    assert messages[0] == {"role": "system", "content": setup.system_prompt}
    assert messages[-1] == {"role": "user", "content": "Question: ?"}
    assert messages[1:-1] == [dict(message) for message in MuSiQue(shown_examples=2).examples]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (None, '<tool_call>\n{"name": "search", "arguments": {"query": "Ilse Marn born"}}\n</tool_call>'),
        ("HERMES", '<tool_call>\n{"name": "search", "arguments": {"query": "Ilse Marn born"}}\n</tool_call>'),
        ("LLAMA", '{"name": "search", "parameters": {"query": "Ilse Marn born"}}'),
    ],
)
def test_an_example_is_rendered_as_the_model_would_write_it(
    setup: EnvSetup, tiny_model: Path, template: str | None, call: str
) -> None:
    text = load_model_text(str(tiny_model))
    text.tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    chat = TemplateChat(text if template is None else replace(text, template=getattr(tool_templates, template)))
    prompt = chat.with_tools(MuSiQue.tools).first_prompt(setup.opening("Question: ?"))
    shown = text.tokenizer.decode(prompt, skip_special_tokens=False)
    assert shown.count(call) == 1
    assert shown.index("Tolvar Bridge born?") < shown.index(call) < shown.index("[9] Ilse Marn") < shown.index("Question: ?")
