"""Scoring a submission in a container of its own: labels and evaluator never meet the agent's."""

import fnmatch
import posixpath
import shlex

from turnwise.containers import HOME, Box, Ending, Pool
from turnwise.envs.mlgym.task import Files, Half, Submission, Task, Verdict, scores_in

WORKSPACE = f"{HOME}/workspace"
DATA_FOLDER = "data"  # in the workspace
SUBMISSION_CSV = "submission.csv"
MAX_SUBMISSION = 32 << 20  # bytes
SAID = 600  # characters of an evaluator's own words that are told


def take_submission(box: Box, task: Task) -> Files | None:
    """The submission in an agent's container, by path in the workspace; None when there is none.

    Raises:
        TransferRefused: it is too large, or no regular file.
        ContainerGone, EngineDown: as `Box.get`.
    """
    if task.submission is Submission.CSV:
        return _file(box, SUBMISSION_CSV)
    if task.submission is Submission.PYTHON:
        files = [_file(box, name) for name in task.workspace if name.endswith(".py")]
        present = [file for file in files if file is not None]
        return {name: content for file in present for name, content in file.items()} or None
    everything = _workspace(box)
    if task.submission is Submission.MODEL and not any(fnmatch.fnmatch(name, "*.yaml") for name in everything):
        return None
    return everything or None


def evaluate(pool: Pool, image: str, task: Task, half: Half, submission: Files) -> Verdict:
    """Score a submission on one half of what is hidden.

    A submission that is code and is scored by a checkout's own evaluator runs beside it, and could forge what it prints.

    Raises:
        ContainerGone, EngineDown, PoolBusy: the evaluation could not be made; that is no answer about the submission.
    """
    gpus = task.gpus if task.submission is Submission.LANGUAGE_MODEL else 0
    with pool.lease(image, gpus=gpus) as box:
        box.put({**task.workspace, **submission}, WORKSPACE)
        if task.judge is not None:
            return task.judge(box, half)
        box.put(task.data, f"{WORKSPACE}/{DATA_FOLDER}")
        box.put(task.secret.get(half, {}), WORKSPACE)  # last: nothing submitted stands in its place
        program = f"torchrun --nproc_per_node={gpus} --standalone" if gpus else "python3"
        line = f"cd {shlex.quote(WORKSPACE)} && {program} {shlex.quote(task.evaluator)} {_arguments(task, submission)}"
        done = box.run(line, timeout_s=task.time_limit_s)
    if done.ending is Ending.TIMEOUT:
        return Verdict(None, words=f"the evaluation took longer than {task.time_limit_s:g} s")
    scores = scores_in(done.output) if done.ending is Ending.OK else None
    if scores is None or task.score(scores) is None:
        why = "its evaluation printed no score" if done.ending is Ending.OK else f"its evaluation ended with {done.ending}"
        return Verdict(None, words=f"{why}: {done.output.strip()[-SAID:] or 'it said nothing'}")
    return Verdict(scores)


def _arguments(task: Task, submission: Files) -> str:
    if task.submission is Submission.CSV:
        return f"--submission_file {SUBMISSION_CSV}"
    if task.submission is Submission.MODEL:
        first = sorted(name for name in submission if fnmatch.fnmatch(name, "*.yaml"))[0]
        return f"--config_fname {shlex.quote(first)}"
    return ""


def _file(box: Box, name: str) -> Files | None:
    path = posixpath.join(WORKSPACE, name)
    if box.run(f"test -e {shlex.quote(path)} -o -L {shlex.quote(path)}").ending is not Ending.OK:
        return None
    return {name: box.read(path, max_bytes=MAX_SUBMISSION)}


def _workspace(box: Box) -> Files:
    """All regular files of the workspace but for its data."""
    prefix = f"{posixpath.basename(WORKSPACE)}/"
    files = box.get(WORKSPACE, max_bytes=MAX_SUBMISSION)
    own = {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}
    return {name: content for name, content in own.items() if not name.startswith(f"{DATA_FOLDER}/")}
