"""`[containers]`: where task containers run, what they may use, and what happens when their engine fails.

The defaults are the hardened ones; every field that relaxes something says so.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from turnwise.config.base import Config

OWN_MEMORY_MIB = (
    64  # what a container's processes need beside full tmpfs mounts, so that no task fills all of its memory with files
)


class HostConfig(Config):
    """One container engine."""

    url: str = Field(pattern=r"^(unix:///|tcp://|ssh://).+")
    """`unix:///run/docker.sock`, `tcp://host:2376` (TLS), or `ssh://user@host[:port][/path/of/docker.sock]`."""

    max_containers: int = Field(default=64, ge=1)
    """Most containers at once on this host."""

    tls_ca: Path | None = None
    """Certificate authority of a `tcp` host."""

    tls_cert: Path | None = None
    """This client's certificate for a `tcp` host."""

    tls_key: Path | None = None
    """Key of `tls_cert`."""

    insecure: bool = False
    """Relaxation: talk to a `tcp` host without TLS. Whoever reaches that port is root on the host."""

    @model_validator(mode="after")
    def _tls(self) -> Self:
        files = (self.tls_ca, self.tls_cert, self.tls_key)
        if self.url.startswith("tcp://") and not self.insecure and None in files:
            raise ValueError(
                f"containers.hosts: {self.url} is plain TCP, over which anybody becomes root there; "
                "set tls_ca, tls_cert and tls_key"
            )
        if any(files) and (self.insecure or not self.url.startswith("tcp://")):
            raise ValueError(f"containers.hosts: {self.url} has TLS files and does not use them; remove them")
        return self


class LimitsConfig(Config):
    """What one container may use."""

    memory_mib: int = Field(default=1024, ge=OWN_MEMORY_MIB)
    """Memory without swap, MiB; files in the mounts below count."""

    cpus: float = Field(default=1.0, gt=0)
    """CPU time per time."""

    pids: int = Field(default=128, ge=8)
    """Processes and threads."""

    open_files: int = Field(default=1024, ge=32)
    """Open files of one process."""

    home_mib: int = Field(default=256, ge=1)
    """Size of the home folder, which is in memory, MiB."""

    tmp_mib: int = Field(default=64, ge=1)
    """Size of /tmp, which is in memory, MiB."""

    data_mib: int = Field(default=64, ge=1)
    """Size of /data, which is in memory and which only turnwise writes, MiB."""

    shm_mib: int = Field(default=16, ge=1)
    """Size of /dev/shm, MiB."""

    @model_validator(mode="after")
    def _files_fit(self) -> Self:
        files = self.home_mib + self.tmp_mib + self.data_mib + self.shm_mib
        if files + OWN_MEMORY_MIB > self.memory_mib:
            raise ValueError(
                f"containers.limits: home_mib + tmp_mib + data_mib + shm_mib = {files} leave less than {OWN_MEMORY_MIB} of "
                f"memory_mib = {self.memory_mib}, so that a task could fill its memory with files; "
                f"raise memory_mib to {files + OWN_MEMORY_MIB}"
            )
        return self


class ContainersConfig(Config):
    """Task containers of environments that need them."""

    backend: Literal["docker", "bubblewrap"] = "docker"
    """`bubblewrap` needs no engine, and isolates less: memory and processes are limited singly, sizes of folders not at all."""

    hosts: list[HostConfig] = Field(default_factory=list)
    """Engines; empty takes the one that DOCKER_HOST names, or the local one."""

    max_containers: int = Field(default=64, ge=1)
    """Most containers at once where `hosts` is empty, and with bubblewrap."""

    evaluations: int = Field(default=4, ge=1)
    """Most containers at once in which submissions are scored, beside those of the agents."""

    warm: int = Field(default=2, ge=0)
    """Containers kept ready for the next lease, beside those in use."""

    starts: int = Field(default=4, ge=1)
    """Containers started at the same time on one host; more only wait for each other inside the engine."""

    wait_s: float = Field(default=600.0, gt=0)
    """How long a lease waits for a place, for GPUs, or for a failed engine, seconds."""

    limits: LimitsConfig = LimitsConfig()

    command_timeout_s: float = Field(default=60.0, gt=0)
    """Time for a command that names none, seconds."""

    output_bytes: int = Field(default=65536, ge=256)
    """Most bytes kept of a command's output: its first and its last half."""

    flood_bytes: int = Field(default=256 * 2**20, ge=4096)
    """Bytes of output after which a command is ended."""

    transfer_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Most bytes that are taken out of a container at once."""

    failures: int = Field(default=3, ge=1)
    """Failures in a row after which an engine counts as down."""

    pause_s: float = Field(default=2.0, gt=0)
    """Time to the first trial of an engine that is down; doubles with each further one up to a minute, seconds."""

    network: str = "none"
    """Relaxation: an engine's network (`bridge`) gives the model's code access to it."""

    user: str = Field(default="1000:1000", pattern=r"^\d+:\d+$")
    """Relaxation: `0:0` runs the model's code as root of the container."""

    read_only: bool = True
    """Relaxation: false lets the model's code write the whole root file system, whose size nothing limits."""

    capabilities: list[str] = Field(default_factory=list)
    """Relaxation: Linux capabilities given back; all are dropped."""
