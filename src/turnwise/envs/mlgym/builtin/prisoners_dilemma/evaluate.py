"""Mean payoff a round of strategy.py against a mixture of opponents, as JSON. Seed and number of games are in games.json."""

import json
import random
import runpy
import sys
from collections.abc import Callable

Round = tuple[int, int]  # (own choice, the other's)
Strategy = Callable[[list[Round]], int]

ROUNDS = 10
PAYOFF = {(0, 0): 3, (0, 1): 0, (1, 0): 5, (1, 1): 1}  # (mine, theirs) -> what I earn

# each takes (history as the opponent sees it: pairs (its own choice, the other's), a random generator)
OPPONENTS: dict[str, Callable[[list[Round], random.Random], int]] = {
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


def play(strategy: Strategy, draw: random.Random) -> int:
    history: list[Round] = []
    earned = 0
    for _ in range(ROUNDS):
        opponent = OPPONENTS[draw.choice(sorted(OPPONENTS))]
        theirs = opponent([(other, own) for own, other in history], draw)
        mine = strategy(list(history))
        if mine not in (0, 1):
            sys.exit(f"row_strategy returned {mine!r}; it must return 0 or 1")
        history.append((int(mine), theirs))
        earned += PAYOFF[history[-1]]
    return earned


with open("games.json") as file:
    settings = json.load(file)
strategy = runpy.run_path("strategy.py")["row_strategy"]
draw = random.Random(settings["seed"])
total = sum(play(strategy, draw) for _ in range(settings["games"]))
print(json.dumps({"Score": total / settings["games"] / ROUNDS}))
