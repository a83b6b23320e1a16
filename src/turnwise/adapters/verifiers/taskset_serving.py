"""An environment of verifiers 0.4 with its servers, its model calls answered by our policy."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.clients import Client, TrainClientConfig
from verifiers.v1.clients.train import serialize_completion
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.errors import ProviderError
from verifiers.v1.interception import InterceptionServer
from verifiers.v1.utils.loaders import load_environment

from turnwise.adapters.verifiers.exchange import CutOff, Exchange, plain_reply
from turnwise.envs.messages import Tool

CUT = "cut_off"  # stop condition of a rollout that was ended from outside


class PolicyConfig(TrainClientConfig):
    """Marks the rollouts whose model is our policy. It is no endpoint; one that trains, so that nothing is streamed."""

    base_url: str = "http://policy.invalid"
    api_key_var: str = "TURNWISE_NO_KEY"


class PolicyClient(Client):
    """A client of verifiers whose model is our policy."""

    def __init__(self) -> None:
        self.rollouts: dict[str, tuple[Exchange, Any]] = {}  # by the id of their trace

    async def get_response(
        self,
        dialect: Any,
        body: Mapping[str, Any],
        sampling: Any,
        session_id: str | None = None,
        turn: Any = None,
        headers: Any = None,
    ) -> Any:
        exchange, trace = self.rollouts[session_id or ""]
        try:
            if not isinstance(dialect, ChatDialect):
                raise ValueError(
                    f"{exchange.name}: its harness speaks {type(dialect).__name__}; only chat completions can be trained on"
                )
            said = plain_reply(await exchange.reply(*_plain_request(turn), conversation=trace.id))
        except CutOff as error:
            trace.stop(CUT)
            raise ProviderError(str(error), status_code=400) from error
        except (ValueError, RuntimeError) as error:
            exchange.failure = exchange.failure or error
            raise ProviderError(str(error), status_code=400) from error
        calls = [vf.ToolCall(**call) for call in said["tool_calls"]]
        message = vf.AssistantMessage(content=said["content"], tool_calls=calls or None)
        finish = "tool_calls" if calls else "stop"
        response = vf.Response(id="", created=0, model=body["model"], message=message, finish_reason=finish)
        response.raw = serialize_completion(response, body["model"])
        return response


class PolicyInterception(InterceptionServer):
    """The server through which harnesses reach a model: the policy for rollouts that are ours, endpoints for others."""

    def __init__(self, client: PolicyClient) -> None:
        super().__init__()
        self.policy = client

    def register(self, session: Any) -> tuple[str, str]:
        secrets = super().register(session)
        if isinstance(session.ctx.client, PolicyConfig):
            session.client = self.policy
        return secrets


class Serving:
    """One environment of verifiers with its servers, on one event loop. It lives as long as the loop."""

    def __init__(self, config: Any) -> None:
        self.env = load_environment(config)
        self.client = PolicyClient()
        self.stack = AsyncExitStack()
        self._starting = asyncio.Lock()
        self._started = False

    async def episode(self, task: Any, exchange: Exchange) -> Any:
        """Run one task's episode against the policy."""
        async with self._starting:
            if not self._started:
                await self._start()
        ours: list[str] = []

        def minted(trace: Any) -> None:
            ours.append(trace.id)
            self.client.rollouts[trace.id] = (exchange, trace)

        context = vf.ModelContext(model="policy", client=PolicyConfig())
        try:
            return await self.env.run_episode(task, context, on_trace=minted)
        finally:
            for trace_id in ours:
                del self.client.rollouts[trace_id]

    async def _start(self) -> None:
        await self.stack.enter_async_context(self.env.serving())
        if not hasattr(self.env, "_interception"):
            raise RuntimeError("this release of verifiers 0.4 keeps its interception elsewhere; the adapter knows 0.4.0")
        self.env._interception = await self.stack.enter_async_context(PolicyInterception(self.client))
        self._started = True


def _plain_request(turn: Any) -> tuple[list[dict[str, Any]], list[Tool]]:
    """Messages and tools of a request.

    Raises:
        ValueError: for content that is not text.
    """
    messages: list[dict[str, Any]] = []
    for message in turn.prompt:
        content = message.content
        if isinstance(content, list) and any(part.type != "text" for part in content):
            raise ValueError("a message holds an image; only text can be trained on here")
        text = "\n".join(part.text for part in content) if isinstance(content, list) else content
        plain: dict[str, Any] = {"role": message.role, "content": text or ""}
        if message.role == "tool":
            plain["tool_call_id"] = message.tool_call_id
        elif message.role == "assistant":
            calls = message.tool_calls or ()
            plain["tool_calls"] = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in calls]
        messages.append(plain)
    tools = [Tool(name=tool.name, description=tool.description, parameters=dict(tool.parameters)) for tool in turn.tools or ()]
    return messages, tools
