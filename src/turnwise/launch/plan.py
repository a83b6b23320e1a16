"""The composed plan: which processes a run starts, with which command, environment, GPUs and log. Starting it is elsewhere."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turnwise.config import RLConfig
from turnwise.inference.launcher import engine_commands, usable_cores
from turnwise.launch.survivors import RUN_ID
from turnwise.transport import RunDir

LOOPBACK = "127.0.0.1"
RANK_PREFIX = "[rank "  # begins each line of a trainer process in the log


@dataclass(frozen=True)
class ProcessSpec:
    """One process of a run, ready to be started here, printed, or placed on another node."""

    name: str  # "inference", "inference_1", "orchestrator", "trainer"
    argv: tuple[str, ...]
    env: Mapping[str, str]  # what is added to the environment of `rl`
    cwd: Path
    log: Path  # its stdout and stderr
    gpus: tuple[int, ...] = ()
    health_url: str | None = None  # answers 200 once the process serves

    @property
    def role(self) -> str:
        return self.name.partition("_")[0]

    def shell(self) -> str:
        """The command as one would type it."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*settings, shlex.join(self.argv)])


@dataclass(frozen=True)
class Plan:
    """All processes of a run, in the order in which they start."""

    processes: tuple[ProcessSpec, ...]
    run_dir: RunDir

    def of_role(self, role: str) -> tuple[ProcessSpec, ...]:
        return tuple(process for process in self.processes if process.role == role)


def compose(config: RLConfig, *, run_id: str, resume_step: int | None = None) -> Plan:
    """The plan of a resolved configuration: engines, trainer, orchestrator."""
    run_dir = RunDir(config.output_dir)
    resume = () if resume_step is None else ("--resume-step", str(resume_step))
    shared = {RUN_ID: run_id, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Plan((*engines(config, shared), _trainer(config, shared, resume), _orchestrator(config, shared, resume)), run_dir)


def engines(config: RLConfig, shared: Mapping[str, str]) -> list[ProcessSpec]:
    """The inference replicas of a resolved configuration."""
    run_dir, per_replica = RunDir(config.output_dir), config.inference.tp
    specs: list[ProcessSpec] = []
    for index, command in enumerate(engine_commands(config, run_dir.config, gpus=config.gpus.inference)):
        name = "inference" if index == 0 else f"inference_{index}"
        gpus = tuple(config.gpus.inference[index * per_replica : (index + 1) * per_replica])
        env = {**shared, **_devices(gpus), **_threads(None if gpus else config.inference.embedded.threads, 1), **command.env}
        specs.append(ProcessSpec(name, tuple(command.argv), env, Path.cwd(), _log(run_dir, name), gpus, f"{command.url}/health"))
    return specs


def _trainer(config: RLConfig, shared: Mapping[str, str], resume: tuple[str, ...]) -> ProcessSpec:
    """torchrun over all trainer GPUs, or over `trainer.processes` on a CPU, on loopback."""
    run_dir = RunDir(config.output_dir)
    processes = config.trainer.processes or 1
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)),
        # port 0: torchrun takes a free one when it binds; one that was free at this moment may be gone by then
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:0", "--local-addr", LOOPBACK, "--max-restarts", "0"),
        *("--log-dir", str(run_dir.logs / "torchrun"), "--tee", "3"),
    )
    gpus = tuple(config.gpus.trainer)
    prefix = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"{RANK_PREFIX}${{rank}}] "}
    env = {**shared, **_devices(gpus), **_threads(config.trainer.threads, processes), **prefix}
    if not gpus and sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # gloo otherwise looks up the host's name, which not every machine can
    argv = (*torchrun, "-m", "turnwise.trainer", "--config", str(run_dir.config), *resume)
    return ProcessSpec("trainer", argv, env, Path.cwd(), _log(run_dir, "trainer"), gpus)


def _orchestrator(config: RLConfig, shared: Mapping[str, str], resume: tuple[str, ...]) -> ProcessSpec:
    run_dir = RunDir(config.output_dir)
    argv = (sys.executable, "-m", "turnwise.orchestrator", "--config", str(run_dir.config), *resume)
    env = {**shared, **_devices(()), "OMP_NUM_THREADS": "1"}
    return ProcessSpec("orchestrator", argv, env, Path.cwd(), _log(run_dir, "orchestrator"))


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this machine, or the cluster's CUDA_VISIBLE_DEVICES, offers; `gpus.*` counts along this list."""
    offered = os.environ.get("CUDA_VISIBLE_DEVICES")
    if offered is not None:
        return [device.strip() for device in offered.split(",") if device.strip()]
    driver = Path("/proc/driver/nvidia/gpus")
    count = len(list(driver.iterdir())) if driver.is_dir() else len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(index) for index in range(count)]


def _devices(gpus: tuple[int, ...]) -> dict[str, str]:
    """An empty list hides all GPUs: a run configured for the CPU stays there on a machine that has some."""
    offered = visible_gpus()
    return {"CUDA_VISIBLE_DEVICES": ",".join(offered[gpu] if gpu < len(offered) else str(gpu) for gpu in gpus)}


def _threads(threads: int | None, processes: int) -> dict[str, str]:
    """CPU threads of each process. Engine and trainer mostly take turns, so each gets all cores, and waits without spinning."""
    count = threads or max(1, usable_cores() // processes)
    return {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _log(run_dir: RunDir, name: str) -> Path:
    return run_dir.logs / f"{name}.stdout"
