"""Hardened containers on one Docker engine.

A container's first process is a shell that waits on its attached input: it costs nothing, ends with this process, because the
engine then closes its input, and inside the container nobody can kill it. As init of its pid namespace it can, without a new
process and so also at the process limit, kill all others and read the kernel's counters.
"""

import logging
import threading
import time
from typing import Any

from turnwise.config.containers import ContainersConfig, LimitsConfig
from turnwise.containers.breaker import Breaker
from turnwise.containers.cgroup import CgroupCounters
from turnwise.containers.engine import Engine
from turnwise.containers.errors import ContainerError, ContainerGone, EngineDown
from turnwise.containers.owner import OWNER_LABEL, RUN_LABEL, Owner
from turnwise.containers.recipes import SHELL_LABEL, ensure_image
from turnwise.containers.shell import Shell, Stop
from turnwise.containers.spec import DATA, ENVIRONMENT, HOME, Counters, Fate, Process, Spec

log = logging.getLogger(__name__)

MIB = 2**20
CONTROL_S = 20.0  # for an answer of the first process; it needs a millisecond, an overloaded machine seconds
SWEEP_S = 10.0  # until killed processes are gone; longer means that the kernel holds them
CONTROL_FLOOD = MIB
PLAIN_SHELL = "/bin/sh"  # of images that have none of ours
COUNT = """o=0; p=0
for f in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
[ -r $f ] && while read -r k v; do [ "$k" = oom_kill ] && o=$v; done <$f
done
for f in /sys/fs/cgroup/pids.events /sys/fs/cgroup/pids/pids.events; do
[ -r $f ] && while read -r k v; do [ "$k" = max ] && p=$v; done <$f
done
echo $o $p"""  # builtins only: the first process must not need another one; cgroup v2, then v1
KILL_ALL = "kill -9 -1 2>/dev/null; set -- /proc/[0-9]*; echo $#"


class DockerCell:
    """One container."""

    def __init__(self, host: "DockerHost", spec: Spec, shell: str):
        self._host, self._engine, self._shell = host, host.engine, shell
        self._destroyed = False
        self._destroying = threading.Lock()
        self._controlling = threading.Lock()
        with self._engine.call() as api:
            self.id: str = host.create(api, spec, shell)["Id"]
        try:
            self._control = Shell(self._engine.attach(self.id))
            with self._engine.call() as api:
                api.start(self.id)
            self._ask("trap '' CHLD")  # the kernel then buries orphans, for whom this process is the parent
            self._counted = self._counted_here()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        try:
            self.destroy()
        except EngineDown:  # what is left is an orphan for the next start
            log.warning("containers: %s was not removed from %s", self.id[:12], self._host.name)

    def _ask(self, command: str) -> str:
        """Let the first process run builtins. Raises ContainerGone or EngineDown when it does not answer."""
        with self._controlling:
            reply = self._control.run(command, timeout_s=CONTROL_S, max_bytes=4096, flood_bytes=CONTROL_FLOOD)
        if reply.stop is Stop.END:
            return reply.output.decode(errors="replace").strip()
        if self.fate().running:  # asked first: an engine that is down is another matter
            self.destroy()
        raise ContainerGone(f"container {self.id[:12]} on {self._host.name} ended ({reply.stop})")

    def open(self, *, root: bool = False) -> Process:
        user = "0:0" if root else self._host.config.user
        return self._engine.execute(self.id, [self._shell], user=user, workdir="/" if root else HOME)

    def sweep(self) -> None:
        deadline = time.monotonic() + SWEEP_S
        while self._ask(KILL_ALL) != "1":
            if time.monotonic() > deadline:
                self.destroy()
                raise ContainerGone(f"container {self.id[:12]} had processes that could not be killed, so it was removed")
            time.sleep(0.005)

    def _counted_here(self) -> CgroupCounters | None:
        if not self._engine.is_local:
            return None
        with self._engine.call() as api:
            return CgroupCounters.find(self.id, api.inspect_container(self.id)["State"]["Pid"])

    def counters(self) -> Counters:
        if self._counted is not None and (counted := self._counted.read()) is not None:
            return counted
        oom, pids = self._ask(COUNT).split()
        return Counters(int(oom), int(pids))

    def fate(self) -> Fate:
        try:
            with self._engine.call() as api:
                state = api.inspect_container(self.id)["State"]
        except ContainerGone:
            return Fate(running=False, oom=False)
        return Fate(bool(state["Running"]), bool(state["OOMKilled"]))

    def destroy(self) -> None:
        with self._destroying:
            if self._destroyed:
                return
            if hasattr(self, "_control"):
                self._control.close()
            try:
                with self._engine.call() as api:
                    api.remove_container(self.id, force=True, v=True)
            except ContainerGone as error:
                if "in progress" in str(error):
                    raise EngineDown(str(error)) from error  # being removed by somebody else: ask again later
            self._destroyed = True


class DockerHost:
    """Makes containers on one engine, all of them labelled with their owner."""

    def __init__(self, engine: Engine, config: ContainersConfig, breaker: Breaker, *, capacity: int, run: str):
        self.engine, self.config, self.breaker = engine, config, breaker
        self.name, self.capacity, self.starts = engine.name, capacity, config.starts
        self.has_gpus = engine.is_local
        self._labels = {OWNER_LABEL: Owner.me().label(), RUN_LABEL: run}
        self._shells: dict[str, tuple[str, str]] = {}  # by image as asked for: image of the engine, shell in it
        self._preparing = threading.Lock()

    def prepare(self, image: str) -> None:
        with self._preparing:
            found = ensure_image(self.engine, image)
            labels = self.engine.image_labels(found)
            self._shells[image] = (found, (labels or {}).get(SHELL_LABEL, PLAIN_SHELL))

    def start(self, spec: Spec) -> DockerCell:
        if spec.image not in self._shells:
            self.prepare(spec.image)
        return DockerCell(self, spec, self._shells[spec.image][1])

    def create(self, api: Any, spec: Spec, shell: str) -> dict[str, Any]:
        """Ask the engine for a container."""
        visible = ",".join(spec.gpus) if spec.gpus else "void"  # an image's own NVIDIA_VISIBLE_DEVICES=all would show every GPU
        return api.create_container(
            self._shells[spec.image][0],
            [shell],
            entrypoint=[],
            user=self.config.user,
            working_dir=HOME,
            environment={**ENVIRONMENT, "NVIDIA_VISIBLE_DEVICES": visible},
            labels=self._labels,
            stdin_open=True,
            tty=False,
            network_disabled=self.config.network == "none",
            host_config=api.create_host_config(**self._host_config(spec)),
        )

    def _host_config(self, spec: Spec) -> dict[str, Any]:
        limits, config = spec.limits, self.config
        user, group = config.user.split(":")
        mine = f"rw,exec,nosuid,nodev,uid={user},gid={group}"
        made: dict[str, Any] = {
            "network_mode": config.network,
            "read_only": config.read_only,
            "cap_drop": ["ALL"],
            "cap_add": config.capabilities,
            "security_opt": ["no-new-privileges"],
            "mem_limit": limits.memory_mib * MIB,
            "memswap_limit": limits.memory_mib * MIB,
            "nano_cpus": int(limits.cpus * 1e9),
            "pids_limit": limits.pids,
            "shm_size": limits.shm_mib * MIB,
            "ulimits": _ulimits(limits),
            "tmpfs": {
                HOME: f"{mine},mode=0700,size={limits.home_mib}m",
                "/tmp": f"{mine},mode=1777,size={limits.tmp_mib}m",
                DATA: f"rw,exec,nosuid,nodev,mode=0755,size={limits.data_mib}m",
            },
            "log_config": {"Type": "none"},  # what the first process prints would fill the host's disk
            "ipc_mode": "private",
        }
        if spec.gpus:
            made["device_requests"] = [{"DeviceIDs": list(spec.gpus), "Capabilities": [["gpu"]]}]
        return made

    def remove_orphans(self) -> int:
        removed = 0
        with self.engine.call() as api:
            found = api.containers(all=True, filters={"label": OWNER_LABEL})
        for container in found:
            owner = Owner.parse(container["Labels"].get(OWNER_LABEL, ""))
            if owner is None or not owner.is_dead():
                continue
            try:
                with self.engine.call() as api:
                    api.remove_container(container["Id"], force=True, v=True)
                removed += 1
            except ContainerGone:  # another new run was faster
                continue
            except ContainerError as error:
                log.warning("containers: orphan %s stays: %s", container["Id"][:12], error)
        return removed

    def close(self) -> None:
        self.engine.close()


def _ulimits(limits: LimitsConfig) -> list[dict[str, Any]]:
    return [{"Name": "nofile", "Soft": limits.open_files, "Hard": limits.open_files}, {"Name": "core", "Soft": 0, "Hard": 0}]
