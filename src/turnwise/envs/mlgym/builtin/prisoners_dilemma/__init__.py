"""The repeated prisoner's dilemma, judged from outside: a submission is code, which could forge what an evaluator beside it says.

The games are played here. The container of the submission is only asked, round by round and for all games at once, what it would
choose; it learns neither the seed nor the score.
"""

import json
import random
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

from turnwise.containers import HOME, Box, Ending
from turnwise.envs.mlgym.task import Half, Verdict

Round = tuple[int, int]  # (own choice, the other's): 0 cooperates, 1 defects
History = Sequence[Round]
Ask = Callable[[Sequence[History]], Sequence[int]]  # the histories of all games -> a choice for each

FOLDER = Path(__file__).parent
GAMES = 2000  # standard error of the mean payoff about 0.01
ROUNDS = 10
ROUND_S = 60.0  # for the choices of all games in one round
PAYOFF = {(0, 0): 3, (0, 1): 0, (1, 0): 5, (1, 1): 1}  # (mine, theirs) -> what I earn
SAID = 400  # characters of what a broken strategy says

# each takes the history as the opponent sees it, and a random generator
OPPONENTS: dict[str, Callable[[History, random.Random], int]] = {
    "always cooperates": lambda seen, draw: 0,
    "always defects": lambda seen, draw: 1,
    "tit for tat": lambda seen, draw: seen[-1][1] if seen else 0,
    "suspicious tit for tat": lambda seen, draw: seen[-1][1] if seen else 1,
    "tit for two tats": lambda seen, draw: int(len(seen) > 1 and seen[-1][1] == seen[-2][1] == 1),
    "grim": lambda seen, draw: int(any(other for _, other in seen)),
    "wins stay, losses shift": lambda seen, draw: (seen[-1][0] if seen[-1][1] == 0 else 1 - seen[-1][0]) if seen else 0,
    "random": lambda seen, draw: int(draw.random() < 0.5),
    "mostly cooperates": lambda seen, draw: int(draw.random() < 0.2),
    "mostly defects": lambda seen, draw: int(draw.random() < 0.8),
    "alternates": lambda seen, draw: len(seen) % 2,
}


class BadStrategy(ValueError):
    """A submission that does not choose; the text says how."""


def mean_payoff(seed: str, ask: Ask, *, games: int = GAMES) -> float:
    """What a strategy earns in a round, over games in each of whose rounds another opponent answers. Raises what `ask` raises."""
    draw = random.Random(seed)
    histories: list[list[Round]] = [[] for _ in range(games)]
    names, earned = sorted(OPPONENTS), 0
    for _ in range(ROUNDS):
        theirs = [OPPONENTS[draw.choice(names)]([(other, own) for own, other in seen], draw) for seen in histories]
        for seen, choice in zip(histories, zip(ask(histories), theirs, strict=True), strict=True):
            seen.append(choice)
            earned += PAYOFF[choice]
    return earned / games / ROUNDS


def judge(box: Box, seed: str) -> Verdict:
    """Play against the strategy in a container's workspace. Raises ContainerGone and EngineDown."""
    driver = (FOLDER / "driver.py").read_text(encoding="utf-8")

    def ask(histories: Sequence[History]) -> Sequence[int]:
        box.put({"driver.py": driver, "histories.json": json.dumps(histories)}, f"{HOME}/judge")
        done = box.run(f"cd {HOME}/workspace && python3 {HOME}/judge/driver.py {HOME}/judge/histories.json", timeout_s=ROUND_S)
        if done.ending is not Ending.OK:
            raise BadStrategy(f"the strategy ended with {done.ending}: {done.output.strip()[-SAID:]}")
        return choices_in(done.output, len(histories))

    try:
        return Verdict({"Score": mean_payoff(seed, ask)})
    except BadStrategy as error:
        return Verdict(None, words=str(error))


def choices_in(output: str, games: int) -> list[int]:
    """The choices in the last line of a driver's output. Raises BadStrategy."""
    last = output.strip().rpartition("\n")[2]
    if len(last) != games or not set(last) <= {"0", "1"}:
        raise BadStrategy(f"row_strategy must return 0 or 1 in every game; the answer was {last[:40]!r}")
    return [int(choice) for choice in last]


def starter_score(seed: str) -> float:
    """What the starter earns, which is ours."""
    strategy = runpy.run_path(str(FOLDER / "strategy.py"))["row_strategy"]
    return mean_payoff(seed, lambda histories: [strategy(list(seen)) for seen in histories])


def seed_of(variant: int, half: Half) -> str:
    """Of the games of a half."""
    return f"{variant} {half}"
