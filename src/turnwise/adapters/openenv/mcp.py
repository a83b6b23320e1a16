"""Tools of OpenEnv's MCP environments: listed by their route, called by actions, answered in text."""

import json
from collections.abc import Mapping
from typing import Any, cast

from turnwise.adapters.openenv.wire import OpenEnvError, get_json
from turnwise.envs.messages import Tool, ToolCall

MAX_CALLS = 16  # of one reply that are run
OF_THE_POLICY = frozenset({"invalid_args", "tool_not_found", "execution_error"})
"""Errors of a call that the policy is told; others are failures of the server."""


def listed_tools(url: str, timeout_s: float) -> tuple[Tool, ...]:
    """The tools of the environment at `url`.

    Raises:
        OpenEnvError: it has none, or is no MCP environment.
    """
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    answer = get_json(f"{url}/mcp", timeout_s=timeout_s, body=asked)
    if "error" in answer or not answer.get("result", {}).get("tools"):
        why = answer.get("error", {}).get("message", "it has none")
        raise OpenEnvError(f"{url} lists no tools ({why}); leave args.offer_tools out")
    return tuple(
        Tool(
            name=one["name"],
            description=one.get("description") or "",
            parameters=one.get("inputSchema") or one.get("input_schema") or {"type": "object", "properties": {}},
        )
        for one in answer["result"]["tools"]
    )


def call_action(call: ToolCall) -> dict[str, Any] | None:
    """The action that makes a call; None for one that cannot be run."""
    if call.error is not None or call.name is None or call.arguments is None:
        return None
    return {"type": "call_tool", "tool_name": call.name, "arguments": call.arguments}


def answer_of(observation: object) -> tuple[str, bool]:
    """What a call is answered, and whether it was run.

    Raises:
        OpenEnvError: the server failed to make the call.
    """
    found = cast(dict[str, Any], observation) if isinstance(observation, dict) else {}
    error = found.get("error")
    if isinstance(error, dict):
        kind, text = (str(cast(dict[str, Any], error).get(key)) for key in ("error_type", "message"))
        if kind not in OF_THE_POLICY:
            raise OpenEnvError(f"a tool call failed on the server with {kind}: {text}")
        return f"{kind}: {text}", False
    return _text(found.get("result")), True


def _text(result: object) -> str:
    """The texts of an MCP result; anything else as JSON."""
    if isinstance(result, str):
        return result
    content = cast(Mapping[str, Any], result).get("content") if isinstance(result, dict) else None
    texts = [str(one["text"]) for one in cast(list[Any], content or []) if isinstance(one, dict) and "text" in one]
    return "\n".join(texts) if texts else json.dumps(result)
