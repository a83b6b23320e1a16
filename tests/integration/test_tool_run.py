"""A run of an environment with tools: calls are sampled, read, answered, trained on and recorded."""

import json
import random
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from support.orchestrated import batches, make_config, metrics, run, trainer_of
from support.scripted_engine import ScriptedEngine
from support.tool_envs import LIBRARY
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.tokenizer import load_model_text

REPLIES = [
    'I look.\n<tool_call>\n{"name": "lookup", "arguments": {"page": "a"}}\n</tool_call>',
    '<tool_call>{"name": "lookup", "arguments": {"page": "a"}}</tool_call><tool_call>{"name": "nobody"}</tool_call>',
    '<tool_call>\n{"name": "answer", "arguments": {"text": "b"}}\n</tool_call>',
    '<tool_call>{"name": "loo',
    "No call.",
]


async def test_calls_go_from_the_engine_to_the_environment_and_into_batches(tiny_model: Path, tmp_path: Path):
    chat = TemplateChat(load_model_text(str(tiny_model)))
    spelled = [[*chat.encoder.encode(reply, "\ufdef"), chat.stop_ids[0]] for reply in REPLIES]

    def says(body: dict[str, Any]) -> Sequence[int]:
        return random.Random(str(body["seed"])).choice(spelled)

    orchestrator = {"env": [{"id": LIBRARY}], "sampling": {"max_tokens": 256}}
    config = make_config(tiny_model, tmp_path, max_steps=1, seq_len=4096, orchestrator=orchestrator)
    async with ScriptedEngine(script=says) as engine:
        assert await run(config, engine, trainer_of(config)) is None
    merged = metrics(config)
    assert merged[1]["tool_calls/count/mean"] > 1
    assert 0 < merged[1]["tool_calls/malformed/share"] < 1
    lines = (tmp_path / "trajectories" / "step_1.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record["error"] is None and len(record["samples"]) == 1 for record in records)  # no token drift
    for record in records:
        messages = record["messages"]
        asked = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert asked == answered
        assert len(set(asked)) == len(asked)
    known = {tuple(ids) for ids in spelled}
    for sample in (sample for batch in batches(config) for sample in batch.samples):
        stretches = groupby(zip(sample.token_ids, sample.loss_mask, strict=True), key=itemgetter(1))
        trained = [tuple(token for token, _ in stretch) for chosen, stretch in stretches if chosen]
        assert trained
        assert set(trained) <= known  # nothing but whole replies, as they were sampled
