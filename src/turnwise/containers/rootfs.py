"""The files of an image, from Debian packages: fetched by apt, put together here, without root and without installing.

apt works on folders of its own, with an empty list of installed packages, so that it fetches a recipe's whole closure and leaves
the machine as it is. Maintainer scripts do not run; what they would have linked is in the recipe.
"""

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from turnwise.containers.errors import RecipeFailed

Tell = Callable[[str], None]

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # links into /usr, as on every current Debian
LEFT_OUT = ("usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/lintian/", "usr/share/bug/")
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    "etc/group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
SHELL_FOLDER = "usr/lib/turnwise"
SHELL_MODE = 0o111  # runs and cannot be read: the kernel then lets nobody of the same user trace it or open its files under /proc
UPDATE_S, DOWNLOAD_S, UNPACK_S = 300, 1200, 120


def download(packages: tuple[str, ...], folder: Path, tell: Tell) -> list[Path]:
    """Fetch packages and all that they depend on into a folder, with apt. Raises RecipeFailed."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    (folder / "status").touch()
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "APT::Keep-Downloaded-Packages": "true",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "-qq", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    tell("asking apt for the list of packages")
    _run([*apt, "update"], UPDATE_S)
    tell(f"downloading {', '.join(packages)} and what they need")
    _run([*apt, "-y", "--no-install-recommends", "--download-only", "install", *packages], DOWNLOAD_S)
    return sorted((folder / "cache/archives").glob("*.deb"))


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise RecipeFailed(
            f"{command[0]} is not on this machine, and recipes are made from Debian packages; "
            "name an image that the engine has, or make it on a Debian or Ubuntu machine"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RecipeFailed(f"{' '.join(command[-3:])} was not done after {timeout_s:g} s") from error
    if done.returncode:
        raise RecipeFailed(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-1000:]}")


class Rootfs:
    """An archive of a root file system in the making; a path is taken once, the first one stays."""

    def __init__(self, output: IO[bytes]):
        self._tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.PAX_FORMAT)
        self._seen: set[str] = set()
        for name in MERGED:
            self.folder(f"usr/{name}")
            self.link(name, f"usr/{name}")
        self.folder("tmp", 0o1777)
        for name in ("proc", "sys", "dev", "data", "root", "home/agent"):
            self.folder(name)
        for name, text in ACCOUNTS.items():
            self.file(name, text.encode())

    def _new(self, name: str) -> bool:
        if name in self._seen:
            return False
        self._seen.add(name)
        return True

    def folder(self, name: str, mode: int = 0o755) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        if self._new(name):
            self._tar.addfile(entry)

    def link(self, name: str, target: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
        if self._new(name):
            self._tar.addfile(entry)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), mode
        if self._new(name):
            self._tar.addfile(entry, io.BytesIO(data))

    def package(self, path: Path) -> None:
        """Add the files of a Debian package."""
        with tempfile.TemporaryFile() as unpacked:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=unpacked, check=True, timeout=UNPACK_S)
            unpacked.seek(0)
            with tarfile.open(fileobj=unpacked, mode="r:") as package:
                for entry in _placed(package):
                    if self._new(entry.name):
                        self._tar.addfile(entry, package.extractfile(entry) if entry.isreg() else None)

    def close(self) -> None:
        self._tar.close()


def _placed(package: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Entries with names as in the image, without documentation."""
    for entry in package:
        name = _merged(entry.name)
        if not name or name.startswith(LEFT_OUT):
            continue
        entry.name = name
        if entry.islnk():
            entry.linkname = _merged(entry.linkname)
        entry.mode &= 0o1777  # nothing runs as another user than who starts it
        entry.uname = entry.gname = ""
        yield entry


def _merged(name: str) -> str:
    name = os.path.normpath(name).lstrip("./")
    return f"usr/{name}" if name.split("/")[0] in MERGED else name


def build(
    packages: tuple[str, ...],
    shell: str,
    shell_name: str,
    applets: str | None,
    links: Mapping[str, str],
    output: Path,
    tell: Tell,
) -> None:
    """Write the archive of an image. Raises RecipeFailed.

    Args:
        packages: Debian packages.
        shell: path of the shell in the image, which is copied to `SHELL_FOLDER/shell_name`, where nobody can read it.
        applets: path of a busybox in the image, whose applets become links.
        links: target by path; `{triplet}` in either stands for the machine's library folder.
        output: where it appears, whole or not at all.
        tell: is told what happens.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rootfs-", dir=output.parent) as scratch:
        debs = download(packages, Path(scratch) / "apt", tell)
        part = Path(scratch) / "rootfs.tar"
        with part.open("wb") as file:
            rootfs = Rootfs(file)
            for number, deb in enumerate(debs, 1):
                tell(f"unpacking {number} of {len(debs)}: {deb.name.split('_')[0]}")
                rootfs.package(deb)
            triplet = _output(["dpkg-architecture", "-qDEB_HOST_MULTIARCH"]) or f"{os.uname().machine}-linux-gnu"
            for name, target in links.items():
                rootfs.link(name.format(triplet=triplet), target.format(triplet=triplet))
            binary = _extract(part, file, _merged(shell), Path(scratch))
            for applet in _output([str(binary), "--list"]).split() if applets else ():
                rootfs.link(f"usr/bin/{applet}", f"/{applets}")
            rootfs.file(f"{SHELL_FOLDER}/{shell_name}", binary.read_bytes(), SHELL_MODE)
            rootfs.close()
        os.replace(part, output)


def _extract(archive: Path, written: IO[bytes], name: str, folder: Path) -> Path:
    """One executable out of an archive that is still being written."""
    written.flush()
    with tarfile.open(archive, mode="r:", ignore_zeros=True) as tar:
        source = tar.extractfile(name)
        if source is None:
            raise RecipeFailed(f"the packages have no {name}")
        path = folder / Path(name).name  # busybox goes by its name
        path.write_bytes(source.read())
        path.chmod(0o755)
        return path


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
