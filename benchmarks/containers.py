"""What containers cost: to start, to hold, to run commands in, and to give back, 64 at a time.

    DOCKER_HOST=unix:///run/docker.sock python benchmarks/containers.py --json containers.json

Starts: one after the other with nothing ready (cold), from a pool that keeps some ready (warm), and all at once. Beside the
cold ones, in turn with them, the docker SDK alone creates and starts a container and runs one command.

Commands (`ls -l /`): in one container, while nobody else runs any; then in all of them, a thread each, with pauses as
between the turns of rollouts (exponential, `--think` seconds in the mean), and without. The peer is the SDK's exec in the very
same containers, the limit a shell of this machine that stays open. CPU time is this process's and, beside it, that of the
engine with its shims.

Episodes: a small environment (lease, three commands, submit) is played on the orchestrator's threads; before and after are
counted containers, sockets, files, threads, and memory. Needs an engine of this machine, on a unix socket.
"""

import argparse
import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from _containers_episode import EPISODE, Sums
from _containers_side import EngineProcesses, HostShell, RawContainer, census, container_mib, mine, raw_client, raw_exec
from turnwise.config.containers import ContainersConfig
from turnwise.containers import Pool, Pools, make_pool, open_pools
from turnwise.containers.recipes import recipes
from turnwise.orchestrator.env_threads import EnvThreads

COMMAND = "ls -l / >/dev/null"
WARM = 4  # containers kept ready in the measurement of warm starts
FIRST_EPISODES = 64  # before the first census: threads and connections that stay are made
THREADS_END_S = 20.0  # idle threads are told to end, and on busy cores that takes them a while
PARTS = ("cold", "warm", "held", "episodes")
Times = list[float]  # seconds
Run = Callable[[str], object]


def summary(times: Times) -> dict[str, float]:
    milliseconds = np.array(times) * 1e3
    return {
        "count": len(times),
        "p50_ms": float(np.median(milliseconds)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "max_ms": float(milliseconds.max()),
    }


def clocked(function: Callable[[], object], times: Times) -> None:
    before = time.perf_counter()
    function()
    times.append(time.perf_counter() - before)


def together(functions: Sequence[Callable[[], object]]) -> None:
    """Run each on a thread of its own, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def cold_starts(config: ContainersConfig, api: Any, count: int) -> dict[str, Any]:
    """Ours and the SDK's, in turn: until the first command is done, and until the container is gone."""
    image = f"turnwise/busybox:{recipes()['busybox'].hash}"
    started, removed, raw_started, raw_removed = Times(), Times(), Times(), Times()
    with make_pool(config.model_copy(update={"warm": 0}), run="benchmark") as pool:
        with pool.lease("busybox"):
            pass  # the image is there now
        for _ in range(count):
            before = time.perf_counter()
            lease = pool.lease("busybox")
            box = lease.__enter__()
            box.run(COMMAND)
            started.append(time.perf_counter() - before)
            clocked(lambda lease=lease: lease.__exit__(None, None, None), removed)
            before = time.perf_counter()
            raw = RawContainer(api, image)
            raw.run(COMMAND)
            raw_started.append(time.perf_counter() - before)
            clocked(raw.remove, raw_removed)
    names = ("start", "remove", "sdk_start", "sdk_remove")
    return {name: summary(times) for name, times in zip(names, (started, removed, raw_started, raw_removed), strict=True)}


def warm_starts(config: ContainersConfig, count: int) -> dict[str, float]:
    """From a pool whose ready containers are all there."""
    times = Times()
    with make_pool(config.model_copy(update={"warm": WARM}), run="benchmark") as pool:
        for number in range(count + 1):
            before = time.perf_counter()
            with pool.lease("busybox") as box:
                box.run(COMMAND)
                if number:  # the first one tells the pool what to keep
                    times.append(time.perf_counter() - before)
            while pool.state.ready < WARM:
                time.sleep(0.02)
    return summary(times)


def commands(runs: Sequence[Run], seconds: float, think_s: float, cpu_s: Callable[[], float]) -> dict[str, float]:
    """Each `run` is called on a thread of its own for a while; times of the calls, and CPU time of a call."""
    times: list[Times] = [Times() for _ in runs]
    deadline = time.monotonic() + seconds

    def rollout(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < deadline:
            if think_s:
                time.sleep(rng.expovariate(1 / think_s))
            clocked(lambda: runs[number](COMMAND), times[number])

    own, engine, wall = time.process_time(), cpu_s(), time.monotonic()
    together([lambda number=number: rollout(number) for number in range(len(runs))])
    own, engine, wall = time.process_time() - own, cpu_s() - engine, time.monotonic() - wall
    flat = [one for each in times for one in each]
    return {
        **summary(flat),
        "per_s": len(flat) / wall,
        "own_cpu_ms": 1e3 * own / len(flat),
        "engine_cpu_ms": 1e3 * engine / len(flat),
    }


def held(pool: Pool, api: Any, engine: EngineProcesses, options: argparse.Namespace) -> dict[str, Any]:
    """Start all at once, weigh them, and run commands in them."""
    leases, boxes, times, lock = ExitStack(), list[Any](), Times(), threading.Lock()
    seconds, result = options.seconds, dict[str, Any]()

    def lease() -> None:
        before = time.perf_counter()
        context = pool.lease("busybox")
        box = context.__enter__()
        took = time.perf_counter() - before
        with lock:
            leases.push(context.__exit__)
            boxes.append(box)
            times.append(took)

    with leases:
        together([lease] * options.containers)
        result["start_all"] = summary(times)
        ids = mine(api)
        result["memory_mib"] = {
            "container": float(np.mean([container_mib(api, one) for one in ids])),
            "shim": engine.shim_mib(ids),
            **engine.counts(),
        }

        def cpu_s() -> float:
            return engine.cpu_s(ids)

        ours: list[Run] = [box.run for box in boxes]
        theirs: list[Run] = [lambda command, one=one: raw_exec(api, one, command) for one in ids]
        shell = HostShell()
        result["alone"] = commands(ours[:1], seconds, 0.0, cpu_s)
        result["alone_sdk"] = commands(theirs[:1], seconds, 0.0, cpu_s)
        result["alone_host"] = commands([shell.run], seconds, 0.0, cpu_s)
        shell.close()
        result["thinking"] = commands(ours, 3 * seconds, options.think, cpu_s)
        result["thinking_sdk"] = commands(theirs, 3 * seconds, options.think, cpu_s)
        result["busy"] = commands(ours, seconds, 0.0, cpu_s)
        result["busy_sdk"] = commands(theirs, seconds, 0.0, cpu_s)
    return result


async def play(pools: Pools, threads: EnvThreads, episodes: int, rollouts: int) -> dict[str, Any]:
    """Play episodes as the orchestrator does; times of each whole one."""
    todo, times, turns = iter(range(episodes)), Times(), Times()

    async def worker() -> None:
        env = Sums()
        env.containers = pools
        for number in todo:
            before = time.perf_counter()
            await threads.call(lambda number=number: env.reset(seed=number), timeout_s=600)
            for command in EPISODE:
                await threads.call(lambda command=command: clocked(lambda: env.step(command), turns), timeout_s=60)
            _, reward, *_ = await threads.call(lambda: env.step("submit"), timeout_s=60)
            if reward != 1.0:
                raise RuntimeError(f"episode {number} was paid {reward}")
            await threads.call(env.close, timeout_s=60)
            times.append(time.perf_counter() - before)

    before = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(rollouts):
            group.create_task(worker())
    return {"episode": summary(times), "turn": summary(turns), "per_s": episodes / (time.perf_counter() - before)}


def episodes(config: ContainersConfig, api: Any, engine: EngineProcesses, count: int, rollouts: int) -> dict[str, Any]:
    """Many episodes, with what is held before, between, and after them."""
    quiet = config.model_copy(update={"warm": 0})  # else what the pool is just starting would be counted
    result: dict[str, Any] = {"before": census(api, engine)}

    async def all_of_them(pools: Pools) -> None:
        threads = EnvThreads()
        await play(pools, threads, FIRST_EPISODES, rollouts)
        result["after_first"] = census(api, engine)
        result.update(await play(pools, threads, count, rollouts))
        result["after_last"] = census(api, engine)
        threads.close()

    with open_pools(quiet, run="benchmark") as pools:
        asyncio.run(all_of_them(pools))
    deadline = time.monotonic() + THREADS_END_S
    while threading.active_count() > result["before"]["threads"] and time.monotonic() < deadline:
        time.sleep(0.05)
    result["after_close"] = census(api, engine)
    return result


def show(name: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"{name} {key}".ljust(24), {k: round(v, 2) for k, v in value.items()}, flush=True)
        else:
            print(f"{name} {key}".ljust(24), round(value, 2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--containers", type=int, default=64, help="held at once")
    parser.add_argument("--starts", type=int, default=100, help="single ones, cold and warm")
    parser.add_argument("--seconds", type=float, default=10.0, help="of commands; three times as long with pauses")
    parser.add_argument("--think", type=float, default=2.0, help="seconds between the commands of a rollout, in the mean")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    config = ContainersConfig.model_validate({"max_containers": options.containers})
    api, engine = raw_client(url), EngineProcesses(url)
    result: dict[str, Any] = {"load_before": os.getloadavg()[0], "cores": os.cpu_count(), "engine": api.version()["Version"]}

    def measure_held() -> dict[str, Any]:
        with make_pool(config.model_copy(update={"warm": 0}), run="benchmark") as pool:
            return held(pool, api, engine, options)

    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "cold": lambda: cold_starts(config, api, options.starts),
        "warm": lambda: {"start": warm_starts(config, options.starts)},
        "held": measure_held,
        "episodes": lambda: episodes(config, api, engine, options.episodes, options.containers),
    }
    for name in options.parts:
        figures = measurements[name]()
        result[name] = {**figures, "load": os.getloadavg()[0]}
        show(name, result[name])
    api.close()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
