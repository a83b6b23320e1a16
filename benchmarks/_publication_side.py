"""The trainer in `publication.py`: the real learner and its publication, one version for each line on stdin.

Argument: config.toml of the run. Answers a line of JSON a version, with clock readings that all processes of a machine share.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from turnwise.config import RLConfig
from turnwise.config.files import load_config
from turnwise.trainer import fsdp
from turnwise.trainer.handover import Handover
from turnwise.trainer.publish import publish
from turnwise.trainer.step import Learner
from turnwise.transport import Control, RunDir, WeightsStore, wait_for

KEEP = 4
CLAIM_TIMEOUT_S = 300.0


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    torch.set_num_threads(config.trainer.threads or 1)
    with fsdp.process_group(cuda=bool(config.gpus.trainer), timeout_s=300.0) as device:
        side = Side(config, device)
        say({"ready": True, "parameters": sum(p.numel() for p in side.learner.parameters.values()), "device": name_of(device)})
        for line in sys.stdin:
            say(side.publish(int(line)))
        side.close()


class Side:
    """What the trainer's loop holds."""

    def __init__(self, config: RLConfig, device: torch.device) -> None:
        run_dir = RunDir(config.output_dir)
        self.learner = Learner(config, device)
        self.store = WeightsStore(run_dir.weights)
        broadcast = config.weight_transfer == "broadcast"
        self.handover = Handover(self.learner, self.store, Control(run_dir.root)) if broadcast else None

    def publish(self, version: int) -> dict[str, Any]:
        self._step()
        began = time.monotonic()
        if self.handover is None:
            publish(self.learner, self.store, version, {}, keep=KEEP)
            return {"version": version, "began": began, "announced": time.monotonic()}
        self.handover.announce(version, {}, keep=KEEP)
        announced = time.monotonic()
        wait_for(self.store.claim_path(version), stop=lambda: False, timeout_s=CLAIM_TIMEOUT_S)
        claimed = time.monotonic()
        self.handover.send()
        return {"version": version, "began": began, "announced": announced, "claimed": claimed, "sent": time.monotonic()}

    def close(self) -> None:
        if self.handover is not None:
            self.handover.close()

    def _step(self) -> None:
        """Move every parameter, as an optimiser step would."""
        with torch.no_grad():
            for parameter in self.learner.parameters.values():
                local = fsdp.local(parameter)
                local.add_(torch.randn_like(local), alpha=1e-3)
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
