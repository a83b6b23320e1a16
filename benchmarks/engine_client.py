"""Tokens a second of vLLM's server through our client, beside those of vLLM's own offline engine, one after the other.

    python benchmarks/engine_client.py --json engine_client.json                      # Qwen3-4B's shape on one GPU
    python benchmarks/engine_client.py --shape tiny --device cpu --concurrency 8      # does the script work?

Random weights (bfloat16: `--load-format dummy`; MXFP4: a folder that is written first), random prompts without a common
beginning, temperature 1, the logprob of each sampled token on both sides, and the same sampling parameters. The server is started
by the launcher that runs use; the offline engine gets the engine's part of the same flags. Both take `--waves` waves of
`--concurrency` requests: a wave is handed over at once and the next one begins when all of it are done (`LLM.generate`, again and
again), or with `--admission stream` a request begins whenever one ends. A wave before is not counted. `server ms` is CPU time of
the API server's process for each request. Table and JSON are complete after each pair of weights and LoRA: what fails later
takes nothing along.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _client_report import compare, table, verdict, write
from _packed_weights import write_packed_folder
from _shapes import SHAPES, write_adapter_folder, write_model_folder
from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.inference.launcher import EngineCommand, engine_commands
from turnwise.launch.ports import free_range

SIDE = Path(__file__).with_name("_offline_side.py")
ROUTE = "--middleware"  # with ours, the server turns no token into text; the offline engine then does not either
START_S = 300.0


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    model: Path
    vocabulary: int
    prompt: int
    tokens: int
    concurrency: list[int]
    waves: int
    admission: str
    seeds: bool
    adapter: str | None

    def prompts(self, number: int, first_seed: int) -> Iterator[tuple[list[int], int | None]]:
        """As the offline side makes them: random ids, and a seed each where seeds are wanted."""
        words = random.Random(first_seed)
        for index in range(number):
            ids = [words.randrange(3, self.vocabulary) for _ in range(self.prompt)]
            yield ids, first_seed + index if self.seeds else None


def main() -> int:
    arguments = parse()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = write_model_folder(scratch / arguments.shape, arguments.shape)
        packed = write_packed_folder(scratch / "mxfp4", arguments.shape) if "mxfp4" in arguments.weights else None
        adapters = {"both": (False, True), "on": (True,), "off": (False,)}[arguments.lora]
        for weights, lora in itertools.product(arguments.weights, adapters):
            config = configuration(arguments, model, packed if weights == "mxfp4" else None, lora=lora)
            command = engine_commands(config, scratch / "config.toml", gpus=config.gpus.inference)[0]
            folder = write_adapter_folder(scratch / "adapter", arguments.shape, arguments.rank) if lora else None
            work = the_work(arguments, model, folder)
            served = serve(command, work, scratch / f"server_{weights}_{lora}.log", arguments.time_limit)
            about = offline(command, work, scratch, arguments.time_limit)
            pairs = zip(served, about.pop("rows"), strict=True)
            results += [compare(through, alone, weights=weights, lora=lora) for through, alone in pairs]
            print(table(results), flush=True)
            if arguments.json:
                write(arguments.json, results, vars(arguments), about)
    print(f"\n{verdict(results)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--waves", type=int, default=3, help="the measurement's, after one that is not counted")
    parser.add_argument("--admission", choices=["waves", "stream"], default="waves")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each reply")
    parser.add_argument("--lora", choices=["off", "on", "both"], default="both")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, on all linear layers")
    parser.add_argument("--weights", choices=["bfloat16", "mxfp4"], nargs="+", default=["bfloat16"], help="one after the other")
    parser.add_argument("--seeds", action="store_true", help="give each request a seed of its own")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="KEY=JSON", help="further flags of vLLM, on both sides")
    parser.add_argument("--time-limit", type=float, default=400.0, help="seconds for each side")
    parser.add_argument("--json", type=Path, help="write the results there too")
    return parser.parse_args()


def the_work(arguments: argparse.Namespace, model: Path, adapter: Path | None) -> Work:
    return Work(
        model=model,
        vocabulary=SHAPES[arguments.shape]["vocab_size"],
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        concurrency=arguments.concurrency,
        waves=arguments.waves,
        admission=arguments.admission,
        seeds=arguments.seeds,
        adapter=None if adapter is None else str(adapter),
    )


def configuration(arguments: argparse.Namespace, model: Path, packed: Path | None, *, lora: bool) -> RLConfig:
    """What a run with this model would be started with: the weights of `packed`, or random ones for None."""
    flags = {key: json.loads(value) for key, _, value in (flag.partition("=") for flag in arguments.vllm)}
    most = max(arguments.concurrency)
    tables: dict[str, Any] = {
        "max_steps": 1,
        "seq_len": arguments.prompt + arguments.tokens,
        "model": {"name": str(model), "load_format": "auto" if packed else "dummy", "quantized": packed},
        "gpus": {"inference": [0] if arguments.device == "cuda" else []},
        # one thread on a CPU: with more, other work on the same cores stops the engine at each of its barriers
        "inference": {"engine": "vllm", "port": free_range("127.0.0.1", 1), "vllm": flags, "embedded": {"threads": 1}},
        "orchestrator": {"env": [{"id": "wordle"}], "max_inflight": most, "max_staleness": 1},
        "trainer": {"model": {"lora": {"rank": arguments.rank, "alpha": 2.0 * arguments.rank} if lora else None}},
    }
    return RLConfig.model_validate(tables)


# --- through the server -----------------------------------------------------------------------------------------------


def serve(command: EngineCommand, work: Work, log: Path, limit_s: float) -> list[dict[str, Any]]:
    """Start the server, measure, and end it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv, env={**os.environ, **command.env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return asyncio.run(asyncio.wait_for(through_client(command.url, work, process), limit_s))
    except BaseException:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
        raise
    finally:
        end(process)


async def through_client(url: str, work: Work, process: "subprocess.Popen[bytes]") -> list[dict[str, Any]]:
    async with InferenceClient([url], model=str(work.model), request_timeout_s=600, max_retries=0) as client:
        waiting = asyncio.create_task(client.wait_healthy(START_S))
        while not waiting.done():
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            await asyncio.wait([waiting], timeout=1.0)
        await waiting
        if work.adapter is not None:
            await client.load_adapter(0, work.adapter)
        return [await measure(client, work, concurrency, process.pid) for concurrency in work.concurrency]


async def measure(client: InferenceClient, work: Work, concurrency: int, pid: int) -> dict[str, Any]:
    run = stream if work.admission == "stream" else waves
    await run(client, work, concurrency, 1, first_seed=1)
    begun, cpu = time.perf_counter(), cpu_seconds(pid)
    await run(client, work, concurrency, work.waves, first_seed=10**6)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds(pid) - cpu
    requests = concurrency * work.waves
    return {
        "concurrency": concurrency,
        "requests": requests,
        "seconds": seconds,
        "tokens_per_s": requests * work.tokens / seconds,
        "server_cpu_ms_per_request": 1e3 * cpu / requests,
        "server_cpu_share": cpu / seconds,
    }


async def waves(client: InferenceClient, work: Work, concurrency: int, number: int, *, first_seed: int) -> None:
    requests = work.prompts(concurrency * number, first_seed)
    for _ in range(number):
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one(client, work, *next(requests)))


async def stream(client: InferenceClient, work: Work, concurrency: int, number: int, *, first_seed: int) -> None:
    requests = work.prompts(concurrency * number, first_seed)

    async def worker() -> None:
        for ids, seed in requests:
            await one(client, work, ids, seed)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def one(client: InferenceClient, work: Work, ids: list[int], seed: int | None) -> None:
    version = None if work.adapter is None else 0
    reply = await client.generate(ids, version=version, max_tokens=work.tokens, temperature=1.0, seed=seed, stop_token_ids=())
    if len(reply.token_ids) != work.tokens:
        raise RuntimeError(f"a reply of {len(reply.token_ids)} tokens")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the server to end, and end what is left of its process group."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- offline ----------------------------------------------------------------------------------------------------------


def offline(command: EngineCommand, work: Work, scratch: Path, limit_s: float) -> dict[str, Any]:
    """The same work by `LLM`, in a process of its own."""
    output = scratch / "offline.json"
    flags = list(command.argv[command.argv.index("vllm.entrypoints.openai.api_server") + 1 :])
    settings = {**vars(work), "model": str(work.model), "flags": flags, "detokenize": ROUTE not in flags, "output": str(output)}
    argv = [command.argv[0], str(SIDE), json.dumps(settings)]
    log = scratch / "offline.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, env={**os.environ, **command.env}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        if process.wait(limit_s):
            raise RuntimeError(f"the offline engine ended with {process.returncode}")
    except BaseException:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
        raise
    finally:
        end(process)
    return json.loads(output.read_text())


if __name__ == "__main__":
    sys.exit(main())
