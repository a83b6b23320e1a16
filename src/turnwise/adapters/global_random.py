"""Own randomness for code that draws from the process's global generators, while other episodes run on other threads."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock

import numpy as np

WAIT_S = 60.0  # far longer than a move of a game; whoever holds the generators that long hangs

_generators = Lock()


class OwnRandomness:
    """The state of one episode's `random` and `numpy.random`, put in place while its code runs, and only then."""

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % (1 << 32)).get_state()

    @contextmanager
    def __call__(self, *, keep: bool = True) -> Generator[None]:
        """Run code on this state. One at a time in a process, since the generators are the process's.

        Args:
            keep: go on from where the code left the state; otherwise a trial, after which it is as before.

        Raises:
            TimeoutError: when another episode has held the generators for `WAIT_S` seconds.
        """
        if not _generators.acquire(timeout=WAIT_S):
            raise TimeoutError(f"another episode has held the global random generators for {WAIT_S:.0f} s; its game hangs")
        others = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            if keep:
                self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(others[0])
            np.random.set_state(others[1])
            _generators.release()
