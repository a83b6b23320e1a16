"""Archives: what goes in comes out, and what is hostile does not."""

import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.containers import TransferRefused
from turnwise.containers.archive import pack, unpack

NAME = st.text(st.characters(categories=["L", "N"], include_characters="-_ ."), min_size=1, max_size=8).filter(
    lambda name: name.strip(".") != ""
)


def packed(files: dict[str, bytes | str | Path]) -> bytes:
    with pack(files) as file:
        file.seek(0)
        return file.read()


def made(*entries: tarfile.TarInfo, body: bytes = b"") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for entry in entries:
            archive.addfile(entry, io.BytesIO(body) if entry.isreg() else None)
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def out(data: bytes, max_bytes: int = 1000, max_files: int = 10) -> dict[str, bytes]:
    return unpack(data, max_bytes=max_bytes, max_files=max_files)


@given(st.dictionaries(NAME, st.binary(max_size=80), max_size=5))
@settings(deadline=None)
def test_files_come_out_as_they_went_in(files: dict[str, bytes]):
    assert out(packed(dict(files))) == files


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_any_bytes_are_files_or_are_refused(data: bytes):
    with suppress(TransferRefused):
        assert isinstance(out(data), dict)


@given(st.integers(0, 1535), st.binary(min_size=1, max_size=30))
@settings(deadline=None)
def test_an_archive_with_damage_is_files_or_is_refused(where: int, damage: bytes):
    data = bytearray(packed({"a": b"x" * 100, "b": b"y"}))
    data[where : where + len(damage)] = damage
    with suppress(TransferRefused):
        assert all(len(body) <= 1000 for body in out(bytes(data)).values())


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (entry("a", tarfile.SYMTYPE, "/etc/passwd"), "a link to '/etc/passwd'"),
        (entry("a", tarfile.LNKTYPE, "b"), "a link to 'b'"),
        (entry("a", tarfile.FIFOTYPE), "a pipe"),
        (entry("a", tarfile.CHRTYPE), "a device"),
        (entry("a", tarfile.BLKTYPE), "a device"),
        (entry("../a"), "leads out"),
        (entry("/a"), "leads out"),
        (entry("b/../../a"), "leads out"),
    ],
)
def test_links_devices_and_paths_that_lead_out_are_refused(hostile: tarfile.TarInfo, words: str):
    with pytest.raises(TransferRefused, match=words):
        out(made(hostile))


def test_sizes_are_believed_only_within_the_limit():
    with pytest.raises(TransferRefused, match="more than 1000 bytes"):
        out(made(entry("a", size=1001), body=b"x" * 1001))
    assert len(out(made(entry("a", size=1000), body=b"x" * 1000))["a"]) == 1000
    with pytest.raises(TransferRefused):  # says a terabyte, has nothing
        out(entry("a", size=2**40).tobuf(tarfile.GNU_FORMAT), max_bytes=2**50)


def test_too_many_entries_are_refused_even_when_they_are_empty():
    with pytest.raises(TransferRefused, match="more than 10 entries"):
        out(made(*(entry(f"d{n}", tarfile.DIRTYPE) for n in range(11))))


def test_a_file_that_is_cut_short_is_refused():
    with pytest.raises(TransferRefused):
        out(made(entry("a", size=800), body=b"x" * 800)[:700])


@pytest.mark.parametrize("name", ["/a", "../a", "a/../b", "", "a\0b"])
def test_names_that_lead_out_do_not_go_in(name: str):
    with pytest.raises(ValueError, match="path inside"):
        packed({name: b""})


def test_links_in_folders_of_this_machine_are_left_behind(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("x")
    (tmp_path / "d/secret").symlink_to("/etc/hostname")
    assert out(packed({"got": tmp_path})) == {"got/d/x": b"x"}
