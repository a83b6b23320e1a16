"""Do conversations become tokens and back without a loss, and do they only grow at the end?"""

from collections.abc import Sequence

from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.text_checks.reading import Reading, first_difference
from turnwise.diagnose.text_checks.template_tools import judge_tools
from turnwise.orchestrator.types import Message

TEXTS = (
    "plain words",
    "two  spaces, a\ttab and\nlines\n\n  indented",
    "naïve façade – «Füße» 東京 🙂 \u200d",
    '{"key": ["a", 1.5, null]} <tag attr="x">&amp;</tag> $x^2$ `code`',
)
REPLY = "turnwise asks and answers"
THOUGHT = "<think>\nturnwise ponders\n</think>\n\n"
OPENING: list[Message] = [{"role": "user", "content": "turnwise begins?"}]
ANSWER: list[Message] = [{"role": "user", "content": "turnwise goes on."}]


def look(context: Context) -> Finding:
    """Render conversations of our own, by the chat of the run and by tokenizer and template alone, and compare."""
    reading, notes = Reading(context.chat, context.text), Notes()
    _stops(reading, notes)
    _round_trip(reading, notes)
    _injection(reading, notes)
    _as_rendered(reading, notes)
    setups = context.setups_if_any()
    uses = {setup.name: judge_tools(reading, setup.tools, notes) for setup in setups if setup.tools}
    by_template = [name for name, use in uses.items() if use is not None and use.native]
    turns = max((setup.max_turns for setup in setups if setup.name not in by_template), default=1)
    appends = _history(reading, notes, turns=turns)  # of replies that messages of the user answer
    used = {name: vars(use) for name, use in uses.items() if use is not None}
    data = {"stop_ids": list(reading.chat.stop_ids), "append_only": appends, "tools": used}
    ends = ", ".join(stop for stop in reading.stops if stop)
    growth = "history only grows" if appends else "history is rewritten"
    tools = "".join(f"; {words}" for words in dict.fromkeys(use.words() for use in uses.values() if use is not None))
    return notes.finding(f"{len(TEXTS)} texts survive the round trip, replies end with {ends}, {growth}{tools}", data)


def _stops(reading: Reading, notes: Notes) -> None:
    """Replies end with tokens that the tokenizer has, and that the template writes there."""
    unknown = [stop for stop, text in zip(reading.chat.stop_ids, reading.stops, strict=True) if not text]
    if unknown or not reading.stops:
        notes.fail(
            f"the ids {list(reading.chat.stop_ids)} that should end a reply are not all in the tokenizer: replies would run "
            "to the token limit",
            "correct eos_token_id in the model's generation_config.json",
        )
        return
    head, whole = reading.rendered(OPENING), reading.rendered([*OPENING, _said(REPLY), *ANSWER])
    tail = whole.partition(REPLY)[2]
    if whole.startswith(head) and not any(tail.lstrip().startswith(stop) for stop in reading.stops):
        notes.warn(
            f"the template ends a reply with {tail[:24]!r}, where no stop token stands ({', '.join(reading.stops)})",
            "add the template's end token to eos_token_id in generation_config.json",
        )


def _round_trip(reading: Reading, notes: Notes) -> None:
    """What the policy writes is what the environment reads; white space at the ends may be lost."""
    for text in TEXTS:
        ids = [*reading.encode(text), reading.chat.stop_ids[0]] if reading.chat.stop_ids else reading.encode(text)
        read = reading.chat.text(ids)
        if read.strip() != text.strip():
            notes.fail(f"a reply comes back from its tokens as another: {first_difference(read, text)}")
            return
        prompt = reading.decode(reading.chat.first_prompt([{"role": "user", "content": text}]))
        if text.strip() not in prompt:
            notes.warn(f"a message does not stand in its prompt as it was written: {text[:24]!r}")
            return


def _injection(reading: Reading, notes: Notes) -> None:
    """Text of an environment that looks like an end token must not become one."""
    for stop, text in zip(reading.chat.stop_ids, reading.stops, strict=True):
        plain, hostile = (reading.chat.first_prompt([{"role": "user", "content": f"a {word} b"}]) for word in ("word", text))
        if text and hostile.count(stop) > plain.count(stop):
            notes.fail(
                f"the text {text!r} inside a message becomes the token {stop}: an observation could end its own turn and speak "
                "for the policy"
            )


def _as_rendered(reading: Reading, notes: Notes) -> None:
    """Prompts are those of the template, in the tokens that the tokenizer gives it."""
    conversation = [*OPENING, _said(REPLY), *ANSWER]
    prompt, rendered = reading.chat.first_prompt(conversation), reading.rendered(conversation)
    if not rendered or prompt == reading.encode(rendered):
        return
    told = reading.decode(prompt)
    if told != rendered and told != reading.decode(reading.encode(rendered)):
        notes.warn(f"prompts differ from what the template writes: {first_difference(told, rendered)}")
    elif told == rendered:
        notes.warn("prompts have the text of the template in other tokens than the tokenizer gives it")


def _history(reading: Reading, notes: Notes, *, turns: int) -> bool:
    """Whether a conversation is the one before it, the reply, and something at the end; and whether its tokens are."""
    appends = _appends(reading, REPLY)
    if turns > 1 and not appends:
        notes.warn(
            "the chat template rewrites what was said before: each turn becomes a training sample of its own",
            "use a template that only appends (model.chat_template)",
        )
    elif turns > 1 and not _appends(reading, THOUGHT + REPLY):
        notes.warn(
            "the template leaves thoughts out of earlier turns: with a policy that thinks, each turn becomes a training sample "
            "of its own",
            "use a template that keeps them (model.chat_template), or accept the cost",
        )
    if appends:
        for ids, what in _replies(reading):
            _kept(reading, ids, what, notes)
    return appends


def _appends(reading: Reading, reply: str) -> bool:
    before, after = reading.rendered(OPENING), reading.rendered([*OPENING, _said(reply), *ANSWER])
    return after.startswith(before + reply)


def _replies(reading: Reading) -> list[tuple[list[int], str]]:
    """Replies as a policy may sample them."""
    stop = list(reading.chat.stop_ids[:1])
    spelled = [token for character in REPLY for token in reading.encode(character)]
    emoji = reading.encode("🙂")
    broken = [*reading.encode(REPLY), *emoji[: len(emoji) // 2]]
    return [
        ([*reading.encode(REPLY), *stop], "a reply"),
        (reading.encode(REPLY), "a reply cut by the token limit"),
        ([*spelled, *stop], "a reply in tokens that the tokenizer would not choose"),
        (broken, "a reply broken off inside a character"),
    ]


def _kept(reading: Reading, ids: Sequence[int], what: str, notes: Notes) -> None:
    """The next prompt goes on from the very tokens, with what the template writes between two turns."""
    prompt = reading.chat.first_prompt(OPENING)
    history = [*OPENING, _said(reading.chat.text(ids))]
    after = reading.chat.next_prompt(prompt, ids, history, ANSWER)
    before = [*prompt, *ids]
    if list(after[: len(before)]) != before:
        notes.fail(
            f"{what} comes back in other tokens in the next prompt: the history is tokenised again, and the policy would be "
            "trained on tokens that it did not see",
            "take the next prompt from the tokens of the last one (Chat.next_prompt), not from its text",
        )
        return
    rendered = reading.rendered([*OPENING, _said(REPLY), *ANSWER])
    bridge = reading.decode(after[len(before) - (before[-1] in reading.chat.stop_ids) :])
    if not rendered.endswith(bridge):
        difference = first_difference(bridge, rendered[max(0, len(rendered) - len(bridge)) :])
        notes.warn(f"after {what} the next turn begins otherwise than in the template: {difference}")


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


TEMPLATE = Check("template", "Do conversations become tokens and back without a loss?", (), look)
