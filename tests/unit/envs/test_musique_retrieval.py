"""Search: order, bounds, and one index whatever number of threads asks."""

import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.musique_rows import bridge_row
from turnwise.envs.musique.data import Question
from turnwise.envs.musique.retrieval import Corpus, OnceCache, Paragraph, question_corpus

PARAGRAPHS = Question.of(bridge_row()).paragraphs
WORDS = ["olm", "river", "bridge", "norway", "sael", "harbour", "mill"]


def bm25(query: list[str], documents: list[list[str]]) -> list[float]:
    """Lucene's BM25 from its formula, k1 = 1.5, b = 0.75."""
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in query:
        holding = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for position, document in enumerate(documents):
            count = document.count(word)
            scores[position] += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean)) if count else 0.0
    return scores


@given(
    documents=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), min_size=1, max_size=8),
    query=st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=5),
    k=st.integers(0, 9),
)
@settings(deadline=None)
def test_search_ranks_as_the_formula_says_and_equals_keep_their_order(
    documents: list[list[str]], query: list[str], k: int
) -> None:
    found = Corpus([Paragraph("", " ".join(document)) for document in documents]).search(" ".join(query), k)
    scores = bm25(query, documents)
    matching = [position for position, score in enumerate(scores) if score > 0]
    assert len(found) == len(set(found)) == min(k, len(matching))
    assert set(found) <= set(matching)
    for better, worse in pairwise(found):
        assert scores[better] >= scores[worse] - 1e-5
        if documents[better] == documents[worse]:
            assert better < worse
    left_out = max((scores[position] for position in matching if position not in found), default=-1.0)
    assert all(scores[position] >= left_out - 1e-5 for position in found)


def test_titles_are_searched_too_and_stop_words_are_not() -> None:
    corpus = Corpus(PARAGRAPHS)
    assert corpus.search("Tolvar bridge architect", 2)[0] == 1
    assert corpus.search("the of in was", 5) == []
    assert corpus.search("zebra", 5) == corpus.search("", 5) == corpus.search("  \n", 5) == []


@pytest.mark.parametrize("texts", [[], [""], ["", "the"], ["?!"]])
def test_a_corpus_without_a_word_finds_nothing(texts: list[str]) -> None:
    corpus = Corpus([Paragraph("", text) for text in texts])
    assert corpus.search("river", 3) == []
    assert corpus.by_title("river") is None


def test_an_empty_paragraph_among_others_is_never_found() -> None:
    corpus = Corpus([Paragraph("", ""), Paragraph("", "river")])
    assert corpus.search("river", 3) == [1]


@given(query=st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_a_query(query: str) -> None:
    assert len(question_corpus(PARAGRAPHS).search(query, 3)) <= 3


def test_only_the_beginning_of_an_endless_query_counts() -> None:
    corpus = Corpus(PARAGRAPHS)
    assert corpus.search("zebra " * 100_000 + "Norway", 3) == []


def test_paragraphs_are_found_by_title_and_by_content() -> None:
    corpus = Corpus(PARAGRAPHS)
    assert corpus.by_title("  tolvar   BRIDGE ") == 1
    assert corpus.by_title("Tolvar") is None
    assert [corpus.position(paragraph) for paragraph in PARAGRAPHS] == [0, 1, 2, 3, 4]
    assert corpus.position(Paragraph("Olm", "another text")) is None


def test_many_threads_that_ask_at_once_get_one_index() -> None:
    cache: OnceCache[object] = OnceCache(4)
    made: list[object] = []
    together = threading.Barrier(16)

    def make() -> object:
        made.append(object())
        return made[-1]

    def ask(_: int) -> object:
        together.wait()
        return cache.get("key", make)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert len(made) == 1
    assert set(map(id, answers)) == {id(made[0])}


def test_the_cache_drops_what_was_not_asked_for_longest_and_keeps_no_failure() -> None:
    cache: OnceCache[int] = OnceCache(2)
    made: list[str] = []

    def make(key: str) -> int:
        return cache.get(key, lambda: made.append(key) or len(made))

    assert [make(key) for key in ("a", "b", "a", "c", "a", "b")] == [1, 2, 1, 3, 1, 4]

    def fail() -> int:
        raise ValueError("no paragraphs")

    with pytest.raises(ValueError, match="no paragraphs"):
        cache.get("d", fail)
    assert cache.get("d", lambda: 7) == 7


def test_building_and_searching_print_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    Corpus(PARAGRAPHS).search("river", 3)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if re.match("bm25s", record.name)]


def test_a_jax_that_is_installed_is_not_imported(tmp_path: Path) -> None:
    """On a machine with GPUs an operation of JAX would take three quarters of one."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise AssertionError('jax was imported')\n")
    program = (
        "import sys\n"
        "from turnwise.envs.musique.retrieval import Corpus, Paragraph\n"
        "assert Corpus([Paragraph('Rome', 'A city on seven hills.')]).search('hills', 1)\n"
        "assert 'jax' not in sys.modules\n"
        "try:\n"
        "    import jax\n"
        "except AssertionError:\n"
        "    print('jax is there for others')\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (child.stdout, child.returncode) == ("jax is there for others\n", 0), child.stderr
