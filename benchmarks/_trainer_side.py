"""One process of the trainer in `trainer_throughput.py`; argument: the work, as JSON. Rank 0 writes the rows."""

import json
import random
import statistics
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.trainer import fsdp
from turnwise.trainer.attention import NO_PARENT, Layout
from turnwise.trainer.stand_in import stand_in
from turnwise.trainer.step import Learner
from turnwise.transport import Batch, Progress, Sample


def main() -> None:
    work: dict[str, Any] = json.loads(sys.argv[1])
    cuda = work["gpus"] > 0
    with fsdp.process_group(cuda=cuda, timeout_s=300.0) as device:
        rows: list[dict[str, Any]] = []
        config = configuration(work, work["packs"][0])
        learner = Learner(config, device)
        for samples, tokens in work["packs"]:
            rows.append(measure(learner, work, samples, tokens, device))
            if fsdp.rank() == 0:
                print(json.dumps(rows[-1]), flush=True)
                Path(work["output"]).write_text(json.dumps(rows))


def configuration(work: dict[str, Any], pack: list[int]) -> RLConfig:
    longest = max(tokens for _, tokens in work["packs"]) + 1
    tables: dict[str, Any] = {
        "max_steps": 1000,
        "seq_len": longest,
        "model": {"name": work["model"], "load_format": "dummy"},
        "inference": {"engine": "vllm"},
        "orchestrator": {"env": [{"id": "wordle"}]},
        "gpus": {"trainer": list(range(work["gpus"]))},
        "trainer": {
            "micro_batch_tokens": max(longest, pack[0] * pack[1]),
            "processes": max(1, work["gpus"]),
            "model": {"lora": {"rank": work["rank"], "alpha": 2.0 * work["rank"]}},
        },
    }
    for setting in work["settings"]:
        tables = merge(tables, tomllib.loads(setting))
    return RLConfig.model_validate(tables)


def measure(learner: Learner, work: dict[str, Any], samples: int, tokens: int, device: torch.device) -> dict[str, Any]:
    ranks, seconds = fsdp.world_size(), []
    count = samples * work["micro_batches"] * ranks
    for step in range(work["warm_up"] + work["steps"]):
        batch = make_batch(step + 1, count, tokens, learner)
        fsdp.gather(step)  # all begin together
        began = time.perf_counter()
        learner.step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= work["warm_up"]:
            seconds.append(time.perf_counter() - began)
    meter = learner.meter
    flops = meter.cost(Layout((tokens,) * count, (NO_PARENT,) * count))
    peak = meter.peak_flops
    median = statistics.median(seconds)
    return {
        "gpus": work["gpus"],
        "pack": f"{samples} x {tokens:,}",
        "micro_batches": work["micro_batches"],
        "settings": work["settings"],
        "tokens_per_s": count * tokens / median,
        "seconds": seconds,
        "mfu": flops / median / (peak * ranks) if peak else None,
        "flops_a_token": flops / (count * tokens),
        "trained": meter.trainable,
        "frozen": meter.frozen,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def make_batch(step: int, count: int, tokens: int, learner: Learner) -> Batch:
    """Samples of `tokens` inputs, no two with a common prompt, all but the first token sampled."""
    draw = random.Random(step)
    vocabulary = learner.policy.model.config.vocab_size
    samples: list[Sample] = []
    for index in range(count):
        ids = [draw.randrange(vocabulary) for _ in range(tokens + 1)]
        advantage = draw.choice([-1.0, 1.0])
        samples.append(stand_in(ids, f"r{step}-{index}", logprob=-11.0, advantage=advantage, group=index))
    names = [sample.rollout_id for sample in samples]
    return Batch(step, samples, names, count, temperature=1.0, progress=Progress())


if __name__ == "__main__":
    main()
