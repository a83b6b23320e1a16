"""Files in and out, with a read-only root and mounts in memory."""

import os
from pathlib import Path

import pytest

from turnwise.containers import DATA, Box, Ending, TransferRefused


def test_files_and_folders_of_this_machine_go_in_and_come_out_unchanged(box: Box, tmp_path: Path):
    noise = os.urandom(3_000_000)
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tree/deep/run.sh").chmod(0o755)
    (tmp_path / "tree/passwd").symlink_to("/etc/passwd")
    box.put({"noise": noise, "a b/ü'\n.txt": "text", "tree": tmp_path / "tree"})
    assert box.read("/home/agent/noise") == noise
    assert box.get("/home/agent/a b") == {"a b/ü'\n.txt": b"text"}
    assert box.run("./tree/deep/run.sh; ls tree").output == "ran\ndeep\n"


def test_an_empty_put_and_a_new_folder(box: Box):
    box.put({}, "/tmp/new/deep")
    box.put({"-rf": b""}, "/tmp/new")
    assert box.get("/tmp/new") == {"new/-rf": b""}


def test_protected_files_are_read_and_not_changed(box: Box):
    box.put({"train.csv": "1,2"}, DATA, protected=True)
    assert box.run("cat /data/train.csv").output == "1,2"
    for attempt in (
        "echo x >/data/train.csv",
        "rm -f /data/train.csv",
        "mv /data/train.csv /tmp",
        "touch /data/x",
        "chmod 777 /data",
    ):
        assert box.run(attempt).ending is Ending.FAILED, attempt
    assert box.run("cat /data/train.csv").output == "1,2"
    with pytest.raises(ValueError, match="/data"):
        box.put({"x": ""}, "/home/agent", protected=True)


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        ("ln -s /etc/passwd submission.csv", "a link to '/etc/passwd'"),
        ("ln -s nowhere submission.csv", "a link"),
        ("mkfifo submission.csv", "a pipe"),
        ("mkdir submission.csv", "no regular file"),
        ("true", "there is no"),
        ("dd if=/dev/zero of=submission.csv bs=1M count=2 2>/dev/null", "bytes"),
        ("dd if=/dev/zero of=submission.csv bs=1M count=0 seek=100000000 2>/dev/null", "bytes"),
        ("mkdir d; ln -s ../../../../etc d/etc; mv d submission.csv", "a link"),
        ("echo x >submission.csv; chmod 0 submission.csv", "tar ended"),
    ],
)
def test_a_submission_that_plays_tricks_is_refused(box: Box, trick: str, words: str):
    box.run(trick)
    with pytest.raises(TransferRefused, match=words):
        box.read("/home/agent/submission.csv", max_bytes=2**20)
    assert box.run("echo fine").output == "fine\n"


def test_commands_of_the_task_do_not_stand_in_for_those_of_a_transfer(box: Box):
    box.run("tar() { echo planted; }; head() { echo planted; }; export PATH=/tmp; alias tar=echo")
    box.put({"f": "real"})
    assert box.read("/home/agent/f") == b"real"


def test_no_room_is_said_and_no_data_is_run_as_commands(box: Box):
    with pytest.raises(TransferRefused, match="did not get into"):
        box.put({"big": b"touch /tmp/pwned\n" * 6_000_000})
    assert box.run("ls /tmp/pwned").ending is Ending.FAILED


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ""])
def test_names_that_lead_out_are_refused_on_the_way_in(box: Box, name: str):
    with pytest.raises(ValueError, match="path inside"):
        box.put({name: b""})
