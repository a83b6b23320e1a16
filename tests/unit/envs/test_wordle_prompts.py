"""What the policy reads."""

import re

import pytest

from turnwise.envs.wordle import Wordle
from turnwise.envs.wordle.prompts import STYLES
from turnwise.envs.wordle.words import read_words


def read(replies: list[str], **args: object) -> list[str]:
    env = Wordle(answers=["frost"], **args)  # type: ignore[arg-type]
    observation, _ = env.reset()
    return [observation, *(env.step(reply)[0] for reply in replies)]


def test_observations_show_masks_and_what_is_known() -> None:
    assert read(["crane", "sloth", "", "zzzzz", "frost"]) == [
        "Try 1 of 6.",
        "crane -> -G---\nKnown: _r___ Elsewhere: none Not in it: a c e n\nTry 2 of 6.",
        "crane -> -G---\nsloth -> Y-GY-\nKnown: _ro__ Elsewhere: s t Not in it: a c e h l n\nTry 3 of 6.",
        "Your answer has no 5-letter word.\ncrane -> -G---\nsloth -> Y-GY-\n"
        "Known: _ro__ Elsewhere: s t Not in it: a c e h l n\nTry 4 of 6.",
        "zzzzz is not a 5-letter word that I know.\ncrane -> -G---\nsloth -> Y-GY-\n"
        "Known: _ro__ Elsewhere: s t Not in it: a c e h l n\nTry 5 of 6.",
        "Correct: frost.",
    ]


def test_history_last_shows_only_the_new_mask() -> None:
    observations = read(["crane", "sloth", "zzzzz"], history="last")
    assert observations[2] == "sloth -> Y-GY-\nKnown: _ro__ Elsewhere: s t Not in it: a c e h l n\nTry 3 of 6."
    assert observations[3].split("\n")[0] == "zzzzz is not a 5-letter word that I know."
    assert "->" not in observations[3]


def test_the_last_observation_of_a_lost_game_tells_the_word() -> None:
    assert read(["crane"], max_turns=1)[-1] == "crane -> -G---\nThe word was frost."


CLOSED_STYLES = [name for name, style in STYLES.items() if not style.names_shortlist]  # a shortlist names the answer


@pytest.mark.parametrize("style", CLOSED_STYLES)
def test_no_prompt_holds_a_word_that_could_be_guessed(style: str) -> None:
    """A small policy would answer nothing else, and be paid for it."""
    env = Wordle(style=style, templates={"scored": "{mask}", "summary": "{pattern}"})
    opening, _ = env.reset(seed=0)
    observations = [opening, *(env.step(reply)[0] for reply in ("<guess>crane</guess>", "", "zzzzz"))]
    prose = re.sub("</?guess>|zzzzz", " ", " ".join([env.system_prompt, *observations]).lower())
    shown = set(re.findall(r"(?<!\w)[a-z]{5}(?!\w)", prose))
    assert shown & set(read_words(None, key="allowed", default="allowed.txt")) == set()


@pytest.mark.parametrize("style", CLOSED_STYLES)
def test_every_style_plays_and_never_tells_the_answer_before_the_end(style: str) -> None:
    env = Wordle(style=style)
    opening, _ = env.reset(seed=1)
    observations = [opening, *(env.step("<guess>crane</guess>")[0] for _ in range(5))]
    assert not any(env.answer_word in observation.lower() for observation in observations)
    assert all(len(observation) < 400 for observation in observations)


def test_templates_marks_and_the_system_prompt_can_be_replaced() -> None:
    env = Wordle(
        answers=["frost"],
        style="capitals",
        system_prompt="{length} letters, {max_turns} tries. {{}}",
        templates={
            "scored": "{GUESS_spaced} = {mask_spaced}",
            "summary": "",
            "ask": "{left} left, tried {tried}",
            "marks": "+?x",
        },
    )
    env.reset()
    assert env.system_prompt == "5 letters, 6 tries. {}"
    assert env.step("sloth")[0] == "S L O T H = ? x + ? x\n5 left, tried sloth"


def test_the_reply_form_follows_the_style() -> None:
    env = Wordle(answers=["frost"], style="tagged")
    env.reset()
    assert env.step("Let me see. <guess>crane</guess>")[4]["reward_components"]["format"] > 0
    assert env.step("sloth")[4]["reward_components"]["format"] < 0
    env = Wordle(answers=["frost"], templates={"reply": "tag"})
    env.reset()
    assert env.step("<guess>crane</guess>")[4]["reward_components"]["format"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"style": "plane"}, r"args\.style = 'plane' is unknown\. Did you mean 'plain'\? Known: plain"),
        ({"templates": {"scoerd": ""}}, r"args\.templates\.scoerd is unknown\. Did you mean 'scored'\?"),
        ({"templates": {"scored": "{word}"}}, r"args\.templates\.scored = '\{word\}' cannot be filled in \(KeyError: 'word'\)"),
        ({"templates": {"ask": "{"}}, r"args\.templates\.ask = .*plain brace"),
        ({"templates": {"ask": 3}}, r"args\.templates\.ask = 3 must be a text"),
        ({"system_prompt": "{0}"}, r"args\.system_prompt = '\{0\}' cannot be filled in"),
        ({"templates": {"marks": "GG-"}}, r"args\.templates\.marks = 'GG-' must be three different characters"),
        ({"templates": {"reply": "json"}}, r"args\.templates\.reply = 'json' must be 'word' or 'tag'"),
    ],
)
def test_bad_styles_and_templates_are_refused_at_once(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wordle(**args)  # type: ignore[arg-type]
