"""The environment: what calls answer, what they pay, what is counted."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from support.musique_rows import ARCHITECT, BRIDGE, bridge_row, river_row, unanswerable_row
from turnwise.envs import Step, make
from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.envs.musique import MuSiQue
from turnwise.envs.musique.data import hop_count
from turnwise.envs.musique.retrieval import QUESTIONS

Call = tuple[str, dict[str, Any]]
FREE = {"format_reward": 0.0, "search_cost": 0.0, "invalid_call_cost": 0.0}  # leaves answer, support and citation


def begun(row: dict[str, Any] | None = None, **args: Any) -> MuSiQue:
    env = MuSiQue(train=[bridge_row()], validation=[river_row()], **args)
    env.reset(options={"task": row or bridge_row()})
    return env


def say(env: MuSiQue, *calls: Call, content: str = "") -> Step:
    numbered = tuple(ToolCall(id=f"c{i}", name=name, arguments=arguments) for i, (name, arguments) in enumerate(calls))
    return env.step(AssistantMessage(content=content, tool_calls=numbered).to_action())


def search(query: str, **more: Any) -> Call:
    return "search", {"query": query, **more}


def read(paragraph: Any) -> Call:
    return "read", {"paragraph": paragraph}


def answer(text: str, paragraphs: list[int] | None = None) -> Call:
    return "answer", {"text": text} | ({} if paragraphs is None else {"paragraphs": paragraphs})


def paid(step: Step) -> dict[str, float]:
    return step[4]["reward_components"]


def test_check_env_finds_nothing_to_warn_of() -> None:
    rows = [bridge_row(), river_row()]
    for more in ({}, {"corpus": "all", "without_call": "end", "shown_examples": 3}):
        check_env(gymnasium.make("turnwise/musique", train=rows, validation=rows, **more).unwrapped)


def test_an_episode_from_search_to_answer() -> None:
    env = begun()
    assert [tool.name for tool in env.tools] == ["search", "read", "answer"]
    observation, info = env.reset(options={"task": bridge_row()})
    assert observation == "Question: In which country was the architect of Tolvar Bridge born?"
    assert info["task_id"] == "2hop__1_3"

    first = say(env, search("Tolvar Bridge", k=1))
    assert first[0] == "[1] Tolvar Bridge: Tolvar Bridge crosses the Olm. Its architect was Ilse Marn."
    assert paid(first) == {"support_found": 0.25}
    second = say(env, search("Marn born kingdom", k=1))
    assert second[0].startswith("[3] Ilse Marn: Ilse Marn was born in the Kingdom of Norway. She drew")
    assert second[0].endswith("...")
    assert len(second[0]) <= len("[3] Ilse Marn: ") + 300 + len("...")
    third = say(env, read(3))
    assert third[0].endswith("She died in 1942.")
    assert paid(third) == {"support_found": 0.0}
    last = say(env, answer("Norway", [1, 3]))
    assert last[0] == "Correct."
    assert paid(last) == {"answer_f1": 1.0, "citation": 0.25, "format": pytest.approx(0.1)}
    assert (last[1], last[2], last[3]) == (pytest.approx(1.35), True, False)
    assert last[4]["metrics"] == {
        "acc": 1.0,
        "f1": 1.0,
        "answered": 1.0,
        "support_f1": 1.0,
        "supporting_found": 1.0,
        "useless_calls": 0.0,
        "calls": 4.0,
        "invalid_calls": 0.0,
        "malformed_calls": 0.0,
    }


def test_an_answer_is_paid_by_its_f1_and_in_full_only_when_asked_by_exact_match() -> None:
    partly = say(begun(em_reward=0.5, **FREE), answer("Norway or Sweden", [1, 0]))
    assert paid(partly) == {"answer_f1": 0.5, "answer_em": 0.0, "citation": pytest.approx(0.25 * 0.5)}
    assert partly[0] == "The answer is 'The Kingdom of Norway', not 'Norway or Sweden' (F1 0.50)."
    assert paid(say(begun(em_reward=0.5, **FREE), answer("Kingdom of Norway")))["answer_em"] == 0.5


def test_sparse_reward_pays_the_answer_alone() -> None:
    assert MuSiQue.outcome_components == {"answer_f1", "answer_em"}
    assert MuSiQue.outcome_components < MuSiQue.component_names


def test_each_supporting_paragraph_pays_once_whoever_shows_it() -> None:
    env = begun(support_reward=1.0, **FREE)
    both = say(env, read(BRIDGE), read("1"), search("Marn", k=2))
    assert paid(both) == {"support_found": 1.0}
    assert paid(say(env, read(ARCHITECT))) == {"support_found": 0.0}
    assert env.episode_metrics()["supporting_found"] == 1.0


def test_what_shows_nothing_new_is_useless_and_costs() -> None:
    env = begun(search_cost=0.25, support_reward=0.0)
    assert paid(say(env, search("Tolvar Bridge"))) == {}
    again = say(env, search("bridge Tolvar"))
    assert again[0].endswith("(Nothing new: all of these were shown before.)")
    assert paid(again) == {"useless_call": -0.25}
    nothing = say(env, search("zebra"), search(""))
    assert nothing[0] == "No paragraph has a word of this query.\n\nNo paragraph has a word of this query."
    assert paid(nothing) == {"useless_call": -0.5}
    assert env.episode_metrics()["useless_calls"] == 3


def test_reading_the_rest_of_a_paragraph_is_of_use_reading_it_twice_is_not() -> None:
    env = begun(search_cost=0.25, support_reward=0.0)
    assert paid(say(env, search("architect bridge Marn", k=5))) == {}
    assert paid(say(env, read(3))) == {}
    assert paid(say(env, read(3))) == {"useless_call": -0.25}
    assert paid(say(env, read(1))) == {"useless_call": -0.25}  # shown to its end by the search


def test_calls_that_cannot_be_run_cost_and_spoil_the_format() -> None:
    env = begun(format_reward=1.0, invalid_call_cost=0.5, support_reward=0.0, citation_reward=0.0)
    assert paid(say(env, ("find", {}), ("search", {"q": "x"}))) == {"useless_call": -1.0}
    assert paid(say(env, content="Let me think.")) == {}
    assert paid(say(env, search("Olm"))) == {}
    assert paid(say(env, answer("?"))) == {"answer_f1": 0.0, "format": 0.5}


def test_an_episode_cut_short_is_owed_no_answer() -> None:
    env = begun(em_reward=1.0, format_reward=0.5, max_turns=4)
    assert env.finish("shut down") == {"answer_f1": 0.0, "answer_em": 0.0, "format": 0.0}
    env = begun(format_reward=0.5, max_turns=4)
    say(env, search("Olm"))
    assert env.finish("context_full") == {"answer_f1": 0.0, "format": 0.5}
    env = begun(format_reward=0.5, max_turns=2)
    say(env, content="hm")
    last = say(env, search("Olm"))
    assert last[2:4] == (False, True)
    assert paid(last) == {"support_found": 0.25, "answer_f1": 0.0, "format": 0.25}
    assert last[4]["metrics"]["answered"] == last[4]["metrics"]["acc"] == 0.0


def test_a_reply_without_calls_may_end_the_episode() -> None:
    ended = say(begun(without_call="end"), content="Norway")
    assert ended[2]
    assert paid(ended) == {"answer_f1": 0.0, "format": 0.0}
    assert not say(begun(), content="Norway")[2]


@pytest.mark.parametrize(
    ("paragraph", "shown"),
    [(2, "[2] Olm"), ("2", "[2] Olm"), ("[2]", "[2] Olm"), ("olm", "[2] Olm"), (" Ilse  Marn", "[3] Ilse")],
)
def test_a_paragraph_is_read_by_number_or_title(paragraph: object, shown: str) -> None:
    assert say(begun(), read(paragraph))[0].startswith(shown)


@pytest.mark.parametrize("paragraph", [5, -1, "99999999999999999999", "Ilse Morn", "", "²", "[]"])
def test_a_paragraph_that_is_not_there_is_said(paragraph: object) -> None:
    told = say(begun(), read(paragraph))[0]
    assert told.startswith(f"Error: there is no paragraph {str(paragraph)!r}; give a number from 0 to 4, or a title.")
    assert told.endswith("Did you mean 'Ilse Marn'?") == (paragraph == "Ilse Morn")


def test_the_number_of_results_is_the_configured_one_and_has_a_limit() -> None:
    def shown(**arguments: Any) -> int:
        return len(say(begun(top_k=2, max_k=3), search("bridge river Marn Norway newspaper", **arguments))[0].split("\n"))

    assert [shown(), shown(k=1), shown(k=0), shown(k=-4), shown(k=100), shown(k=None)] == [2, 1, 2, 1, 3, 2]


def test_one_reply_cannot_read_everything() -> None:
    told = say(begun(max_calls=2), *(read(i) for i in range(4)))[4]["messages"]
    assert [message["content"][:3] for message in told] == ["[0]", "[1]", "Not", "Not"]


def test_snippets_are_cut_between_words_or_not_at_all() -> None:
    assert say(begun(snippet_chars=20), search("Olm river", k=1))[0] == "[2] Olm: The Olm is a river..."
    assert say(begun(snippet_chars=1), search("Olm river", k=1))[0] == "[2] Olm: T..."
    assert say(begun(snippet_chars=None), search("Marn born", k=1))[0].endswith("1942.")


def test_an_unanswerable_question_is_answered_by_saying_so() -> None:
    for text, score in (("Unanswerable.", 1.0), ("Norway", 0.0), ("", 0.0)):
        step = say(begun(unanswerable_row(), **FREE), answer(text, [1]))
        assert paid(step) == {"answer_f1": score}
        assert step[4]["metrics"]["acc"] == score
        assert "support_f1" not in step[4]["metrics"]
    assert (
        paid(say(begun(unanswerable_row(), unanswerable_answer="not in here", **FREE), answer("not in here")))["answer_f1"] == 1.0
    )
    partly = say(begun(unanswerable_row(), unanswerable_answer="not in here", **FREE), answer("not in Norway"))
    assert paid(partly)["answer_f1"] == 0.0
    assert paid(say(begun(**FREE), answer("unanswerable")))["answer_f1"] == 0.0


def test_the_prompt_tells_of_unanswerable_questions_where_there_may_be_some() -> None:
    sentence = 'the answer is "unanswerable".'
    assert sentence in begun().system_prompt
    assert sentence not in MuSiQue().system_prompt
    assert sentence not in begun(answerable=True).system_prompt
    assert "You have 5 replies." in begun(max_turns=5).system_prompt
    assert begun(system_prompt="Play.").system_prompt == "Play."


def test_worked_examples_are_whole_conversations_with_sound_calls() -> None:
    assert begun().examples == ()
    env = begun(shown_examples=3)
    messages = env.examples
    assert sum(message["role"] == "user" for message in messages) == 3
    for call, told in pairwise(messages):
        if call["role"] == "assistant":
            (made,) = call["tool_calls"]
            name = made["function"]["name"]
            assert told["role"] == "user" if name == "answer" else told["tool_call_id"] == made["id"]
            env.tool_methods[name].arguments(made["function"]["arguments"])
        else:
            assert told["role"] in ("assistant", "user")
    ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert len(set(ids)) == len(ids)
    assert all(len(name) == 9 and name.isalnum() for name in ids)  # what Mistral's templates insist on


def test_fewer_tools_are_offered_shown_and_run() -> None:
    env = begun(offered_tools=["answer", "search"], shown_examples=3)
    assert [tool.name for tool in env.tools] == ["search", "answer"]
    shown = [call["function"]["name"] for message in env.examples for call in message.get("tool_calls", ())]
    assert shown == ["search", "search", "answer"] * 3
    assert say(env, read(0))[0] == "Error: there is no tool 'read'. Tools: search, answer."


def test_one_corpus_for_all_questions() -> None:
    env = begun(river_row(), corpus="all", **FREE)
    assert say(env, search("Tolvar", k=1))[0].startswith("[1] Tolvar Bridge")
    assert paid(say(env, read("Olm"))) == {"support_found": pytest.approx(0.5 / 3)}
    assert paid(say(env, answer("seven", [2, 5, 6]))) == {"answer_f1": 1.0, "citation": 0.25}


def test_paragraphs_that_a_corpus_lacks_can_be_neither_found_nor_cited(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"title": "Olm", "text": "The Olm is a river with seven bridges."}\n')
    env = begun(river_row(), corpus=str(path), support_reward=1.0, citation_reward=1.0, **FREE)
    assert paid(say(env, read(0))) == {"support_found": pytest.approx(1 / 3)}
    assert paid(say(env, answer("seven", [0])))["citation"] == pytest.approx(0.5)


def test_the_same_calls_give_the_same_episode() -> None:
    calls = (search("river"), search("bridge architect", k=5), read(0), answer("Norway", [3]))
    assert [say(begun(), *calls)] * 2 == [say(begun(), *calls) for _ in range(2)]


def test_many_episodes_at_once_share_one_index() -> None:
    row = bridge_row(question="Asked by sixty-four?", paragraphs=[*bridge_row()["paragraphs"], *river_row()["paragraphs"]])
    with ThreadPoolExecutor(64) as pool:
        envs = list(pool.map(lambda _: begun(row), range(64)))
        steps = list(pool.map(lambda env: say(env, search("river bridge")), envs))
    assert len({id(env._episode.corpus) for env in envs}) == 1
    assert all(step == steps[0] for step in steps)
    assert len(QUESTIONS._made) <= QUESTIONS.size


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"top_k": 0}, r"args\.top_k = 0 must be at least 1"),
        ({"top_k": 6}, r"args\.top_k = 6 must be at most args\.max_k = 5"),
        ({"max_turns": 0}, r"args\.max_turns = 0 must be at least 1"),
        ({"max_calls": 0}, r"args\.max_calls = 0 must be at least 1"),
        ({"search_cost": -0.1}, r"args\.search_cost = -0\.1 must be at least 0"),
        ({"format_reward": float("nan")}, r"args\.format_reward = nan must be at least 0"),
        ({"snippet_chars": -1}, r"args\.snippet_chars = -1 must be at least 0"),
        ({"shown_examples": 4}, r"args\.shown_examples = 4 must be from 0 to 3"),
        ({"offered_tools": ["serch", "answer"]}, r"args\.offered_tools names 'serch'\. Did you mean 'search'\?"),
        ({"offered_tools": ["search"]}, r"args\.offered_tools = \['search'\] must hold 'answer'"),
        ({"without_call": "stop"}, r"args\.without_call = 'stop' must be 'remind' or 'end'"),
        ({"train": "bdsaglam/musique"}, r"data 'bdsaglam/musique' is not of the form 'id,configuration,split'"),
        ({"topk": 3}, r"args\.topk is not an argument of environment 'musique'\. Did you mean 'top_k'"),
    ],
)
def test_bad_arguments_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make("musique", args)


def test_splits_and_filters_that_leave_nothing_are_named() -> None:
    env = begun()
    with pytest.raises(ValueError, match=r"MuSiQue has no split 'test'\. Known: train, validation"):
        env.tasks("test")
    with pytest.raises(
        ValueError, match=r"args\.hops = \[4\] and args\.answerable = None leave none of the 1 rows of args\.train"
    ):
        begun(hops=[4]).tasks("train")
    with pytest.raises(ValueError, match=r"args\.corpus = 'everything' must be"):
        begun(corpus="everything")
    broken = bridge_row(paragraphs=[{"title": "x"}])
    with pytest.raises(ValueError, match=r"MuSiQue task '2hop__1_3': every paragraph needs"):
        MuSiQue(train=[broken]).tasks("train")


def test_the_real_rows_can_be_played(data_dir: Path) -> None:
    file = data_dir / "musique" / "musique_ans_train_with_paragraphs.jsonl"
    if not file.is_file():
        pytest.skip("TURNWISE_DATA has no MuSiQue")
    spec = "bdsaglam/musique,answerable,train"
    env = MuSiQue(train=f"{spec}[:80]", validation=f"{spec}[80:]", hops=[2, 3, 4])
    train, held_out = env.tasks("train"), env.tasks("validation")
    assert (len(train), len(held_out)) == (80, 20)
    assert len({row["id"] for row in (*train, *held_out)}) == 100
    found = 0.0
    for row in (*train, *held_out):
        supporting = [entry["idx"] for entry in row["paragraphs"] if entry["is_supporting"]]
        assert supporting == [i for i, entry in enumerate(row["paragraphs"]) if entry["is_supporting"]]
        assert hop_count(row) == len(supporting) == len(row["question_decomposition"])
        env.reset(options={"task": row})
        found += say(env, search(row["question"]))[4]["metrics"]["supporting_found"]
        last = say(env, answer((row["answer_aliases"] or [row["answer"]])[-1], supporting))
        assert (last[4]["metrics"]["acc"], last[4]["metrics"]["support_f1"]) == (1.0, 1.0)
    assert 0.3 < found / 100 < 0.9  # the question's own words lead to a part of the evidence, not to all of it
