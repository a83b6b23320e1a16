"""The parts of the `wandb` package that a tracker uses, kept in memory, with faults to plant."""

import contextlib
import io
from collections.abc import Generator
from typing import Any


class FakeTable:
    def __init__(self, *, columns: list[str], log_mode: str) -> None:
        self.columns, self.log_mode = columns, log_mode
        self.data: list[Any] = []

    def add_data(self, *row: Any) -> None:
        assert len(row) == len(self.columns)
        self.data.append(list(row))


class FakeArtifact:
    def __init__(self, name: str, *, type: str, metadata: dict[str, Any] | None = None) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.folders: list[str] = []
        self.files: dict[str, str] = {}

    def add_dir(self, path: str, *, skip_cache: bool) -> None:
        self.folders.append(path)

    def add_file(self, path: str, *, name: str, skip_cache: bool) -> None:
        self.files[name] = path

    @contextlib.contextmanager
    def new_file(self, name: str, *, encoding: str) -> Generator[io.StringIO]:
        file = io.StringIO()
        yield file
        self.files[name] = file.getvalue()


class FakeRun:
    url = "https://wandb.example/run"

    def __init__(self, id: str, faults: set[str], keep: bool) -> None:
        self.id, self.faults, self.keep = id, faults, keep
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.table_rows: list[int] = []
        self.axes: dict[str, str | None] = {}
        self.artifacts: list[tuple[FakeArtifact, list[str]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], *, step: int, commit: bool) -> None:
        if "log" in self.faults:
            raise ConnectionError("network is down")
        if self.keep:
            self.logged.append((step, values))

    def log_artifact(self, artifact: FakeArtifact, *, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb:
    """Stands for the module.

    Args:
        faults: "online" and "offline" (init fails so), "log".
        keep: remember what is logged.
    """

    Table, Artifact = FakeTable, FakeArtifact

    class Settings:
        def __init__(self, **options: object) -> None: ...

    class api:
        api_key: str | None = "secret-key"

    class Image:
        def __init__(self, path: str) -> None:
            self.path = path

    def __init__(self, *faults: str, keep: bool = True) -> None:
        self.faults, self.keep = set(faults), keep
        self.modes: list[str] = []
        self.options: dict[str, Any] = {}
        self.runs: list[FakeRun] = []

    def init(self, *, mode: str, **options: Any) -> FakeRun:
        self.modes.append(mode)
        self.options = options
        if mode in self.faults:
            raise TimeoutError("no route to host with key planted-secret-value")
        self.runs.append(FakeRun(options["id"], self.faults, self.keep))
        return self.runs[-1]
