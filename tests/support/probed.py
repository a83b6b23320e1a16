"""What a probe looks at in tests: a run on the tiny model, and a batch with the logprobs that the model gives its tokens."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from support.adapters import reference_logprobs
from support.batches import make_batch
from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Finding, Result, run_checks
from turnwise.diagnose.probe_report import ProbeReport, Setting
from turnwise.diagnose.trainer_checks import TRAINER_CHECKS
from turnwise.transport import Batch, Sample

TEMPERATURE = 0.7
SETTING = Setting(
    samples=4,
    given_samples=4,
    tokens=100,
    temperature=TEMPERATURE,
    loss="grpo",
    dtype="float32",
    published_dtype="float32",
    adapter=True,
    dropout=0.0,
    quantised=False,
    ranks=1,
    device="cpu",
)


def probed_config(folder: Path, tiny_model: Path, /, **changes: Any) -> RLConfig:
    """A resolved configuration of a run with LoRA on the tiny model, in `folder`."""
    tables = {
        "output_dir": str(folder),
        "trajectories_dir": str(folder / "trajectories"),
        "run_name": "probed",
        "max_steps": 100,
        "seq_len": 128,
        "model": {"name": str(tiny_model)},
        "inference": {"dp": 1, "port": 1024, "max_loras": 4},
        "orchestrator": {"env": [{"id": "wordle"}], "max_inflight": 8, "sampling": {"temperature": TEMPERATURE}},
        "trainer": {
            "processes": 1,
            "threads": 1,
            "micro_batch_tokens": 128,
            "model": {"lora": {"rank": 4, "alpha": 8}},
            "optim": {"lr": 1e-3},
        },
    }
    return RLConfig.model_validate(merge(tables, changes))


def scored_batch(model: Path, *, temperature: float = TEMPERATURE, groups: int = 3, group_size: int = 4) -> Batch:
    """A batch of random tokens, as if an engine that computes as transformers does had sampled them."""
    import torch
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = make_batch(1, groups=groups, group_size=group_size)
    samples = [_scored(engine, sample, temperature) for sample in batch.samples]
    return msgspec.structs.replace(batch, samples=samples, temperature=temperature)


def _scored(engine: Any, sample: Sample, temperature: float) -> Sample:
    values = [0.0, *reference_logprobs(engine, sample.token_ids, temperature=temperature)]
    logprobs = [value if chosen else 0.0 for value, chosen in zip(values, sample.loss_mask, strict=True)]
    return msgspec.structs.replace(sample, logprobs=logprobs)


def probe_here(config: RLConfig, batch: Batch, out: Path) -> ProbeReport:
    """Measure in this process, without torchrun."""
    import torch

    from turnwise.diagnose.probe import Probe
    from turnwise.trainer import fsdp

    torch.set_num_threads(1)
    with fsdp.process_group(cuda=False, timeout_s=60.0) as device:
        return Probe(config, batch, out, device).run()


def trainer_results(report: ProbeReport) -> list[Result]:
    """The trainer's checks on a report, as if all before them had passed."""
    own = {check.name for check in TRAINER_CHECKS}
    checks = [replace(check, needs=tuple(name for name in check.needs if name in own)) for check in TRAINER_CHECKS]
    return run_checks(checks, cast(Context, SimpleNamespace(probe=report)), lambda result: None)


def judged(report: ProbeReport, name: str) -> Finding:
    """What one of them makes of a report."""
    (check,) = (check for check in TRAINER_CHECKS if check.name == name)
    return check.run(cast(Context, SimpleNamespace(probe=report)))
