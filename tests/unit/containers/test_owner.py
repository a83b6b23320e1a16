"""Orphans: only what certainly belongs to a dead process."""

import dataclasses
import subprocess

import pytest

from turnwise.containers.owner import Owner, start_time


def test_this_process_lives_and_its_label_says_who_it_is():
    me = Owner.me()
    assert not me.is_dead()
    assert Owner.parse(me.label()) == me


def test_a_process_that_ended_is_dead_and_so_is_one_whose_number_was_used_again():
    process = subprocess.Popen(["true"])
    started = start_time(process.pid)
    process.wait()
    me = Owner.me()
    assert dataclasses.replace(me, pid=process.pid, started=started or 0).is_dead()
    assert dataclasses.replace(me, started=me.started - 1).is_dead()


def test_remains_of_a_process_are_no_process():
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()  # it has ended, and nobody has asked how
    while start_time(process.pid) is not None:
        pass
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("field", ["boot", "namespace"])
def test_a_process_of_another_machine_or_namespace_is_never_declared_dead(field: str):
    elsewhere = dataclasses.replace(Owner.me(), pid=2**22 + 1, **{field: "another"})
    assert not elsewhere.is_dead()
    assert dataclasses.replace(Owner.me(), pid=2**22 + 1).is_dead()


@pytest.mark.parametrize(
    "label", ["", "7", "null", "{}", '{"boot": 1}', '{"boot": "", "namespace": "", "pid": "x", "started": 1}']
)
def test_other_labels_are_nobody_of_ours(label: str):
    assert Owner.parse(label) is None
