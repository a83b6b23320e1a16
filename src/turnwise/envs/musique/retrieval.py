"""BM25 over paragraphs. An index is built once in a process, whatever number of environments and threads ask for it."""

import importlib
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

import numpy as np

MAX_QUERY_CHARACTERS = 500  # a question has 100; scoring takes time for each word
CACHED_INDICES = 512  # of one question each, about 0.1 MB: more questions than are ever in flight

_IMPORTING = threading.Lock()

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A title and a text; two paragraphs are the same when both are."""

    title: str
    text: str


class Corpus:
    """Paragraphs with their BM25 index (Lu 2024, arXiv 2407.03618, Lucene's variant, k1 = 1.5, b = 0.75).

    Nothing in it changes, so threads may search at the same time.
    """

    def __init__(self, paragraphs: Sequence[Paragraph]) -> None:
        """Index titles and texts, without English stop words; about 1 ms for 20 paragraphs."""
        self.paragraphs = tuple(paragraphs)
        self._by_title: dict[str, int] = {}
        self._positions: dict[Paragraph, int] = {}
        for position, paragraph in enumerate(self.paragraphs):
            self._by_title.setdefault(_folded(paragraph.title), position)
            self._positions.setdefault(paragraph, position)
        self._index = _index([f"{paragraph.title} {paragraph.text}" for paragraph in self.paragraphs])

    def search(self, query: str, k: int) -> list[int]:
        """Positions of the best `k` paragraphs that share a word with the query, best first, equals in their order."""
        words = _words(query[:MAX_QUERY_CHARACTERS])
        if self._index is None or not words or k < 1:
            return []
        scores: np.ndarray = self._index.get_scores(words)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:  # sort only what reaches the k-th score: with a large corpus nearly every paragraph has some word
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        return found[np.argsort(-scores[found], kind="stable")][:k].tolist()

    def by_title(self, title: str) -> int | None:
        """Position of the first paragraph of that title, whatever its case and spacing."""
        return self._by_title.get(_folded(title))

    def position(self, paragraph: Paragraph) -> int | None:
        """Position of a paragraph of that title and text."""
        return self._positions.get(paragraph)

    @property
    def titles(self) -> list[str]:
        return [paragraph.title for paragraph in self.paragraphs]


class OnceCache(Generic[Value]):
    """Values by key, each made once even when many threads ask at the same time; the least recently used are dropped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`; `make()` makes it unless it is there or another thread is at it. What it raises is not kept."""
        with self._lock:
            future = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
            self._made.move_to_end(key)
            while len(self._made) > self.size:
                self._made.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._made.pop(key, None)
                future.set_exception(error)
        return future.result()


QUESTIONS: OnceCache[Corpus] = OnceCache(CACHED_INDICES)


def question_corpus(paragraphs: tuple[Paragraph, ...]) -> Corpus:
    """The index over one question's paragraphs, shared by all who ask for the same ones."""
    return QUESTIONS.get(paragraphs, lambda: Corpus(paragraphs))


@cache
def _bm25s() -> Any:
    """The library, imported late, since most environments do without, and without JAX.

    Where JAX is installed bm25s runs an operation with it on import, and JAX takes three quarters of a GPU's memory for itself:
    an engine that starts a moment later finds none. Nothing here uses that path.
    """
    with _IMPORTING:
        if "bm25s" not in sys.modules:
            loaded = sys.modules.get("jax")
            sys.modules["jax"] = cast(ModuleType, None)  # `import jax` is an ImportError then
            try:
                importlib.import_module("bm25s")
            finally:
                del sys.modules["jax"]
                if loaded is not None:
                    sys.modules["jax"] = loaded
        return sys.modules["bm25s"]


def _words(text: str) -> list[str]:
    words = _bm25s().tokenize([text], stopwords="english", return_ids=False, show_progress=False)
    return cast(list[list[str]], words)[0]


def _index(texts: list[str]) -> Any:
    """The BM25 index, or None where no text has a word."""
    bm25s = _bm25s()
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index
    tokens = bm25s.tokenize(texts, stopwords="english", show_progress=False)
    if not tokens.vocab:
        return None
    index = bm25s.BM25(method="lucene", backend="numpy")
    index.index(tokens, show_progress=False)
    return index


def _folded(title: str) -> str:
    return " ".join(title.casefold().split())
