"""`torchrun … -m turnwise.trainer --config CONFIG [--resume-step N]`."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from turnwise.config.files import ConfigError, load_config


def main() -> int:
    """Train as the resolved configuration says; 0 when done or asked to stop, 1 with a message otherwise."""
    parser = argparse.ArgumentParser(prog="python -m turnwise.trainer", description="Train the policy on batches of a run.")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration, outputs/config.toml")
    parser.add_argument("--resume-step", type=int, default=None, help="continue from checkpoints/step_N")
    arguments = parser.parse_args()
    from turnwise.trainer.checkpoint_index import CheckpointError
    from turnwise.trainer.loop import run_trainer
    from turnwise.trainer.model import ModelError
    from turnwise.trainer.publish import PublishError
    from turnwise.trainer.rehearsal import OutOfMemory

    try:
        run_trainer(load_config(arguments.config), resume_step=arguments.resume_step)
    except (ConfigError, ValidationError, CheckpointError, ModelError, PublishError, OutOfMemory, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def end(code: int) -> NoReturn:
    """Leave without taking the interpreter apart.

    All is written and the process group is gone by then, but threads of gloo's that still run have aborted a process that had
    done its work ("terminate called without an active exception", one of some hundred runs of two ranks).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
