"""turnwise's side of `cpu_step.py`: the engine and the trainer of a run, as `rl` would start them, one step at a time.

This process takes the orchestrator's place, with the orchestrator's own parts: requests through the client, advantages, the
batch log, and the swap with its proof that the engine serves what the trainer published. Chat template, environment and
evaluation are left out, as on the other side.
"""

import asyncio
import subprocess
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

from _cpu_step_work import (
    ALPHA,
    COMPLETIONS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    PROMPT_TOKENS,
    RANK,
    TARGETS,
    prompts,
    reward,
)
from turnwise.config import RLConfig
from turnwise.inference.client import Completion, InferenceClient
from turnwise.launch.plan import ProcessSpec, compose
from turnwise.launch.resolve import with_defaults, write_resolved
from turnwise.orchestrator.advantage import group_advantages
from turnwise.orchestrator.weights import Policy
from turnwise.transport import NOT_SAMPLED, Batch, BatchLog, Progress, RunDir, Sample, WeightsReady, WeightsStore

POLL_S = 0.02  # the orchestrator looks for a new version this often
START_S = 300.0
STOP_S = 30.0


def make_config(model: Path, output: Path, steps: int, threads: int) -> RLConfig:
    """On policy, step by step; the engine is in its ordinary mode, in which replies need not repeat to the bit."""
    tokens = COMPLETIONS * (PROMPT_TOKENS + NEW_TOKENS)
    lora = {"rank": RANK, "alpha": ALPHA, "target_modules": list(TARGETS)}
    optim = {"lr": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
    tables: dict[str, Any] = {
        "output_dir": output,
        "seq_len": PROMPT_TOKENS + NEW_TOKENS,
        "model": {"name": str(model), "dtype": "float32"},
        "inference": {"embedded": {"threads": threads}},
        "orchestrator": {"batch_size": COMPLETIONS, "rollouts_per_example": COMPLETIONS, "max_staleness": 1},
        "trainer": {"threads": threads, "micro_batch_tokens": tokens, "model": {"lora": lora}, "optim": optim},
    }
    return with_defaults(RLConfig.model_validate(tables), max_steps=steps, model=str(model))


def make_batch(step: int, prompt: Sequence[int], replies: Sequence[Completion]) -> Batch:
    advantages = group_advantages([[reward(reply.token_ids) for reply in replies]], kind="grpo")[0].tolist()
    before = len(prompt)
    samples = [
        Sample(
            token_ids=[*prompt, *reply.token_ids],
            loss_mask=[False] * before + [True] * len(reply.token_ids),
            logprobs=[0.0] * before + list(reply.logprobs),
            advantages=[0.0] * before + [advantage] * len(reply.token_ids),
            policy_versions=[NOT_SAMPLED] * before + [version for version, count in reply.spans for _ in range(count)],
            rollout_tokens=len(reply.token_ids),
            rollout_id=f"{step}-{index}",
            group_id=step,
            task_id=str(step),
        )
        for index, (reply, advantage) in enumerate(zip(replies, advantages, strict=True))
    ]
    rollouts = [sample.rollout_id for sample in samples]
    return Batch(step, samples, rollouts, len(samples), temperature=1.0, progress=Progress(next_group=step))


class TurnwiseSide:
    """An async context manager around the two processes."""

    def __init__(self, model: Path, output: Path, *, steps: int, threads: int, environment: dict[str, str]) -> None:
        from transformers import AutoTokenizer

        self.config = make_config(model, output, steps, threads)
        run_dir = RunDir(output)
        self.log, self.store = BatchLog(run_dir.batches), WeightsStore(run_dir.weights)
        write_resolved(self.config, run_dir.config)
        plan = compose(self.config, run_id=uuid4().hex)
        self.specs = [*plan.of_role("inference"), *plan.of_role("trainer")]
        self.environment = environment
        self.processes: list[subprocess.Popen[bytes]] = []
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts: list[list[int]] = [tokenizer(text)["input_ids"] for text in prompts(steps)]
        self.version = 0

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    async def __aenter__(self) -> "TurnwiseSide":
        inference = self.config.inference
        async with AsyncExitStack() as stack:
            stack.callback(self._stop)
            self.processes = [self._start(spec) for spec in self.specs]
            client = InferenceClient(
                [f"http://{inference.host}:{inference.port}"],
                model=self.config.model.name,
                request_timeout_s=inference.request_timeout_s,
                max_retries=0,
            )
            await stack.enter_async_context(client)
            self.policy = Policy(client, self.store, stop_ids=[])
            stack.push_async_callback(self.policy.close)
            await self._published(0)
            await client.wait_healthy(START_S)
            await self.policy.swap(await self._published(0))
            self.stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stack.aclose()

    async def step(self) -> dict[str, float]:
        """One step; its parts in seconds. From the newest version served to the next one served."""
        began = time.perf_counter()
        prompt, number = self.prompts[self.version], self.version + 1
        replies = await asyncio.gather(*(self._reply(prompt, number, index) for index in range(COMPLETIONS)))
        generated = time.perf_counter()
        self.log.write(make_batch(number, prompt, replies))
        ready = await self._published(number)
        published = time.perf_counter()
        await self.policy.swap(ready)
        self.version = number
        return {
            "generate_s": generated - began,
            "train_s": ready.metrics["timing/train_s"],
            "publish_s": published - generated - ready.metrics["timing/train_s"],
            "swap_s": time.perf_counter() - published,
            "new_tokens": sum(len(reply.token_ids) for reply in replies),
            "logprob_difference": ready.metrics["mismatch/logprob_abs/max"],
        }

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()  # torchrun passes it on to the trainer
        for process in self.processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    async def _reply(self, prompt: Sequence[int], step: int, index: int) -> Completion:
        generate = self.policy.generator(temperature=1.0, affinity=f"{step}-{index}")
        return await generate(prompt, NEW_TOKENS, COMPLETIONS * step + index)

    async def _published(self, version: int) -> WeightsReady:
        deadline = time.monotonic() + START_S
        while (ready := self.store.poll(version)) is None:
            for process, spec in zip(self.processes, self.specs, strict=True):
                if process.poll() is not None:
                    raise RuntimeError(f"the {spec.name} ended with {process.returncode}:\n{spec.log.read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"version {version} was not published within {START_S:.0f} s")
            await asyncio.sleep(POLL_S)
        return ready

    def _start(self, spec: ProcessSpec) -> subprocess.Popen[bytes]:
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("wb") as log:
            environment = {**self.environment, **spec.env}
            return subprocess.Popen(spec.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=spec.cwd)
