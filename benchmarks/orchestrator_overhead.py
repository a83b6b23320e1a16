"""Client CPU per turn of the orchestrator, against an instant fake engine in another process.

Plays rollouts of five turns, `--concurrency` at a time, through everything that a training rollout passes: scheduler,
environment threads, chat template, HTTP client, advantages, samples, the encoded batch. Beside it, in the same run, a bare
aiohttp loop posts the same requests. What is reported is CPU time of this process (all threads) divided by turns.

    python benchmarks/orchestrator_overhead.py --json overhead.json
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from turnwise.config import BufferConfig, EnvConfig, OrchestratorConfig, RLConfig
from turnwise.envs import register
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.__main__ import allow_connections
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.buffer import TaskBuffer
from turnwise.orchestrator.chat import Chat, load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.metrics import batch_metrics
from turnwise.orchestrator.rollout import Player
from turnwise.orchestrator.scheduler import Scheduler
from turnwise.orchestrator.weights import Policy
from turnwise.transport import Progress, WeightsStore

TURNS, REPLY_TOKENS, GROUP = 5, 16, 8
GOAL_MS = 1.0
OBSERVATION = "That is not it. Two letters are in the word, one of them in its place: A-B--. Guess again, with one word."


class FiveTurns(TextEnv):
    """Always answers the same, five times; pays by the length of the seedless task's number."""

    max_turns = TURNS
    system_prompt = "You play a word game. Answer each message with one word and nothing else."

    def tasks(self, split: str) -> list[Task]:
        return [{"id": f"{split}-{i}"} for i in range(64)]

    def begin(self, task: Task) -> str:
        return f"Task {task['id']}: find the hidden word of five letters in five guesses. " * 4

    def step(self, action: str) -> Step:
        self.turn += 1
        paid = {"progress": float(self.np_random.random())}
        if self.turn == TURNS:
            return self.end("The game is over.", components=paid)
        return self.answer(OBSERVATION, components=paid)


class Instant(asyncio.Protocol):
    """The fake engine: answers each request on a connection with the same reply, without looking at it."""

    def __init__(self, reply: bytes) -> None:
        self.reply, self.buffer = reply, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.transport.write(self.reply)


async def serve(stop_id: int) -> None:
    """Run the fake engine and print its port."""
    ids = [*range(100, 100 + REPLY_TOKENS - 1), stop_id]
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": ids}
    choice["logprobs"] = {"token_logprobs": [-0.5] * REPLY_TOKENS}
    body = msgspec.json.encode({"id": "cmpl-0", "choices": [choice], "usage": {}})
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    server = await asyncio.get_running_loop().create_server(lambda: Instant(reply), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Cost:
    """CPU and wall time inside the block."""

    def __enter__(self) -> "Cost":
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu_s, self.wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall

    def per_turn(self, turns: int) -> dict[str, float]:
        return {"cpu_ms_per_turn": round(1e3 * self.cpu_s / turns, 4), "turns_per_s": round(turns / self.wall_s, 1)}


def make_config(model: str, concurrency: int, rollouts: int) -> RLConfig:
    settings = OrchestratorConfig(
        batch_size=rollouts,
        rollouts_per_example=GROUP,
        max_inflight=concurrency,
        env=[EnvConfig(id="five_turns")],
        max_staleness=0,
    )
    return RLConfig.model_validate({"model": {"name": model}, "orchestrator": settings.model_dump(), "max_steps": 1})


async def orchestrator(url: str, chat: Chat, config: RLConfig) -> tuple[Cost, Cost]:
    """Play the batch, then judge, encode and measure it; the costs of both parts."""
    settings = config.orchestrator
    client = InferenceClient([url], model="base", request_timeout_s=60, max_retries=0)
    async with client, asyncio.TaskGroup() as group:
        policy = Policy(client, WeightsStore(Path("unused")), stop_ids=chat.stop_ids)
        policy.version = 0
        threads = EnvThreads()
        player = Player(chat, threads, config.seq_len, settings.sampling.max_tokens)
        buffer = TaskBuffer(load_setups(settings.env, "train"), BufferConfig(), 0)

        async def play(spec: Any) -> Any:
            return await player.play(spec, policy.generator(temperature=1.0, affinity=spec.rollout_id))

        scheduler = Scheduler(settings, buffer, play, group, seed=0, version=lambda: 0)
        groups = settings.batch_size // GROUP
        with Cost() as rollouts:
            scheduler.set_capacity(groups)
            finished = [await scheduler.finished.get() for _ in range(groups)]
        scheduler.close()
        with Cost() as batch:
            builder = BatchBuilder(config, 1)
            for one in finished:
                builder.add(one)
            samples = builder.samples()
            metrics = batch_metrics(builder, samples, seconds=1.0, served=0)
            msgspec.msgpack.encode(builder.build(samples, Progress(), metrics))
        assert all(rollout.ok and len(rollout.turns) == TURNS for one in finished for rollout in one.rollouts)
        threads.close()
    return rollouts, batch


async def bare(url: str, chat: Chat, concurrency: int, rollouts: int) -> Cost:
    """The same requests by aiohttp alone: no environment, no chat, one prompt for all."""
    prompt = chat.first_prompt([{"role": "user", "content": OBSERVATION * 5}])
    share = asyncio.Semaphore(concurrency)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> None:
            async with share:
                for _ in range(TURNS):
                    body = {"model": "v0", "prompt": prompt, "max_tokens": 256, "logprobs": 0, "return_token_ids": True}
                    async with session.post(f"{url}/v1/completions", data=msgspec.json.encode(body)) as response:
                        msgspec.json.decode(await response.read())

        with Cost() as cost:
            await asyncio.gather(*(one() for _ in range(rollouts)))
    return cost


async def measure(url: str, chat: Chat, model: str, concurrency: int, rounds: int) -> dict[str, Any]:
    """Both loops in turn at one concurrency; the first round of each warms up and is not counted."""
    rollouts = max(GROUP, concurrency * rounds // GROUP * GROUP)
    config = make_config(model, concurrency, rollouts)
    await orchestrator(url, chat, make_config(model, concurrency, max(GROUP, concurrency // GROUP * GROUP)))
    played, batch = await orchestrator(url, chat, config)
    await bare(url, chat, concurrency, concurrency)
    alone = await bare(url, chat, concurrency, rollouts)
    turns = rollouts * TURNS
    return {
        "concurrency": concurrency,
        "rollouts": rollouts,
        "turns": turns,
        "orchestrator": played.per_turn(turns),
        "batch_assembly": {"cpu_ms_per_turn": round(1e3 * batch.cpu_s / turns, 4)},
        "bare_aiohttp": alone.per_turn(turns),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| rollouts at a time | orchestrator ms/turn | of a batch ms/turn | bare aiohttp ms/turn | turns/s |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        own, batch, alone = row["orchestrator"], row["batch_assembly"], row["bare_aiohttp"]
        lines.append(
            f"| {row['concurrency']:,} | {own['cpu_ms_per_turn']:.3f} | {batch['cpu_ms_per_turn']:.3f} "
            f"| {alone['cpu_ms_per_turn']:.3f} | {own['turns_per_s']:,.0f} |"
        )
    return "\n".join(lines)


def resolve(model: str) -> str:
    from turnwise.launch.models import resolve_model

    return model if Path(model).is_dir() else resolve_model(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and chat template are used")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=4, help="rollouts per concurrent place")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--serve", type=int, metavar="STOP_ID", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    allow_connections()
    if arguments.serve is not None:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(arguments.serve))
        return 0
    register("five_turns", f"{__name__}:FiveTurns")
    model = resolve(arguments.model)
    chat = load_chat(model)
    command = [sys.executable, __file__, "--serve", str(chat.stop_ids[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        try:
            results = [asyncio.run(measure(url, chat, model, n, arguments.rounds)) for n in arguments.concurrency]
        finally:
            server.kill()
    print(table(results))
    worst = max(row["orchestrator"]["cpu_ms_per_turn"] + row["batch_assembly"]["cpu_ms_per_turn"] for row in results)
    print(f"\nworst: {worst:.3f} ms of CPU a turn, goal {GOAL_MS:g}: {'met' if worst <= GOAL_MS else 'missed'}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"goal_ms_per_turn": GOAL_MS, "worst_ms_per_turn": worst, "results": results}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
