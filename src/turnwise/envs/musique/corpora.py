"""One index for many questions: over the paragraphs of all rows, or of a file."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from turnwise.envs.musique.data import TaskSource, paragraph_rows, read_paragraphs, read_rows, stamped, table_specs
from turnwise.envs.musique.retrieval import Corpus, OnceCache, Paragraph
from turnwise.envs.tasks import TableSpec, read_jsonl

CACHED = 4  # the whole training set takes some GB
CORPORA: OnceCache[Corpus] = OnceCache(CACHED)


def shared_corpus(corpus: str, sources: Mapping[str, TaskSource]) -> Corpus:
    """The index over a file's paragraphs, or those of all rows of `sources`, each paragraph once. Made once in a process.

    Args:
        corpus: `"all"`, or a JSONL file of paragraphs ("title", and "paragraph_text" or "text") or of rows that have some.
        sources: task sources by split.

    Raises:
        ValueError: when they cannot be read or hold no paragraph.
    """
    if corpus == "all":
        return CORPORA.get(tuple(_key(source) for source in sources.values()), lambda: Corpus(_of_sources(sources)))
    if not corpus.removesuffix("]").rpartition("[")[0].endswith(".jsonl") and not corpus.endswith(".jsonl"):
        raise ValueError(f"args.corpus = {corpus!r} must be 'question', 'all' or a JSONL file")
    spec = TableSpec.parse(corpus)
    return CORPORA.get(stamped([spec]), lambda: Corpus(_of_file(spec)))


def _key(source: TaskSource) -> Hashable:
    specs = table_specs(source, key="source")
    if specs is not None:
        return stamped(specs)
    rows = cast(Sequence[Mapping[str, Any]], source)
    return tuple(paragraph for row in rows for paragraph in _of_row(row))


def _of_sources(sources: Mapping[str, TaskSource]) -> list[Paragraph]:
    rows = [row for split, source in sources.items() for row in read_rows(source, key=f"args.{split}")]
    return list(dict.fromkeys(paragraph for row in rows for paragraph in _of_row(row)))


def _of_file(spec: TableSpec) -> list[Paragraph]:
    rows = read_jsonl(spec.file())
    chosen = [rows[place] for place in spec.split.indices(len(rows))]
    found: dict[Paragraph, None] = {}
    for row in chosen:
        entries = paragraph_rows(row["paragraphs"]) if "paragraphs" in row else [{"paragraph_text": row.get("text"), **row}]
        found |= dict.fromkeys(read_paragraphs(entries, f"args.corpus = {str(spec)!r}"))
    return list(found)


def _of_row(row: Mapping[str, Any]) -> tuple[Paragraph, ...]:
    return read_paragraphs(paragraph_rows(row["paragraphs"]), f"MuSiQue task {row.get('id')!r}")
