"""Images from recipes, with what tasks need."""

import tarfile
from typing import Any

import pytest

from turnwise.containers import Box, Ending, Pool
from turnwise.containers.recipes import archive, recipes


@pytest.fixture(scope="module")
def python(pool: Pool) -> Any:
    with pool.lease("python") as box:
        yield box


def test_python_runs_with_its_standard_library(python: Box):
    code = "import json, sqlite3, ssl, decimal, multiprocessing, unittest; print(json.dumps({'a': 1}))"
    assert python.run(f'python -c "{code}"').output == '{"a": 1}\n'
    assert python.run("for name in bash awk sed grep find tar ps; do command -v $name || exit 1; done").ending is Ending.OK


def test_its_modules_are_compiled(python: Box):
    assert python.run("python -c 'import unittest; print(unittest.__cached__)' | xargs ls").ending is Ending.OK


def test_errors_stand_where_they_were_written(python: Box):
    script = "import sys; print(1); print(2, file=sys.stderr); print(3); sys.exit('end')"
    result = python.run(f'python -c "{script}"')
    assert (result.output, result.exit_code, result.ending) == ("1\n2\n3\nend\n", 1, Ending.FAILED)


def test_a_syntax_check_changes_nothing(python: Box):
    assert python.run("bash -n <<< 'if then'").ending is Ending.FAILED
    assert python.run("cd /tmp && x=1").ending is Ending.OK
    assert python.run('echo "$PWD $x"').output == "/tmp 1\n"


def test_memory_of_many_processes_is_counted_together(python: Box):
    hog = "x = bytearray(100 * 2**20); import time; time.sleep(5)"
    result = python.run(f"for i in 1 2 3; do python -c '{hog}' & p=\"$p $!\"; done; for i in $p; do wait $i || exit 1; done")
    assert result.ending is Ending.OOM


def test_one_second_of_work_takes_longer_than_half_a_processor_allows(pool: Pool, python: Box):
    burn = "python -c 'import time; s = time.monotonic()\nwhile time.process_time() < 0.5: pass\nprint(time.monotonic() - s)'"
    limits = python.spec.limits.model_copy(update={"cpus": 0.25})
    with pool.lease("python", limits=limits) as slow:
        assert float(slow.run(burn).output) > 1.2


def test_every_command_of_busybox_has_a_name(box: Box):
    box.put({"run.sh": "#!/bin/sh\necho ran\n"})
    assert box.run("chmod +x run.sh && ./run.sh").output == "ran\n"
    assert box.run("env ls /bin/awk").ending is Ending.OK


def test_an_archive_is_made_once():
    first = archive("busybox")
    made = first.stat().st_mtime_ns
    assert archive("busybox").stat().st_mtime_ns == made
    with tarfile.open(first) as tar:
        shell = tar.getmember(recipes()["busybox"].shell_path.lstrip("/"))
    assert oct(shell.mode) == "0o111"
