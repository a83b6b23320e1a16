"""Recipes, and root file systems made of packages."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest

from turnwise.containers import RecipeFailed, rootfs
from turnwise.containers.recipes import Recipe, recipes


def test_every_recipe_is_read_and_says_where_its_shell_is():
    assert {"busybox", "python", "python-science"} <= set(recipes())
    assert recipes()["busybox"].shell_path == "/usr/lib/turnwise/sh"
    assert recipes()["python"].shell_path == "/usr/lib/turnwise/bash"


def test_a_recipe_has_what_the_one_that_it_extends_has():
    base, science = recipes()["python"], recipes()["python-science"]
    assert set(base.packages) < set(science.packages)
    assert base.links.items() < science.links.items()
    assert (science.shell, science.setup) == (base.shell, base.setup)


def test_the_hash_follows_everything_that_decides_the_image():
    base = Recipe(("a",), "bin/sh")
    others = [
        msgspec.structs.replace(base, **change)
        for change in ({"packages": ("b",)}, {"shell": "bin/x"}, {"links": {"a": "b"}}, {"setup": "true"}, {"applets": "x"})
    ]
    assert len({recipe.hash for recipe in [base, *others]}) == 6
    assert Recipe(("a",), "bin/sh").hash == base.hash


def debian_package(folder: Path) -> Path:
    """A package with the layout of old, documentation, a link and a file with the set-uid bit."""
    tree = folder / "tree"
    for name in ("bin", "usr/share/doc/x", "DEBIAN"):
        (tree / name).mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: x\n")
    (tree / "bin/tool").write_text("#!/bin/sh\n")
    (tree / "bin/tool").chmod(0o4755)
    (tree / "bin/alias").symlink_to("tool")
    (tree / "usr/share/doc/x/README").write_text("words")
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(folder / "x.deb")], check=True, capture_output=True
    )
    return folder / "x.deb"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="recipes are made on Debian and Ubuntu")
def test_files_of_packages_lie_below_usr_without_documentation_or_set_uid(tmp_path: Path):
    out = io.BytesIO()
    made = rootfs.Rootfs(out)
    made.package(debian_package(tmp_path))
    made.file("bin/tool", b"late")
    made.close()
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        entries = {entry.name: entry for entry in archive}
        assert (entries["bin"].linkname, entries["usr/bin/alias"].linkname) == ("usr/bin", "tool")
        assert oct(entries["usr/bin/tool"].mode) == "0o755"
        assert not any("README" in name for name in entries)
        assert b"agent:x:1000" in archive.extractfile("etc/passwd").read()
        names = archive.getnames()
    assert len(names) == len(set(names))


def test_without_apt_the_error_says_what_else_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeFailed, match="name an image that the engine has"):
        rootfs.download(("x",), tmp_path, lambda said: None)
