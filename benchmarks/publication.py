"""Seconds from the trainer's tensors to engines that serve them: adapters by file, full weights by broadcast.

    python benchmarks/publication.py --json publication.json                  # Qwen3-4B's shape: engine on GPU 0, trainer on 1
    python benchmarks/publication.py --shape tiny --device cpu --repeats 2    # does the script work? (embedded engine, gloo)
    python benchmarks/publication.py --kinds lora --interval 2                # a version two seconds after the last, as in a run

Random weights. Engine and trainer are processes with the commands and environments of a run's plan; the trainer is its learner
and its own publication, the orchestrator's side its own client and `Policy.swap`. With `--in-flight` above 0 so many requests are
being sampled all the while. Medians over `--repeats` versions, after version 0 and `--warm-up` more. Without `--interval` they
come back to back, and replies that outlast several of them keep the adapters with which they began: engines have few slots.

An adapter's time begins with float32 parameters in the trainer's memory and ends when its digest is proven and new requests are
served by it: `write` (type, digest, copy, file), `notice` (until the orchestrator sees it), `slot` (until one for an adapter is
free), `load`, `digest`; the little that is left is the acknowledgement. The time of full weights is that in which engines sample
nothing: `pause`, `transfer` (with loading), `digest`, `resume`; before it comes `announce`, the trainer's digest, not counted.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _processes import healthy, started
from _shapes import SHAPES, write_model_folder
from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.launch.plan import compose
from turnwise.launch.resolve import with_defaults, write_resolved
from turnwise.orchestrator.versions import await_version
from turnwise.orchestrator.weights import Policy
from turnwise.transport import RunDir, WeightsStore

SIDE = Path(__file__).with_name("_publication_side.py")
GOALS = {"lora": 0.3, "full": 1.5}  # seconds, for Qwen3-4B's shape on two H200
PARTS = {"lora": ("write", "notice", "slot", "load", "digest"), "full": ("announce", "pause", "transfer", "digest", "resume")}
PROMPT, TOKENS = 128, 256  # of the requests in flight

Times = dict[str, float]


def main() -> int:
    arguments = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        model = model_folder(Path(name) / arguments.shape, arguments)
        for kind in arguments.kinds:
            config = configuration(arguments, model, Path(name) / kind, kind)
            try:
                asyncio.run(asyncio.wait_for(measure(arguments, config, kind, rows), arguments.time_limit))
            except TimeoutError:
                print(f"{kind}: {arguments.time_limit:g} s were over; what was measured stays", file=sys.stderr)
            print(table(rows), flush=True)
            if arguments.json:
                settings = {key: str(value) for key, value in vars(arguments).items()}
                arguments.json.write_text(json.dumps({"settings": settings, "goals": GOALS, "rows": rows}, indent=1))
    measured = {(row["kind"], row["in_flight"]) for row in rows}
    return 0 if len(measured) == len(arguments.kinds) * len(set(arguments.in_flight)) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kinds", choices=sorted(GOALS), nargs="+", default=["lora", "full"])
    parser.add_argument("--rank", type=int, default=32, help="of the adapter, on all linear layers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[0, 64], help="requests that are being sampled meanwhile")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between a version that is served and the next")
    parser.add_argument("--engine-gpu", type=int, default=0)
    parser.add_argument("--trainer-gpu", type=int, default=1, help="may be the engine's, for adapters")
    parser.add_argument("--scratch", type=Path, help="where weights are written; the folder for temporary files if unset")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="KEY=JSON", help="further flags of vLLM")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for each kind")
    parser.add_argument("--json", type=Path, help="write the results there too")
    return parser.parse_args()


def model_folder(folder: Path, arguments: argparse.Namespace) -> Path:
    """The shape alone for vLLM, which draws its weights; with random weights for the embedded engine."""
    write_model_folder(folder, arguments.shape)
    if arguments.device == "cpu":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def configuration(arguments: argparse.Namespace, model: Path, output: Path, kind: str) -> RLConfig:
    """A run with this model."""
    on_gpu = arguments.device == "cuda"
    flags = {key: json.loads(value) for key, _, value in (flag.partition("=") for flag in arguments.vllm)}
    gpus: dict[str, Any] = {"inference": [arguments.engine_gpu], "trainer": [arguments.trainer_gpu]}
    if arguments.engine_gpu == arguments.trainer_gpu:
        gpus |= {"share": True, "inference_memory": 0.5}
    lora = {"rank": arguments.rank, "alpha": 2.0 * arguments.rank} if kind == "lora" else None
    tables: dict[str, Any] = {
        "output_dir": str(output),
        "seq_len": PROMPT + TOKENS,
        "model": {"name": str(model), "dtype": "bfloat16", "load_format": "dummy" if on_gpu else "auto"},
        "gpus": gpus if on_gpu else {},
        "inference": {"engine": "vllm" if on_gpu else "embedded", "vllm": flags},
        "orchestrator": {"env": [{"id": "wordle"}], "max_inflight": max(1, *arguments.in_flight)},
        "trainer": {"model": {"lora": lora}, "weight_transfer": "files" if lora else "broadcast"},
        "max_steps": 1,
    }
    return with_defaults(RLConfig.model_validate(tables), max_steps=1, model=str(model))


# --- the two ends -----------------------------------------------------------------------------------------------------


class TrainerSide:
    """The trainer's process: a line in, a version announced, a line out."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    async def answer(self) -> dict[str, Any]:
        """The next line. Raises RuntimeError when the process has ended."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise RuntimeError(f"the trainer ended with {await asyncio.to_thread(self.process.wait)}")
        return json.loads(line)

    def publish(self, version: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{version}\n".encode())
        self.process.stdin.flush()


class TimedClient(InferenceClient):
    """The client, with the clock at which each part of a swap began and the seconds that it took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began: Times = {}
        self.seconds: Times = {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = self.began[part] = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - began

    async def pause(self) -> None:
        with self._timed("pause"):
            await super().pause()

    async def resume(self) -> None:
        with self._timed("resume"):
            await super().resume()

    async def digest(self, version: int | None) -> list[str]:
        with self._timed("digest"):
            return await super().digest(version)

    async def load_adapter(self, version: int, path: str) -> None:
        with self._timed("load"):
            await super().load_adapter(version, path)

    async def receive_weights(self, rendezvous: str, folder: str, *, workers: int) -> None:
        with self._timed("transfer"):
            await super().receive_weights(rendezvous, folder, workers=workers)


# --- the measurement --------------------------------------------------------------------------------------------------


async def measure(arguments: argparse.Namespace, config: RLConfig, kind: str, rows: list[dict[str, Any]]) -> None:
    """Append a row for each number of requests in flight."""
    plan = compose(config, run_id="publication")
    write_resolved(config, plan.run_dir.config)
    (serving,), (training,) = plan.of_role("inference"), plan.of_role("trainer")
    argv = (sys.executable, str(SIDE), str(plan.run_dir.config))
    url = str(serving.health_url).removesuffix("/health")
    with (
        started(serving, serving.argv) as server,
        started(training, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        trainer = TrainerSide(process)
        about = await trainer.answer()
        async with TimedClient([url], model=config.model.name, request_timeout_s=600, max_retries=0) as client:
            await healthy(client, server, config.inference.startup_timeout_s)
            policy = Policy(client, WeightsStore(RunDir(config.output_dir).weights), stop_ids=[], max_loaded=config.adapter_slots)
            versions = Versions(policy, client, trainer, interval_s=arguments.interval)
            await versions.next(kind)  # the first request of each kind starts things that stay
            for load in arguments.in_flight:
                rows.append(await one_row(arguments, versions, kind, load) | {"shape": arguments.shape, "rank": arguments.rank})
                rows[-1] |= {key: about[key] for key in ("parameters", "device")}
            await policy.close()


async def one_row(arguments: argparse.Namespace, versions: "Versions", kind: str, load: int) -> dict[str, Any]:
    tokens: dict[int, int] = {}
    async with requests_in_flight(versions.policy, SHAPES[arguments.shape]["vocab_size"], load, tokens):
        for _ in range(arguments.warm_up):
            await versions.next(kind)
        times = [await versions.next(kind) for _ in range(arguments.repeats)]
    median = {part: statistics.median(time_[part] for time_ in times) for part in ("total", *PARTS[kind])}
    return {"kind": kind, "in_flight": load, "median": median, "repeats": times, "tokens_meanwhile": sum(tokens.values())}


class Versions:
    """Publishes one version after the other, and serves it; each `interval_s` seconds after the last was served."""

    def __init__(self, policy: Policy, client: TimedClient, trainer: TrainerSide, *, interval_s: float = 0.0) -> None:
        self.policy, self.client, self.trainer, self.interval_s = policy, client, trainer, interval_s
        self.number = -1

    async def next(self, kind: str) -> Times:
        """Seconds of each part of the publication of the next version."""
        await asyncio.sleep(self.interval_s)
        self.number += 1
        self.trainer.publish(self.number)
        told = asyncio.create_task(self.trainer.answer())
        ready = await await_version(
            self.policy.store,
            self.number,
            due=lambda: True,
            over=lambda: told.done() and told.exception() is not None,
            timeout_s=120.0,
        )
        noticed = time.monotonic()
        if ready is None:
            await told
        assert ready is not None
        await self.policy.swap(ready)
        served = time.monotonic()
        trainer = await told
        seconds = {**self.client.seconds, "notice": noticed - trainer["announced"]}
        seconds |= {"write": trainer["announced"] - trainer["began"], "announce": trainer["announced"] - trainer["began"]}
        if kind == "lora":
            seconds["slot"] = self.client.began["load"] - noticed
        total = served - trainer["began"] if kind == "lora" else served - noticed
        return {"total": total} | {part: seconds[part] for part in PARTS[kind]}


@asynccontextmanager
async def requests_in_flight(policy: Policy, vocabulary: int, number: int, count: dict[int, int]) -> AsyncGenerator[None]:
    """So many requests that are sampled all the while, and cut at the end, when at least one has had its reply.

    `count` gets the tokens of replies by version. Their lengths are spread, so that replies end at all times.

    Raises:
        ExceptionGroup: of a RuntimeError where a reply goes back to an older version, or names one that is not served yet.
    """

    replied = asyncio.Event()

    async def one(seed: int) -> None:
        generate = policy.generator(temperature=1.0, affinity=str(seed))
        prompt = [3 + (seed * 7919 + place * 104_729) % (vocabulary - 3) for place in range(PROMPT)]
        while True:
            reply = await generate(prompt, max(1, TOKENS * (seed + 1) // number), seed)
            versions = [version for version, _ in reply.spans]
            if versions != sorted(versions) or versions[-1] > policy.version:
                raise RuntimeError(f"a reply of versions {versions} while v{policy.version} is served")
            for version, tokens in reply.spans:
                count[version] = count.get(version, 0) + tokens
            replied.set()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(seed)) for seed in range(number)]
        yield
        if tasks:
            await replied.wait()
        for task in tasks:
            task.cancel()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | in flight | seconds (min-max) | goal | parts |", "|---|---:|---:|---:|---|"]
    for row in rows:
        kind, median = row["kind"], row["median"]
        totals = [times["total"] for times in row["repeats"]]
        parts = ", ".join(f"{part} {median[part]:.3f}" for part in PARTS[kind])
        size = f"rank-{row['rank']} adapter" if kind == "lora" else "full weights"
        what = f"{size} of {row['shape']}, {row['parameters'] / 1e6:,.1f}M parameters"
        seconds = f"{median['total']:.3f} ({min(totals):.3f}-{max(totals):.3f})"
        lines.append(f"| {what} | {row['in_flight']} | {seconds} | {GOALS[kind]} | {parts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
