"""What `turnwise.adapters.textarena` uses of textarena 0.7: registry, states, wrappers, and three small games."""

import random
from copy import deepcopy
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any


class ObservationType(Enum):
    PROMPT = auto()
    PLAYER_ACTION = auto()
    GAME_MESSAGE = auto()


class State:
    """The common part of both states: messages to players, and what `close` tells."""

    def __init__(self, num_players: int, seed: int | None) -> None:
        if seed is not None:
            random.seed(seed)
        self.current_player_id, self.error_count, self.done, self.rewards = 0, 0, False, None
        self.role_mapping = {pid: f"Player {pid}" for pid in range(num_players)}
        self.game_info: dict[int, dict[str, Any]] = {pid: {"invalid_move": False} for pid in range(num_players)}
        self.observations: dict[int, list[Any]] = {pid: [] for pid in range(num_players)}

    def tell(self, text: str, kind: ObservationType = ObservationType.GAME_MESSAGE, sender: int = -1) -> None:
        for messages in self.observations.values():
            messages.append((sender, text, kind))

    def finish(self, rewards: Any, reason: str) -> tuple[bool, dict[str, Any]]:
        self.done, self.rewards = True, rewards
        for told in self.game_info.values():
            told["reason"] = reason
        return True, {}

    def invalid(self) -> tuple[bool, dict[str, Any]]:
        """Forgiven once, as in textarena; the second time in a row ends the game."""
        self.error_count += 1
        if self.error_count > 1:
            self.game_info[self.current_player_id]["invalid_move"] = True
            return self.finish({pid: -1 if pid == self.current_player_id else 1 for pid in self.observations}, "invalid")
        self.tell("That move is invalid.")
        return False, {}


class SinglePlayerState(State):
    pass


class TwoPlayerState(State):
    pass


class FFAMultiPlayerState(State):
    pass


class Game:
    players, state_class = 1, SinglePlayerState
    state: Any

    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == self.players, f"The number of players has to be {self.players}, received {num_players}"
        self.state = self.state_class(num_players, seed)
        self.begin()

    def get_observation(self) -> tuple[int, list[Any]]:
        pid = self.state.current_player_id
        told, self.state.observations[pid] = self.state.observations[pid], []
        return pid, told

    def close(self) -> Any:
        return self.state.rewards, self.state.game_info


class Guess(Game):
    """Guess a digit; its rewards and failures are those that tests ask for."""

    def __init__(self, reward: Any = 1.0, crash: bool = False) -> None:
        self.reward, self.crash = reward, crash

    def begin(self) -> None:
        self.secret = random.randrange(10)
        self.state.tell("Guess a digit.", ObservationType.PROMPT)

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.state.tell(action, ObservationType.PLAYER_ACTION)  # signed by the game, as some of textarena's are
        if self.crash:
            raise UnboundLocalError("player_guess")
        digit = action.strip("[]")
        if not digit.isdecimal():
            return self.state.invalid()
        self.state.error_count = 0
        if int(digit) == self.secret:
            return self.state.finish({0: self.reward}, "You found it.")
        self.state.tell(f"Not {digit}; a hint of no use: {random.random()}")
        return False, {}


class TakeOne(Game):
    """Two players take cards from a shuffled deck that survives `reset`; who has the highest when all are taken wins."""

    players, state_class = 2, TwoPlayerState

    def __init__(self) -> None:
        self.deck = [0, 1, 2, 3]

    def begin(self) -> None:
        random.shuffle(self.deck)
        self.left, self.winner = dict(enumerate(self.deck)), 0
        self.state.tell("Take a card: [0] to [3].", ObservationType.PROMPT)

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        mover = self.state.current_player_id
        self.state.tell(action, ObservationType.PLAYER_ACTION, sender=mover)
        place = action.strip("[]")
        if not place.isdecimal() or int(place) not in self.left:
            return self.state.invalid()
        self.state.error_count = 0
        card = self.left.pop(int(place))
        self.state.tell(f"Player {mover} drew {card}.")
        self.winner = mover if card == 3 else self.winner
        if not self.left:
            return self.state.finish({self.winner: 1, 1 - self.winner: -1}, f"Player {self.winner} has won!")
        self.state.current_player_id = 1 - mover
        return False, {}


class Crowd(Game):
    players, state_class = 2, FFAMultiPlayerState

    def begin(self) -> None:
        self.state.tell("Hello all.")


class WordGame(Game):
    def __init__(self) -> None:
        raise LookupError("Resource 'words' not found.")


class ActionWrapper:
    """Puts brackets where there are none."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # deepcopy asks before there is an `env`
            raise AttributeError(name)
        return getattr(self.env, name)

    def __deepcopy__(self, memo: Any) -> "ActionWrapper":
        return ActionWrapper(deepcopy(self.env, memo))

    def step(self, action: str) -> Any:
        return self.env.step(action=action if "[" in action else f"[{action}]")


class ObservationWrapper(ActionWrapper):
    """Tells everything again at every turn, which a conversation must not."""

    def get_observation(self) -> Any:
        raise AssertionError("an observation was asked of a wrapper")


REGISTRY = {"Guess-v0": Guess, "TicTacToe-v0": TakeOne, "TakeOne-v0": TakeOne, "Crowd-v0": Crowd, "Words-v0": WordGame}


def make(env_id: str, **kwargs: Any) -> Any:
    return ActionWrapper(ObservationWrapper(REGISTRY[env_id](**kwargs)))


def module() -> ModuleType:
    fake: Any = ModuleType("textarena")
    fake.make = make
    fake.envs = SimpleNamespace(registration=SimpleNamespace(ENV_REGISTRY=REGISTRY))
    return fake
