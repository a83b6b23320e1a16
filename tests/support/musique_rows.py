"""Self-written rows in MuSiQue's schema, about invented places."""

from typing import Any

BRIDGE, ARCHITECT = "Tolvar Bridge", "Ilse Marn"


def bridge_row(**changes: Any) -> dict[str, Any]:
    """Two hops: paragraph 1 names the architect of the bridge, paragraph 3 the country where she was born."""
    texts = [
        ("Harbour Post", "The Harbour Post is a newspaper of two editors."),
        (BRIDGE, "Tolvar Bridge crosses the Olm. Its architect was Ilse Marn."),
        ("Olm", "The Olm is a river with seven bridges."),
        (
            ARCHITECT,
            "Ilse Marn was born in the Kingdom of Norway. " + "She drew harbours, towers and mills. " * 10 + "She died in 1942.",
        ),
        ("Norway", "Norway is a country of fjords."),
    ]
    row = {
        "id": "2hop__1_3",
        "question": "In which country was the architect of Tolvar Bridge born?",
        "answer": "The Kingdom of Norway",
        "answer_aliases": ["Norway"],
        "answerable": True,
        "paragraphs": [
            {"idx": i, "title": title, "paragraph_text": text, "is_supporting": i in (1, 3)}
            for i, (title, text) in enumerate(texts)
        ],
        "question_decomposition": [
            {"id": 1, "question": "Who is the architect of Tolvar Bridge?", "answer": "Ilse Marn", "paragraph_support_idx": 1},
            {"id": 3, "question": "#1 >> country of birth", "answer": "Norway", "paragraph_support_idx": 3},
        ],
    }
    return {**row, **changes}


def river_row(**changes: Any) -> dict[str, Any]:
    """Three hops, with a paragraph in common with `bridge_row`."""
    texts = [
        ("Olm", "The Olm is a river with seven bridges."),
        ("Sael", "The Sael flows into the Olm."),
        ("Tarn", "Tarn lies on the Sael."),
    ]
    row = {
        "id": "3hop1__5_6_7",
        "question": "How many bridges has the river into which the river of Tarn flows?",
        "answer": "seven",
        "answer_aliases": [],
        "answerable": True,
        "paragraphs": [
            {"idx": i, "title": title, "paragraph_text": text, "is_supporting": True} for i, (title, text) in enumerate(texts)
        ],
        "question_decomposition": [],
    }
    return {**row, **changes}


def unanswerable_row(**changes: Any) -> dict[str, Any]:
    """The bridge's question without the paragraph that says where the architect was born."""
    row = bridge_row(answerable=False)
    kept = [entry for entry in row["paragraphs"] if entry["title"] != ARCHITECT]
    return {**row, "paragraphs": [{**entry, "idx": i} for i, entry in enumerate(kept)], **changes}
