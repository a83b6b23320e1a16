"""Client CPU per turn of environments behind adapters, beside our own, against instant fake engines in another process.

Every measurement plays the same number of rollouts, `--concurrency` at a time, and divides the CPU time of this process (all
threads) by the turns played; what other processes spend (the engine, an environment's server) is not in it. The engine always
says the same word, so that a game of Wordle has six turns.

    python benchmarks/adapters_overhead.py rollouts wordle --json native.json              any environment in our rollout loop
    python benchmarks/adapters_overhead.py rollouts verifiers:turnwise-verifiers --args '{"env": "wordle"}' --json there.json
    python benchmarks/adapters_overhead.py for-verifiers wordle --json from.json           one of ours in the loop of verifiers
    python benchmarks/adapters_overhead.py table native.json there.json from.json

Subcommands that need a package run with the interpreter that has it. Further ones: a function in `SUBCOMMANDS`.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_overhead import OBSERVATION, Cost, Instant, resolve
from turnwise.config import EnvConfig
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.__main__ import allow_connections
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.rollout import Player, RolloutSpec, derive_seed
from turnwise.orchestrator.weights import Policy
from turnwise.transport import WeightsStore

WORD, TURNS = "crane", 6
Play = Callable[[int], Awaitable[int]]  # a rollout by its number -> the turns that it had


def completion(ids: Sequence[int]) -> dict[str, Any]:
    """What our client is answered: token ids and their log probabilities."""
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": list(ids)}
    choice["logprobs"] = {"token_logprobs": [-0.5] * len(ids)}
    return {"id": "cmpl-0", "choices": [choice], "usage": {}}


def chat_completion() -> dict[str, Any]:
    """What an OpenAI client is answered."""
    choice = {"index": 0, "message": {"role": "assistant", "content": WORD}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 200, "completion_tokens": 4, "total_tokens": 204}
    return {"id": "chat-0", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


async def serve(body: bytes) -> None:
    """Answer every request with `body`, and print the port."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    server = await asyncio.get_running_loop().create_server(lambda: Instant(reply), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def engine(body: dict[str, Any]) -> Generator[str]:
    """The URL of a fake engine in another process."""
    command = [sys.executable, __file__, "serve", msgspec.json.encode(body).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


async def measured(play: Play, concurrency: int, rounds: int) -> dict[str, Any]:
    """Play `concurrency` rollouts that are not counted, then `rounds` times as many that are."""
    share = asyncio.Semaphore(concurrency)

    async def one(number: int) -> int:
        async with share:
            return await play(number)

    await asyncio.gather(*(one(number) for number in range(concurrency)))
    with Cost() as cost:
        turns = sum(await asyncio.gather(*(one(number) for number in range(concurrency, concurrency * (1 + rounds)))))
    return {"concurrency": concurrency, "turns": turns, **cost.per_turn(turns)}


async def in_our_loop(url: str, arguments: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Rollouts of ours, as `orchestrator_overhead.py` plays them without scheduler and batch."""
    chat = load_chat(model)
    (setup,) = load_setups([EnvConfig(id=arguments.env, args=arguments.args)], "train")
    threads = EnvThreads()
    client = InferenceClient([url], model="base", request_timeout_s=60, max_retries=0)
    async with client:
        policy = Policy(client, WeightsStore(Path("unused")), stop_ids=chat.stop_ids)
        policy.version = 0
        player = Player(chat, threads, seq_len=8192, max_tokens=256)

        async def play(number: int) -> int:
            task = setup.tasks[number % len(setup.tasks)]
            spec = RolloutSpec(f"g{number}-0", number, setup, task, derive_seed(0, number) % 2**31, derive_seed(1, number))
            rollout = await player.play(spec, policy.generator(temperature=1.0, affinity=spec.rollout_id))
            assert rollout.ok, rollout.error
            return len(rollout.turns)

        results = [await measured(play, number, arguments.rounds) for number in arguments.concurrency]
    threads.close()
    return results


def rollouts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Any environment of `turnwise.envs.make` in our rollout loop."""
    model = resolve(arguments.model)
    chat = load_chat(model)
    from transformers import AutoTokenizer

    ids = [*AutoTokenizer.from_pretrained(model).encode(WORD, add_special_tokens=False), chat.stop_ids[0]]
    with engine(completion(ids)) as url:
        results = asyncio.run(in_our_loop(url, arguments, model))
    return {"subject": f"{arguments.env} in our loop", "results": results}


async def in_classic_loop(url: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from verifiers.clients import resolve_client
    from verifiers.types import ClientConfig

    from turnwise.adapters.for_verifiers import load_environment

    env = load_environment(arguments.env, **arguments.args)
    if arguments.bare:
        import verifiers as vf
        from datasets import Dataset

        class Bare(vf.MultiTurnEnv):
            async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
                return [vf.UserMessage(content=OBSERVATION)]

        prompts = [[{"role": "user", "content": OBSERVATION}]] * 8
        nothing = vf.Rubric(funcs=[lambda: 0.0])
        env = Bare(dataset=Dataset.from_dict({"prompt": prompts}), max_turns=TURNS, rubric=nothing)
    rows = [dict(row) for row in env.get_dataset(n=1024)]
    client = resolve_client(ClientConfig(api_base_url=f"{url}/v1", api_key_var="NO_KEY", max_retries=0))

    async def play(number: int) -> int:
        state = await env._run_rollout_state(rows[number % len(rows)], client, "m", {"temperature": 1.0})
        assert state["error"] is None, state["error"]
        return len(state["trajectory"])

    return [await measured(play, number, arguments.rounds) for number in arguments.concurrency]


async def in_taskset_loop(url: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import itertools

    import verifiers.v1 as vf

    from turnwise.adapters.for_verifiers import load_environment

    env = load_environment(arguments.env, **arguments.args)
    if arguments.bare:
        from turnwise.adapters.for_verifiers.v1 import TurnwiseEnv

        class Bare(TurnwiseEnv):
            async def run(self, task: Any, agents: Any) -> None:
                async with agents.agent.interaction(task) as interaction:
                    for _ in range(TURNS):
                        await interaction.turn(OBSERVATION)
                    interaction.trace.state.played = True

        env = Bare(env.config)
    tasks = list(itertools.islice(env.taskset, 1024))
    context = vf.ModelContext(model="m", client=vf.EvalClientConfig(base_url=f"{url}/v1", api_key_var="NO_KEY"))

    async def play(number: int) -> int:
        episode = await env.run_episode(tasks[number % len(tasks)], context)
        assert episode.ok, episode.errors
        return episode.traces[0].num_turns

    async with env.serving():
        return [await measured(play, number, arguments.rounds) for number in arguments.concurrency]


def for_verifiers(arguments: argparse.Namespace) -> dict[str, Any]:
    """One of our environments in the loop of verifiers, whichever of its APIs is installed."""
    from turnwise.adapters.for_verifiers import api

    with engine(chat_completion()) as url:
        results = asyncio.run((in_classic_loop if api() == "legacy" else in_taskset_loop)(url, arguments))
    subject = "six turns of nothing" if arguments.bare else arguments.env
    return {"subject": f"{subject} in the loop of verifiers", "results": results}


def table(documents: Sequence[dict[str, Any]]) -> str:
    lines = ["| environment | verifiers | rollouts at a time | CPU ms/turn | turns/s |", "|---|---|---|---|---|"]
    for document in documents:
        for row in document["results"]:
            lines.append(
                f"| {document['subject']} | {document['verifiers'] or ''} | {row['concurrency']:,} "
                f"| {row['cpu_ms_per_turn']:.2f} | {row['turns_per_s']:,.0f} |"
            )
    return "\n".join(lines)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


SUBCOMMANDS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"rollouts": rollouts, "for-verifiers": for_verifiers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("env", help="id of the environment")
        command.add_argument("--args", type=json.loads, default={}, help="its arguments, as JSON")
        command.add_argument("--model", default="smollm2-135m", help="whose tokenizer and chat template are used")
        command.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
        command.add_argument("--rounds", type=int, default=4, help="rollouts per concurrent place")
        command.add_argument(
            "--bare", action="store_true", help="for-verifiers: their loop with an environment that does nothing"
        )
        command.add_argument("--json", type=Path, help="write the numbers there too")
    commands.add_parser("table", help="one table of several results").add_argument("files", type=Path, nargs="+")
    commands.add_parser("serve").add_argument("body")
    arguments = parser.parse_args()
    if arguments.command == "serve":
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(arguments.body.encode()))
        return 0
    if arguments.command == "table":
        print(table([json.loads(file.read_text()) for file in arguments.files]))
        return 0
    allow_connections()
    uses = arguments.command == "for-verifiers" or arguments.env.startswith("verifiers:")
    document = {**SUBCOMMANDS[arguments.command](arguments), "verifiers": installed("verifiers") if uses else None}
    print(table([document]))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
