"""`python -m turnwise.orchestrator --config CONFIG [--resume-step N]`."""

import argparse
import asyncio
import logging
import resource
import signal
import sys
import traceback
from pathlib import Path

import msgspec

from turnwise.config import ConfigError, RLConfig, load_config
from turnwise.envs.containers import containers_of
from turnwise.inference.client import InferenceClient
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.launcher import engine_commands
from turnwise.orchestrator.filters import NoSignal
from turnwise.orchestrator.loop import Orchestrator
from turnwise.orchestrator.noise import WrongNoise
from turnwise.orchestrator.record import say
from turnwise.orchestrator.scheduler import TooManyErrors
from turnwise.orchestrator.versions import TrainerSilent
from turnwise.orchestrator.weights import WrongWeights
from turnwise.transport import BatchLog, Control, Progress, RunDir, StopRequest

EXIT_FAILED = 1
EXIT_TERMINATED = 143  # as a shell reports SIGTERM
EXPECTED = (
    NoSignal,
    TooManyErrors,
    TrainerSilent,
    WrongNoise,
    WrongWeights,
    EngineError,
    EngineUnavailable,
    ConfigError,
    ValueError,
    OSError,
)
"""What users can cause or mend: told in words. Anything else is a mistake of ours and comes with its traceback."""


def main() -> int:
    """Run the orchestrator; 0 at the last step or when asked to stop, 1 when the run cannot go on."""
    parser = argparse.ArgumentParser(prog="python -m turnwise.orchestrator", description="Collects rollouts into batches.")
    parser.add_argument("--config", type=Path, required=True, help="resolved config.toml of the run")
    parser.add_argument("--resume-step", type=int, default=0, help="step whose checkpoint the trainer starts from")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    try:
        config = load_config(arguments.config)
    except (ConfigError, ValueError) as error:
        say(f"{arguments.config}: {error}")
        return EXIT_FAILED
    try:
        request = asyncio.run(run(config, resume_step=arguments.resume_step))
    except (asyncio.CancelledError, KeyboardInterrupt):
        say("terminated")
        return EXIT_TERMINATED
    except Exception as error:
        return _failed(config, error)
    say(f"ended: {request.reason}" if request is not None else "all steps done")
    return EXIT_FAILED if request is not None and request.kind == "failed" else 0


async def run(config: RLConfig, *, resume_step: int) -> StopRequest | None:
    """The orchestrator of a resolved config; returns the request that ended it early."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    allow_connections()
    progress, next_batch = load_progress(RunDir(config.output_dir), resume_step)
    inference = config.inference
    engines = engine_commands(config, RunDir(config.output_dir).config, gpus=config.gpus.inference)
    urls = [engine.url for engine in engines]
    client = InferenceClient(
        urls, model=config.model.name, request_timeout_s=inference.request_timeout_s, max_retries=inference.max_retries
    )
    async with client:
        with containers_of(config, say) as containers:
            orchestrator = Orchestrator(
                config, client, resume_step=resume_step, progress=progress, next_batch=next_batch, containers=containers
            )
            return await orchestrator.run()


def allow_connections() -> None:
    """Raise the soft limit of open files, often 1,024, to the hard one: every rollout in flight holds a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def load_progress(run_dir: RunDir, resume_step: int) -> tuple[Progress, int]:
    """Where the orchestrator stands, and the first batch it has to make.

    The newest batch knows; without batches after the checkpoint, the checkpoint does.

    Raises:
        ValueError: the batch or the checkpoint file cannot be read.
    """
    log = BatchLog(run_dir.batches)
    newest = max((step for step in log.steps() if step >= resume_step), default=None)
    if newest is not None:
        return log.read(newest).progress, newest + 1
    file = run_dir.checkpoint(resume_step) / "orchestrator.msgpack"
    if resume_step == 0:
        return Progress(), 1
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Progress), resume_step + 1
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{file} does not hold the orchestrator's progress ({error}); resume from an older step") from error


def _failed(config: RLConfig, error: BaseException) -> int:
    """Say why the run cannot go on, and ask the trainer to save what it has."""
    causes = _leaves(error)
    for cause in causes:
        if not isinstance(cause, EXPECTED):
            traceback.print_exception(cause, file=sys.stdout)
        say(f"the run cannot go on: {type(cause).__name__}: {cause}")
    control = Control(RunDir(config.output_dir).root)
    try:
        if control.stop_request() is None:
            control.request_stop("failed", f"orchestrator: {type(causes[0]).__name__}: {causes[0]}")
    except OSError as trouble:  # the disk may be what failed
        say(f"the other processes could not be told: {trouble}")
    return EXIT_FAILED


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


if __name__ == "__main__":
    sys.exit(main())
