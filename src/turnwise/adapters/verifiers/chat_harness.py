"""A harness of verifiers 0.4 in this process: the plain chat loop, with the task's tools and nothing else.

It is what their harness `null` does, without a Python process of its own for every episode.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult

__all__ = ["ChatHarness"]

DONE = ProgramResult(exit_code=0, stdout="", stderr="")


class ChatHarnessConfig(HarnessConfig):
    """Nothing beside what every harness has."""


class ChatHarness(Harness[ChatHarnessConfig]):
    """Asks for a reply, runs the calls of it, and ends with a reply that calls nothing."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Mapping[str, str], data: Any
    ) -> Any:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [message_to_wire(m) for m in prompt]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            unlimited = aiohttp.ClientTimeout(total=None)  # a reply takes as long as the policy's turn comes
            headers = {"Authorization": f"Bearer {secret}"}
            session = await stack.enter_async_context(aiohttp.ClientSession(timeout=unlimited, headers=headers))
            body: dict[str, Any] = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
            while (reply := await _reply(session, f"{endpoint}/chat/completions", body, trace)) is not None:
                messages.append(reply)
                if not reply.get("tool_calls"):
                    return DONE
                for call in reply["tool_calls"]:
                    content = await _run(call["function"], dispatch, connections)
                    name = call["function"]["name"]
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})
        return DONE


async def _reply(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], trace: Any) -> dict[str, Any] | None:
    """The model's message; None where the rollout was stopped instead.

    Raises:
        RuntimeError: the request was refused for another reason.
    """
    async with session.post(url, json=body) as response:
        if response.status < 400:
            answer = await response.json()
            return {key: value for key, value in answer["choices"][0]["message"].items() if value is not None}
        if trace.stop_condition is not None:
            return None
        raise RuntimeError(f"the request for a reply was answered {response.status}: {(await response.text())[:500]}")


async def _run(call: Mapping[str, Any], dispatch: Mapping[str, Any], connections: Any) -> Any:
    """The answer to one call, or what is wrong with it, for the policy."""
    try:
        arguments = json.loads(call.get("arguments") or "{}")
    except ValueError as error:
        return f"Error: the arguments are not JSON ({error})."
    if not isinstance(arguments, dict):
        return f"Error: the arguments must be a JSON object, not {type(arguments).__name__}."
    if call["name"] not in dispatch:
        return f"Error: there is no tool {call['name']!r}. Tools: {', '.join(dispatch) or 'none'}."
    return await call_mcp(connections, dispatch, call["name"], arguments)
