"""The GPUs of this machine: which of them the caller may use, what they are, how much of their memory is taken.

`gpus.*` counts along the GPUs that are visible to `rl`: all of them, or those of CUDA_VISIBLE_DEVICES where a user or a cluster
set it, in its order. NVML, and with it nvidia-smi, counts by PCI bus and knows nothing of that variable; so processes are started
with CUDA_DEVICE_ORDER = PCI_BUS_ID, and an index means the same GPU everywhere.
"""

import ast
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
BY_BUS = "PCI_BUS_ID"
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,memory.used",
    "--format=csv,noheader,nounits",
)
SMI_TIMEOUT_S = 30.0  # without persistence mode the driver first wakes every GPU
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice of one."""

    device: str  # what CUDA_VISIBLE_DEVICES must hold to get it: an index, a UUID or a MIG name
    uuid: str = ""
    name: str = ""  # "NVIDIA H200"
    total: int | None = None  # bytes of memory; None where nothing tells
    used: int | None = None  # bytes taken at this moment, by any process


@dataclass(frozen=True)
class TorchBuild:
    """The torch of this environment; `cuda` is the CUDA version that it was built for."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Machine:
    """The GPUs that `rl` may use, in the order in which `gpus.*` counts them."""

    gpus: tuple[Gpu, ...] = ()
    offered: str | None = None  # CUDA_VISIBLE_DEVICES of the caller
    torch: TorchBuild = TorchBuild("none", None)

    def gpu(self, index: int) -> Gpu | None:
        return self.gpus[index] if 0 <= index < len(self.gpus) else None

    def device(self, index: int) -> str:
        """The entry of CUDA_VISIBLE_DEVICES for GPU `index`; the index itself where the machine lacks it and nothing starts."""
        gpu = self.gpu(index)
        return gpu.device if gpu else str(index)


def look(environment: Mapping[str, str] = os.environ) -> Machine:
    """The machine as it is now: asks nvidia-smi, and where that is absent counts what the driver lists."""
    present = parse_smi(_ask_smi()) or [Gpu(str(index)) for index in range(_count_devices())]
    offered = environment.get(VISIBLE)
    return Machine(tuple(present if offered is None else choose(present, offered)), offered, torch_build())


def parse_smi(output: str) -> list[Gpu]:
    """GPUs from the output of `NVIDIA_SMI`, a line each; memory in MiB, or `[N/A]` where a GPU does not tell.

    Lines that are no such row (warnings of the driver) are passed over.
    """
    gpus: list[Gpu] = []
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and fields[0].isdigit():
            index, uuid, name, total, used = fields
            gpus.append(Gpu(index, uuid, name, _bytes(total), _bytes(used)))
    return gpus


def choose(present: Sequence[Gpu], offered: str) -> list[Gpu]:
    """The GPUs that CUDA shows under CUDA_VISIBLE_DEVICES = `offered`.

    As CUDA reads it: entries are indices, UUIDs (or beginnings of one) and MIG names; the first that is none of them hides itself
    and all after it, and so does -1; a GPU named twice hides all. A MIG slice is taken at its word, since the list of GPUs has
    none, and so is everything where the driver lists nothing.
    """
    gpus: list[Gpu] = []
    for entry in (part.strip() for part in offered.split(",")):
        gpu = _find(present, entry)
        if gpu is None:
            break
        if any(gpu == other or (gpu.uuid and gpu.uuid == other.uuid) for other in gpus):
            return []
        gpus.append(gpu)
    return gpus


def torch_build() -> TorchBuild:
    """Version and CUDA version of the installed torch, read from its files: importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    origin = Path(found.origin).with_name("version.py") if found and found.origin else None
    if origin is None or not origin.is_file():
        return TorchBuild("none", None)
    return parse_torch_version(origin.read_text())


def parse_torch_version(text: str) -> TorchBuild:
    """From torch/version.py: `__version__ = '2.11.0+cu130'`, `cuda: Optional[str] = '13.0'` or None."""
    values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*=\s*(.+?)\s*$", text, re.MULTILINE))
    version, cuda = (ast.literal_eval(values.get(name, "None")) for name in ("__version__", "cuda"))
    return TorchBuild(str(version), cuda)


def _find(present: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdigit():
        known = next((gpu for gpu in present if gpu.device == entry), None)
        return known or (None if present else Gpu(entry))
    if entry.startswith("MIG-"):
        return Gpu(entry, entry, "MIG slice")
    if not entry.startswith("GPU-"):
        return None
    matches = [gpu for gpu in present if gpu.uuid.lower().startswith(entry.lower())]
    if len(matches) == 1:
        return replace(matches[0], device=matches[0].uuid)  # in full: NVML, which vLLM asks, knows no beginnings
    return None if any(gpu.uuid for gpu in present) else Gpu(entry, entry)


def _bytes(mib: str) -> int | None:
    return int(mib) * MIB if mib.isdigit() else None


def _ask_smi() -> str:
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no driver, or one that hangs: the count of devices decides
    return done.stdout if done.returncode == 0 else ""


def _count_devices() -> int:
    """GPUs that the driver lists; a container may see more under /proc than it was given, so device files come first."""
    files = list(Path("/dev").glob("nvidia[0-9]*"))
    driver = Path("/proc/driver/nvidia/gpus")
    return len(files) or (len(list(driver.iterdir())) if driver.is_dir() else 0)
