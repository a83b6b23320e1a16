"""What a turn of the MuSiQue environment costs, beside a bare bm25s query.

Plays rollouts of five turns (three searches, a reading, an answer), `--rollouts` at a time, on the orchestrator's threads, with
a policy that answers at once. Reported for each turn is the time inside `step`: CPU time of the thread, and wall time, in which
other threads may have held the interpreter; therefore also one rollout at a time. Beside it, in the same run, bm25s alone
tokenises and retrieves the same queries. A second table searches one corpus of all questions, up to that of the whole data set.

    python benchmarks/musique_env.py --json musique_env.json

Questions are drawn from invented words with natural frequencies, 20 paragraphs of 85 words each; `--rows FILE.jsonl` takes real
ones instead.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.envs.musique import MuSiQue
from turnwise.envs.musique.data import Question, read_rows
from turnwise.envs.musique.retrieval import Corpus, Paragraph
from turnwise.orchestrator.env_threads import EnvThreads

GOAL_MS = 2.0
GROUP = 8  # rollouts of one question, as in training
PARAGRAPHS, WORDS, VOCABULARY = 20, 85, 60_000
TURNS = 5
Row = dict[str, Any]
Times = list[tuple[float, float]]  # wall and CPU seconds of a turn


def invented_rows(count: int, rng: np.random.Generator) -> list[Row]:
    """Rows whose words have the frequencies of natural text (Zipf)."""
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    words = [f"w{i:x}" for i in range(VOCABULARY)]
    drawn = rng.choice(VOCABULARY, size=(count, PARAGRAPHS, WORDS), p=frequencies / frequencies.sum())

    def text(ids: np.ndarray) -> str:
        return " ".join(words[i] for i in ids)

    return [
        {
            "id": f"2hop__{number}_0",
            "question": " ".join([text(paragraphs[3][:5]), text(paragraphs[7][:5])]),
            "answer": text(paragraphs[7][5:7]),
            "paragraphs": [
                {"idx": i, "title": text(ids[-2:]), "paragraph_text": text(ids), "is_supporting": i in (3, 7)}
                for i, ids in enumerate(paragraphs)
            ],
        }
        for number, paragraphs in enumerate(drawn)
    ]


def queries(row: Row) -> list[str]:
    """Three searches: the whole question and its halves."""
    words = row["question"].split()
    return [row["question"], " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]


def replies(row: Row) -> list[str]:
    calls = [("search", {"query": query}) for query in queries(row)]
    calls += [("read", {"paragraph": 3}), ("answer", {"text": row["answer"], "paragraphs": [3, 7]})]
    messages = [AssistantMessage(content="", tool_calls=(ToolCall(id="c", name=n, arguments=a),)) for n, a in calls]
    return [message.to_action() for message in messages]


def timed_step(env: MuSiQue, action: str, times: Times) -> None:
    wall, cpu = time.perf_counter(), time.thread_time()
    env.step(action)
    times.append((time.perf_counter() - wall, time.thread_time() - cpu))


async def play(rows: Sequence[Row], rollouts: int) -> tuple[Times, Times, float]:
    """Play `rollouts` at a time until every question has been played `GROUP` times: turns, resets, turns a second."""
    threads, turns, resets = EnvThreads(), Times(), Times()
    todo = iter([row for row in rows for _ in range(GROUP)])

    def timed_reset(env: MuSiQue, row: Row) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        env.reset(seed=0, options={"task": row})
        resets.append((time.perf_counter() - wall, time.thread_time() - cpu))

    async def worker() -> None:
        env = MuSiQue(train=rows)
        for row in todo:
            await threads.call(lambda row=row: timed_reset(env, row), timeout_s=60)
            for action in replies(row):
                await threads.call(lambda action=action: timed_step(env, action, turns), timeout_s=60)

    before = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(rollouts):
            group.create_task(worker())
    return turns, resets, len(turns) / (time.perf_counter() - before)


def bare(rows: Sequence[Row], top_k: int = 3) -> Times:
    """bm25s alone on the same queries."""
    times = Times()
    for row in rows:
        corpus = [f"{entry['title']} {entry['paragraph_text']}" for entry in row["paragraphs"]]
        index = bm25s.BM25()
        index.index(bm25s.tokenize(corpus, show_progress=False, return_ids=False), show_progress=False)
        for query in queries(row):
            wall, cpu = time.perf_counter(), time.thread_time()
            index.retrieve(bm25s.tokenize(query, show_progress=False, return_ids=False), k=top_k, show_progress=False)
            times.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return times


def summary(times: Times) -> dict[str, float]:
    """Milliseconds."""
    wall, cpu = (np.array(column) * 1e3 for column in zip(*times, strict=True))
    return {
        "count": len(times),
        "wall_median_ms": float(np.median(wall)),
        "wall_p99_ms": float(np.percentile(wall, 99)),
        "cpu_median_ms": float(np.median(cpu)),
        "cpu_p99_ms": float(np.percentile(cpu, 99)),
    }


def corpus_searches(rows: Sequence[Row], sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Searches in one corpus of so many paragraphs."""
    paragraphs = list(dict.fromkeys(p for row in rows for p in Question.of(row).paragraphs))
    results: dict[str, dict[str, float]] = {}
    for size in sizes:
        copies = -(-size // len(paragraphs))
        chosen = [Paragraph(f"{p.title} {copy}", p.text) for copy in range(copies) for p in paragraphs][:size]
        before = time.perf_counter()
        corpus = Corpus(chosen)
        built = time.perf_counter() - before
        times = Times()
        for row in rows[:100]:
            for query in queries(row):
                wall, cpu = time.perf_counter(), time.thread_time()
                corpus.search(query, 3)
                times.append((time.perf_counter() - wall, time.thread_time() - cpu))
        results[str(size)] = {"build_s": built, **summary(times)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256, help="at a time")
    parser.add_argument("--questions", type=int, default=256, help="invented ones")
    parser.add_argument("--rows", help="a JSONL file in MuSiQue's schema instead")
    parser.add_argument("--corpora", type=int, nargs="*", default=[2_000, 20_000, 140_000], help="paragraphs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = (
        list(read_rows(options.rows, key="--rows"))
        if options.rows
        else invented_rows(options.questions, np.random.default_rng(0))
    )
    bare(rows[:8])  # the first use of a library is not its price
    alone, _, _ = asyncio.run(play(rows[:64], 1))
    turns, resets, rate = asyncio.run(play(rows, options.rollouts))
    result = {
        "rollouts": options.rollouts,
        "turns_per_s": rate,
        "turn": summary(turns),
        "turn_alone": summary(alone),
        "reset": summary(resets),
        "bare_bm25s": summary(bare(rows)),
        "corpora": corpus_searches(rows, options.corpora),
    }
    for name in ("turn", "turn_alone", "reset", "bare_bm25s"):
        print(name.ljust(12), {key: round(value, 3) for key, value in result[name].items()})
    for size, figures in result["corpora"].items():
        print(size.rjust(9), {key: round(value, 3) for key, value in figures.items()})
    print(f"{rate:,.0f} turns/s, {1e3 / rate:.2f} ms a turn; goal: below {GOAL_MS:g} ms a turn")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
