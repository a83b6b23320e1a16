"""Data for the tests of environments."""

import os
import shutil
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
FIXTURES = CHECKOUT / "tests" / "fixtures"


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a few self-written problems; TURNWISE_DATA names it."""
    folder = tmp_path / "data"
    (folder / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(FIXTURES / f"gsm8k_{split}.jsonl", folder / "gsm8k" / f"{split}.jsonl")
    monkeypatch.setenv("TURNWISE_DATA", str(folder))
    return folder


@pytest.fixture
def data_dir(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real data where it is at hand, the self-written problems elsewhere; TURNWISE_DATA names it."""
    for folder in (BEFORE_TESTS, CHECKOUT.parent / "shared" / "data"):
        if folder is not None and (folder / "gsm8k" / "train.jsonl").is_file():
            monkeypatch.setenv("TURNWISE_DATA", str(folder))
            return folder
    return small_data


BEFORE_TESTS = Path(os.environ["TURNWISE_DATA"]) if os.environ.get("TURNWISE_DATA") else None
