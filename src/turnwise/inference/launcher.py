"""Commands that start the inference engines of a run: the embedded one, or vLLM's server. Imports no torch."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.config import ConfigError, RLConfig
from turnwise.inference.wire import FLOAT32_NORMS

VLLM_PYTHON = "TURNWISE_VLLM_PYTHON"  # interpreter of the environment that has vLLM, where it is not this one
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts
VLLM_EXTENSION = "turnwise.inference.vllm_worker.WorkerExtension"
VLLM_ROUTE = "turnwise.inference.vllm_route.TokenRoute"
ENGINE_PATH = Path(__file__).parent / "engine_path"  # holds this package, and nothing else of its environment
VLLM_SEQUENCES = 256  # decoded together by default; on GPUs of 70 GiB and more 1,024
VLLM_MOST_SEQUENCES = 1024  # each costs memory for its logits and a place in the tables of adapters
SEQUENCES_MARGIN = 1.25  # replicas are not loaded evenly, and evaluations run beside
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CPU_KV_CACHE_GIB = "1"
VLLM_DISABLED = "VLLM_DISABLED_KERNELS"
# vLLM's products with MXFP4 weights that round activations to four bits as well, where a GPU has units for that: another policy
VLLM_ROUNDING_KERNELS = ("FlashInferMxFp4LinearKernel", "B12xMxFp4LinearKernel", "EmulationMxfp4LinearKernel")


@dataclass(frozen=True)
class EngineCommand:
    """One replica: how to start it and where it will answer. GPUs are the plan's business (CUDA_VISIBLE_DEVICES)."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to the environment
    url: str


def engine_commands(config: RLConfig, config_path: Path, *, gpus: Sequence[int]) -> list[EngineCommand]:
    """The commands of all replicas of a resolved configuration; replica i listens on `inference.port + i`.

    Raises:
        ConfigError: an [inference] setting that the engine cannot serve.
    """
    inference = config.inference
    if inference.port is None:
        raise ConfigError("inference.port is unset; the resolved configuration carries one.")
    replicas = inference.dp or max(1, len(gpus) // inference.tp)
    commands: list[EngineCommand] = []
    for index in range(replicas):
        port = inference.port + index
        name = "inference" if index == 0 else f"inference_{index}"
        if inference.engine == "embedded":
            argv, env = _embedded(config, config_path, port, replicas)
        else:
            argv, env = _vllm(config, port, index, replicas, on_gpu=bool(gpus))
        commands.append(EngineCommand(name, tuple(argv), env, _url(inference.host, port)))
    return commands


def check_engine(config: RLConfig) -> None:
    """Raises ConfigError when the configured engine is not installed; a dry run does without this."""
    if config.inference.engine != "vllm":
        return
    python = os.environ.get(VLLM_PYTHON)
    if python is not None and not Path(python).exists():
        raise ConfigError(f"{VLLM_PYTHON} = {python} does not exist; name the Python of an environment that has vLLM.")
    if python is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'inference.engine = "vllm", but the package vllm is not installed; run `pip install turnwise[vllm]`, '
            f'set {VLLM_PYTHON} to the Python of an environment that has it, or use inference.engine = "embedded".'
        )


def lora_rank_limit(rank: int) -> int:
    """The smallest limit that vLLM accepts for adapters of this rank.

    Raises:
        ConfigError: the rank is above vLLM's largest.
    """
    for limit in VLLM_LORA_RANKS:
        if rank <= limit:
            return limit
    raise ConfigError(f"trainer.model.lora.rank = {rank} is more than vLLM serves ({VLLM_LORA_RANKS[-1]}); use a smaller rank.")


def usable_cores() -> int:
    """CPU cores that this process may use: a pinned process that starts a thread for every core of the machine crawls."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _embedded(config: RLConfig, config_path: Path, port: int, replicas: int) -> tuple[list[str], dict[str, str]]:
    argv = [sys.executable, "-m", "turnwise.inference.embedded", "--config", str(config_path), "--port", str(port)]
    threads = config.inference.embedded.threads or max(1, usable_cores() // replicas)
    return [*argv, "--host", config.inference.host], {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def _vllm(config: RLConfig, port: int, index: int, replicas: int, *, on_gpu: bool) -> tuple[list[str], dict[str, str]]:
    inference = config.inference
    if inference.host not in LOOPBACK:
        raise ConfigError(
            f'inference.host = "{inference.host}" would expose routes that load weights and run methods in the engine; '
            "use 127.0.0.1, and a tunnel where other machines need it."
        )
    flags: dict[str, Any] = {
        "model": config.model.weights,
        "served-model-name": config.model.name,
        "host": inference.host,
        "port": port,
        "dtype": config.model.dtype,
        "load-format": None if config.model.load_format == "auto" else config.model.load_format,
        "seed": config.seed + index,  # replicas of one seed would draw the same noise for the same rows
        "max-model-len": _max_model_len(config),
        "tensor-parallel-size": inference.tp,
        "logprobs-mode": "processed_logprobs",  # of the distribution that was sampled, temperature included
        "generation-config": "vllm",  # no top-p, top-k or temperature from the model's own generation_config.json
        "uvicorn-log-level": "warning",
        "disable-uvicorn-access-log": True,
        "worker-extension-cls": VLLM_EXTENSION,
        "middleware": VLLM_ROUTE,
        "trust-remote-code": True if config.model.trust_remote_code else None,
        **_lora_flags(config),
        "additional-config": {FLOAT32_NORMS: True} if config.inference.noise and config.inference.noise.float32_norms else None,
    }
    if on_gpu:
        flags["gpu-memory-utilization"] = config.gpus.inference_memory
        flags["enable-prefix-caching"] = True  # the next turn of a rollout computes only what is new
        flags["max-num-seqs"] = _sequences(config, replicas)
    else:
        flags["enforce-eager"] = True
        # a seeded request whose prompt is computed in pieces ends vLLM 0.32 on a CPU: its generator cannot be turned back
        flags["enable-chunked-prefill"] = False
    flags |= {key.replace("_", "-"): value for key, value in inference.vllm.items()}
    python = os.environ.get(VLLM_PYTHON, sys.executable)
    return [python, "-m", "vllm.entrypoints.openai.api_server", *_argv(flags)], _vllm_env(config, on_gpu=on_gpu)


def _lora_flags(config: RLConfig) -> dict[str, Any]:
    lora = config.trainer.model.lora
    if lora is None:
        return {}
    versions = config.adapter_slots
    return {
        "enable-lora": True,
        "max-loras": versions,
        "max-cpu-loras": versions,
        "max-lora-rank": lora_rank_limit(lora.rank),
        # without it vLLM wraps the output layer too, and computes prompt logprobs there with the adapter indices of the rows that
        # it samples: beyond the rows of the prompt on a GPU, an error that ends the engine on a CPU
        "lora-target-modules": lora.target_modules,
    }


def _vllm_env(config: RLConfig, *, on_gpu: bool) -> dict[str, str]:
    env = {
        "VLLM_SERVER_DEV_MODE": "1",  # /pause, /resume, /reset_prefix_cache, /collective_rpc
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",  # seconds; after vLLM's own 5 it closes connections that the client uses again
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ENGINE_PATH), os.environ.get("PYTHONPATH")])),
    }
    if config.model.quantized is not None:
        disabled = [name for name in os.environ.get(VLLM_DISABLED, "").split(",") if name]
        env[VLLM_DISABLED] = ",".join([*disabled, *VLLM_ROUNDING_KERNELS])
    if on_gpu:
        # the CPU has hundreds of small tensors of an adapter to handle: with a thread a core, each would be a barrier of all
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    else:
        threads = config.inference.embedded.threads or usable_cores()
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE_GIB,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    return env


def _sequences(config: RLConfig, replicas: int) -> int | None:
    """Rollouts that one replica may have to decode together, where that is more than any vLLM does; None leaves it to vLLM."""
    wanted = math.ceil((config.orchestrator.max_inflight or 0) / replicas * SEQUENCES_MARGIN)
    return min(wanted, VLLM_MOST_SEQUENCES) if wanted > VLLM_SEQUENCES else None


def _max_model_len(config: RLConfig) -> int:
    """`seq_len` and one token more, which logprobs of a full sample need, within the positions of the model."""
    wanted = config.seq_len + 1
    path = Path(config.model.name) / "config.json"
    if not path.is_file():
        return wanted
    positions = json.loads(path.read_text()).get("max_position_embeddings", wanted)
    return min(wanted, int(positions))


def _argv(flags: Mapping[str, Any]) -> list[str]:
    """Command-line flags: True and False become `--key` and `--no-key`, None and [] are left out, tables become JSON."""
    argv: list[str] = []
    for key, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            argv += [f"--{key}", *(str(item) for item in value)] if value else []
        elif isinstance(value, dict):
            argv += [f"--{key}", json.dumps(value)]
        elif value is not None:
            argv += [f"--{key}", str(value)]
    return argv


def _url(host: str, port: int) -> str:
    reachable = "127.0.0.1" if host == "0.0.0.0" else host
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
