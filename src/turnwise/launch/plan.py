"""The composed plan: which processes a run starts, with which command, environment, GPUs and log. Starting it is elsewhere."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turnwise.config import RLConfig
from turnwise.envs.containers import GPUS_VARIABLE
from turnwise.inference.launcher import engine_commands, usable_cores
from turnwise.launch.gpus import BY_BUS, ORDER, VISIBLE, Machine, look
from turnwise.launch.survivors import RUN_ID
from turnwise.trainer.sharing import WAIT_FOR
from turnwise.transport import RunDir

LOOPBACK = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
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

    @property
    def place(self) -> str:
        """`GPU 2, 3` or `CPU`."""
        return f"GPU {', '.join(map(str, self.gpus))}" if self.gpus else "CPU"

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


def compose(config: RLConfig, *, run_id: str, resume_step: int | None = None, machine: Machine | None = None) -> Plan:
    """The plan of a resolved configuration: engines, trainer, orchestrator. `machine` is this one when left out."""
    machine = machine or look()
    run_dir = RunDir(config.output_dir)
    resume = () if resume_step is None else ("--resume-step", str(resume_step))
    shared = shared_environment(run_id)
    serving = engines(config, shared, machine)
    trainer = trainer_spec(config, shared, machine, serving, arguments=resume)
    return Plan((*serving, trainer, _orchestrator(config, shared, resume, machine)), run_dir)


def shared_environment(run_id: str) -> dict[str, str]:
    """What every process of a run gets."""
    return {RUN_ID: run_id, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def engines(config: RLConfig, shared: Mapping[str, str], machine: Machine | None = None) -> list[ProcessSpec]:
    """The inference replicas of a resolved configuration: one for each GPU of `gpus.inference`, or for each group of `tp`."""
    machine = machine or look()
    run_dir, per_replica = RunDir(config.output_dir), config.inference.tp
    specs: list[ProcessSpec] = []
    for index, command in enumerate(engine_commands(config, run_dir.config, gpus=config.gpus.inference)):
        name = "inference" if index == 0 else f"inference_{index}"
        gpus = tuple(config.gpus.inference[index * per_replica : (index + 1) * per_replica])
        # on a GPU vLLM chooses its threads itself, unless the user has
        threads = {} if gpus else _threads(config.inference.embedded.threads, 1)
        env = {**shared, **_devices(gpus, machine), **threads, **command.env}
        specs.append(ProcessSpec(name, tuple(command.argv), env, Path.cwd(), _log(run_dir, name), gpus, f"{command.url}/health"))
    return specs


def trainer_spec(
    config: RLConfig,
    shared: Mapping[str, str],
    machine: Machine,
    serving: Sequence[ProcessSpec],
    *,
    name: str = "trainer",
    program: Sequence[str] = ("-m", "turnwise.trainer"),
    arguments: Sequence[str] = (),
) -> ProcessSpec:
    """torchrun over all trainer GPUs, or over `trainer.processes` on a CPU, on loopback.

    Args:
        config: resolved.
        shared: `shared_environment`.
        machine: this one.
        serving: the engines, for which a trainer on their GPUs waits.
        name: of the process and its log; "trainer" or "trainer_…".
        program: what torchrun starts in every process: a module behind `-m`, or a script.
        arguments: for it, behind `--config`.
    """
    run_dir = RunDir(config.output_dir)
    processes = config.trainer.processes or 1
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)),
        # port 0: torchrun takes a free one when it binds; one that was free at this moment may be gone by then
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:0", "--local-addr", LOOPBACK, "--max-restarts", "0"),
        *("--log-dir", str(run_dir.logs / "torchrun"), "--tee", "3"),
    )
    gpus = tuple(config.gpus.trainer)
    env = {
        **shared,
        **_devices(gpus, machine),
        **_threads(config.trainer.threads, processes),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"{RANK_PREFIX}${{rank}}] ",
    }
    if config.gpus.shared:
        env[WAIT_FOR] = " ".join(str(engine.health_url) for engine in serving)
    if sys.platform == "linux" and GLOO_INTERFACE not in os.environ:
        env[GLOO_INTERFACE] = "lo"  # gloo otherwise looks up the host's name, which not every machine can
    argv = (*torchrun, *program, "--config", str(run_dir.config), *arguments)
    return ProcessSpec(name, argv, env, Path.cwd(), _log(run_dir, name), gpus)


def _orchestrator(config: RLConfig, shared: Mapping[str, str], resume: tuple[str, ...], machine: Machine) -> ProcessSpec:
    run_dir = RunDir(config.output_dir)
    argv = (sys.executable, "-m", "turnwise.orchestrator", "--config", str(run_dir.config), *resume)
    env = {**shared, **_devices((), machine), "OMP_NUM_THREADS": "1"}
    if config.gpus.containers:
        env[GPUS_VARIABLE] = ",".join(machine.device(gpu) for gpu in config.gpus.containers)
    return ProcessSpec("orchestrator", argv, env, Path.cwd(), _log(run_dir, "orchestrator"))


def _devices(gpus: tuple[int, ...], machine: Machine) -> dict[str, str]:
    """An empty list hides all GPUs: a run configured for the CPU stays there on a machine that has some."""
    visible = {VISIBLE: ",".join(machine.device(gpu) for gpu in gpus)}
    return visible | {ORDER: BY_BUS} if gpus else visible


def _threads(threads: int | None, processes: int) -> dict[str, str]:
    """CPU threads of each process. Engine and trainer mostly take turns, so each gets all cores, and waits without spinning."""
    count = threads or max(1, usable_cores() // processes)
    return {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _log(run_dir: RunDir, name: str) -> Path:
    return run_dir.logs / f"{name}.stdout"
