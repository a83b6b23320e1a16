"""What the policy reads: instructions, worked examples, answers of the tools."""

from collections.abc import Collection, Sequence
from typing import Any

from turnwise.envs.messages import AssistantMessage, ToolCall, tool_message
from turnwise.envs.musique.retrieval import Corpus

INSTRUCTIONS = """\
Answer the question with the help of the tools. No single paragraph holds the answer: search for one fact, then use it to \
search for the next. Finish by calling answer with a short answer - a name, a date, a few words - and the numbers of the \
paragraphs that support it. You have {max_turns} replies."""

UNANSWERABLE = 'If the paragraphs do not hold the answer, the answer is "{answer}".'

Step = tuple[str, dict[str, Any], str]  # tool, arguments, what it answers

EXAMPLES: tuple[tuple[str, tuple[Step, ...]], ...] = (
    (
        "In which country was the architect of Tolvar Bridge born?",
        (
            ("search", {"query": "Tolvar Bridge architect"}, "[4] Tolvar Bridge: Tolvar Bridge is a bridge by Ilse Marn..."),
            ("search", {"query": "Ilse Marn born"}, "[9] Ilse Marn: Ilse Marn (1870-1942) was an architect from Norway..."),
            ("answer", {"text": "Norway", "paragraphs": [4, 9]}, ""),
        ),
    ),
    (
        "Who owns the newspaper that Petra Quill writes for?",
        (
            ("search", {"query": "Petra Quill newspaper"}, "[2] Petra Quill: Petra Quill is a columnist of the Harbour Post..."),
            ("search", {"query": "Harbour Post owner"}, "[13] Harbour Post: The Harbour Post is a daily newspaper, founded..."),
            ("read", {"paragraph": 13}, "[13] Harbour Post: The Harbour Post is a daily newspaper, founded in 1902. It belongs "
             "to the Lind family."),
            ("answer", {"text": "the Lind family", "paragraphs": [2, 13]}, ""),
        ),
    ),
    (
        "When did the band that recorded Glass Orchard break up?",
        (
            ("search", {"query": "Glass Orchard album band"}, "[0] Glass Orchard: Glass Orchard is an album by Nine Lanterns..."),
            ("search", {"query": "Nine Lanterns break up"}, "[17] Nine Lanterns: Nine Lanterns played until 1998, when they..."),
            ("answer", {"text": "1998", "paragraphs": [0, 17]}, ""),
        ),
    ),
)  # fmt: skip


def system_prompt(max_turns: int, unanswerable: str | None) -> str:
    """Instructions, with a sentence about unanswerable questions where there may be some."""
    told = INSTRUCTIONS.format(max_turns=max_turns)
    return told if unanswerable is None else f"{told} {UNANSWERABLE.format(answer=unanswerable)}"


def worked_examples(count: int, offered: Collection[str]) -> tuple[dict[str, Any], ...]:
    """Conversations about invented questions, as messages, with calls of the tools in `offered` alone.

    The last call of each has no answer: where answers are messages of the user, it would be one message with the next question,
    and a small model then writes answers of tools instead of calls.

    Raises:
        ValueError: when there are not so many.
    """
    if not 0 <= count <= len(EXAMPLES):
        raise ValueError(f"args.shown_examples = {count} must be from 0 to {len(EXAMPLES)}")
    messages: list[dict[str, Any]] = []
    for question, steps in EXAMPLES[:count]:
        messages.append({"role": "user", "content": opening(question)})
        for name, arguments, result in (step for step in steps if step[0] in offered):
            call = ToolCall(id=f"shown{len(messages):04d}", name=name, arguments=arguments)  # ids that every template takes
            messages.append(AssistantMessage(content="", tool_calls=(call,)).to_message())
            messages.append(dict(tool_message(call, result)))
        messages.pop()
    return tuple(messages)


def opening(question: str) -> str:
    """The first observation."""
    return f"Question: {question}"


def found(corpus: Corpus, positions: Sequence[int], snippet_chars: int | None, seen_before: Collection[int]) -> str:
    """The answer of a search."""
    if not positions:
        return "No paragraph has a word of this query."
    lines = [paragraph(corpus, position, snippet_chars) for position in positions]
    if all(position in seen_before for position in positions):
        lines.append("(Nothing new: all of these were shown before.)")
    return "\n".join(lines)


def paragraph(corpus: Corpus, position: int, max_chars: int | None = None) -> str:
    """A paragraph with number and title, cut after `max_chars` characters of its text, between words where that is near."""
    entry = corpus.paragraphs[position]
    text = entry.text
    if max_chars is not None and len(text) > max_chars:
        head = text[:max_chars]
        text = (head[: head.rfind(" ", max_chars // 2) % (max_chars + 1)]).rstrip() + "..."
    return f"[{position}] {entry.title}: {text}"


def verdict(text: str, truths: Sequence[str], exact: float, f1: float) -> str:
    """The answer to an answer."""
    return "Correct." if exact else f"The answer is {truths[0]!r}, not {text[:200]!r} (F1 {f1:.2f})."
