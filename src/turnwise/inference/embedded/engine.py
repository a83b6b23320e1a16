"""The batcher: one worker thread that admits requests between steps, advances all of them together, and answers each."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import TypeVar

import torch

from turnwise.inference.embedded.decoder import Decoder
from turnwise.inference.embedded.sampling import sample, uniform
from turnwise.inference.embedded.sequence import FinishReason, Sequence

log = logging.getLogger(__name__)
T = TypeVar("T")
PREFILL_TOKENS = 512  # prompt tokens that join one step, about half a second of a core for the 135M model; one prompt always may


class Mode(StrEnum):
    """Whether requests advance."""

    RUNNING = "running"
    DRAINING = "draining"  # running ones go on, waiting ones stay
    FROZEN = "frozen"


class Engine:
    """Owns the decoder: every call of it happens in this thread. The public methods may be called from any thread."""

    def __init__(self, decoder: Decoder, *, max_batch_size: int) -> None:
        self.decoder = decoder
        self.max_batch_size = max_batch_size
        self.generated = 0  # tokens sampled so far
        self.prompted = 0  # prompt tokens computed so far
        self.asked = 0  # prompt tokens of requests so far, those that the prefix cache had among them
        self.mode = Mode.RUNNING
        self._waiting: deque[Sequence] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._drained: list[Future[None]] = []
        self._users: dict[str, int] = {}  # requests waiting or running, by adapter
        self._released: dict[str, list[Future[None]]] = {}  # who waits for an adapter's last request
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort what runs and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self.decoder.rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request; its `on_done` is called in the worker thread."""
        with self._wake:
            if sequence.adapter is not None:
                self._users[sequence.adapter] = self._users.get(sequence.adapter, 0) + 1
            self._waiting.append(sequence)
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Give up a request whose client has gone."""
        sequence.cancelled = True
        self.call(self._sweep)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` in the worker thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            self._calls.append(run)
            self._wake.notify()
        return future

    def pause(self, mode: str) -> "Future[None]":
        """`abort`: running and waiting requests are answered in part; `wait`: running ones end first; `keep`: they freeze."""
        done: Future[None] = Future()

        def enter() -> None:
            if mode == "wait" and self.decoder.rows:
                self.mode = Mode.DRAINING
                self._drained.append(done)
                return
            self.mode = Mode.FROZEN
            if mode == "abort":
                self._end_all("abort")
            done.set_result(None)

        self.call(enter)
        return done

    def resume(self) -> "Future[None]":
        def leave() -> None:
            self.mode = Mode.RUNNING
            self._settle_drained()

        return self.call(leave)

    def when_unused(self, adapter: str) -> "Future[None]":
        """Resolved once no waiting or running request uses the adapter."""
        done: Future[None] = Future()
        with self._wake:
            if self._users.get(adapter, 0) == 0:
                done.set_result(None)
            else:
                self._released.setdefault(adapter, []).append(done)
        return done

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(self._has_work)
                    calls = list(self._calls)
                    self._calls.clear()
                for call in calls:
                    call()
                if self._stopping:
                    self._end_all("abort")
                    return
                if self.mode is Mode.RUNNING:
                    self._admit()
                if self.mode is not Mode.FROZEN and self.decoder.rows:
                    self._step()

    def _has_work(self) -> bool:
        advancing = self.mode is not Mode.FROZEN and len(self.decoder.rows) > 0
        return self._stopping or bool(self._calls) or advancing or (self.mode is Mode.RUNNING and bool(self._waiting))

    def _admit(self) -> None:
        budget = PREFILL_TOKENS
        while budget > 0 and self._waiting and len(self.decoder.rows) < self.max_batch_size:
            sequence = self._waiting.popleft()
            try:
                cost = self.decoder.admit(sequence)
            except Exception as error:  # no memory for its keys and values: this request fails, the others go on
                log.exception("a request of %d tokens could not be admitted", len(sequence.prompt))
                sequence.error = f"{type(error).__name__}: {error}"
                self._finish(sequence, "error")
                continue
            self.prompted += cost
            self.asked += len(sequence.prompt)
            budget -= cost

    def _step(self) -> None:
        try:
            sequences, logits = self.decoder.step()
            tokens, logprobs = sample(
                logits,
                [s.temperature for s in sequences],
                [uniform(s.seed, len(s.logprobs)) for s in sequences],
            )
        except Exception as error:  # out of memory, a broken adapter: these requests fail, the engine goes on
            log.exception("a step of %d sequences failed", len(self.decoder.rows))
            self._end_running("error", f"{type(error).__name__}: {error}")
            return
        self.generated += len(sequences)
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            sequence.append(token, logprob)
        broken = [sequence.adapter for sequence in sequences if sequence.finish_reason == "error"]
        if broken:
            log.error("the logits of %d of %d sequences are not finite, adapter %s", len(broken), len(sequences), broken[0])
        for sequence in sequences:
            if sequence.finish_reason is not None:
                self.decoder.release(sequence)
                self._answer(sequence)
        self._settle_drained()

    def _sweep(self) -> None:
        for sequence in [s for s in self.decoder.rows if s.cancelled]:
            self.decoder.release(sequence)
            self._finish(sequence, "abort")
        for sequence in [s for s in self._waiting if s.cancelled]:
            self._waiting.remove(sequence)
            self._finish(sequence, "abort")
        self._settle_drained()

    def _end_all(self, reason: FinishReason) -> None:
        self._end_running(reason, "")
        while self._waiting:
            self._finish(self._waiting.popleft(), reason)
        self._settle_drained()

    def _end_running(self, reason: FinishReason, error: str) -> None:
        for sequence in list(self.decoder.rows):
            self.decoder.release(sequence)
            sequence.error = error
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._answer(sequence)

    def _answer(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            with self._wake:
                self._users[sequence.adapter] -= 1
                waiting = self._released.pop(sequence.adapter, []) if self._users[sequence.adapter] == 0 else []
            for future in waiting:
                future.set_result(None)
        sequence.on_done(sequence)

    def _settle_drained(self) -> None:
        if self._drained and (self.mode is Mode.RUNNING or not self.decoder.rows):
            if self.mode is Mode.DRAINING:
                self.mode = Mode.FROZEN
            for future in self._drained:
                future.set_result(None)
            self._drained.clear()
