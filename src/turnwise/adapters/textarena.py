"""Games of textarena: those of one player, and those of two against an opponent who plays at random."""

import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from turnwise.adapters.answers import bounded_text, finite_number
from turnwise.adapters.global_random import OwnRandomness
from turnwise.adapters.packages import optional_package
from turnwise.adapters.seeds import rows_of, seed_of, seeded_splits
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.suggest import did_you_mean

PLAYERS = {"SinglePlayerState": 1, "TwoPlayerState": 2}
CELLS = tuple(f"[{k}]" for k in range(9))
OPPONENT_ACTIONS: Mapping[str, tuple[str, ...]] = {  # every action of the game, legal now or not
    "TicTacToe": CELLS,
    "ReverseTicTacToe": CELLS,
    "ConnectFour": tuple(f"[col {k}]" for k in range(7)),
    "SimpleTak": tuple(f"[{k}]" for k in range(64)),
    "Nim": tuple(f"[{pile} {count}]" for pile in range(5) for count in range(1, 12)),
    "KuhnPoker": ("[check]", "[bet]", "[call]", "[fold]"),
    "PigDice": ("[roll]", "[hold]"),
    "IteratedRockPaperScissors": ("[rock]", "[paper]", "[scissors]"),
    "IteratedMatchingPennies": ("[heads]", "[tails]"),
}
MOST_MOVES = 1000  # of the opponent in a row; a game that never comes back to the player is broken


class TextArena(TextEnv):
    """A game of textarena: `textarena:GuessTheNumber-v0`."""

    component_names = frozenset({"reward"})
    outcome_components = frozenset({"reward"})

    def __init__(
        self,
        *,
        source: str,
        env_args: Mapping[str, Any] | None = None,
        player: Literal[0, 1] | None = None,
        opponent_actions: Sequence[str] | None = None,
        instructions: str = "",
        unfinished_reward: float = 0.0,
        max_turns: int = 50,
        num_train: int = 1024,
        num_validation: int = 128,
        seed: int = 0,
    ) -> None:
        """Make the game and see how many play it.

        Args:
            source: textarena's id; of its wrappers those of actions are kept, but not those of observations, since a
                conversation holds what was said before.
            env_args: keyword arguments of the game.
            player: the seat of the policy in a game of two; by turns, from task to task, when not given.
            opponent_actions: actions from which the opponent draws; those of `OPPONENT_ACTIONS` when not given.
            instructions: stand before the game's own first message.
            unfinished_reward: the reward of a game that `max_turns` or a full context cuts off.
            max_turns: replies of the policy in one game.
            num_train: training tasks; each is the seed of a game.
            num_validation: held-out tasks.
            seed: the first of the seeds.

        Raises:
            ValueError: for a game that cannot be made or played here, with the reason, or arguments that do not fit.
        """
        super().__init__()
        if player not in (None, 0, 1):
            raise ValueError(f"args.player = {player!r} must be 0 or 1, or be left out")
        if max_turns < 1:
            raise ValueError(f"args.max_turns = {max_turns} must be at least 1")
        self.source, self.system_prompt, self.max_turns = source, instructions, max_turns
        self.splits = seeded_splits(f"textarena/{source}", num_train=num_train, num_validation=num_validation, seed=seed)
        self.unfinished_reward = finite_number(unfinished_reward, what="args.unfinished_reward")
        self.seat, self.player = player, 0
        self.randomness = OwnRandomness(seed)
        with self.randomness():
            self.unplayed = _make(source, env_args or {})
            self.players = _count_players(self.unplayed, source)
        self.game = self.unplayed
        self.opponent_actions = self._opponent_actions(opponent_actions) if self.players == 2 else ()
        self.opponent = random.Random(seed)
        self.metrics: dict[str, float] = {}

    def tasks(self, split: str) -> Sequence[Task]:
        """Seeds of games: rows of "id" and "seed".

        Raises:
            ValueError: for an unknown split.
        """
        return rows_of(self.splits, split, source=f"textarena:{self.source}")

    def begin(self, task: Task) -> str:
        seed = seed_of(task, source=f"textarena:{self.source}")
        self.randomness, self.opponent = OwnRandomness(seed), random.Random(seed)
        self.player = (seed % 2 if self.seat is None else self.seat) if self.players == 2 else 0
        self.metrics = {"finished": 0.0}
        with self.randomness():
            self.game = deepcopy(self.unplayed)  # some games keep more than their state, a shuffled deck for instance
            self.game.reset(num_players=self.players, seed=seed)
        if self._let_opponent_play():
            raise RuntimeError(f"textarena:{self.source} was over before the policy's first move, at seed {seed}")
        return self._news()

    def step(self, action: str) -> Step:
        self.turn += 1
        done = self._play(action) or self._let_opponent_play()
        if not done:
            return self.answer(self._news())
        rewards, told = _core(self.game).close()
        what = f"the reward of player {self.player} in textarena:{self.source}"
        if not isinstance(rewards, Mapping) or self.player not in rewards:
            raise ValueError(f"{what} is missing: the game ended with the rewards {rewards!r}")
        reward = finite_number(rewards[self.player], what=what)
        own = told.get(self.player, {})
        self.metrics = {"finished": 1.0, "ended_by_invalid_move": float(bool(own.get("invalid_move")))}
        if self.players == 2:
            self.metrics["win"] = float(reward > 0)
        return self.end(f"{self._news()}\n{own.get('reason') or ''}".strip(), components={"reward": reward})

    def closing_components(self) -> dict[str, float]:
        return {"reward": self.unfinished_reward}

    def episode_metrics(self) -> dict[str, float]:
        return dict(self.metrics)

    def _play(self, action: str) -> bool:
        """One move of whoever is to move; whether the game is over."""
        try:
            with self.randomness():
                return bool(self.game.step(action=action)[0])
        except TimeoutError:
            raise
        except Exception as error:
            name = type(error).__name__
            raise RuntimeError(f"textarena:{self.source} failed on the move {action[:80]!r}: {name}: {error}") from error

    def _let_opponent_play(self) -> bool:
        """Moves of the opponent until the policy is to move again; whether the game is over."""
        for _ in range(MOST_MOVES):
            if self.players == 1 or self.game.state.current_player_id == self.player:
                return False
            _core(self.game).get_observation()  # as a player would, who asks before each move
            if self._play(self._opponent_move()):
                return True
        raise RuntimeError(f"textarena:{self.source} did not come back to the policy within {MOST_MOVES} moves")

    def _opponent_move(self) -> str:
        """A random one of the actions that the game takes: each is tried on a copy of the game."""
        for action in self.opponent.sample(self.opponent_actions, len(self.opponent_actions)):
            with self.randomness(keep=False):
                trial = deepcopy(self.game)
                mover, errors = trial.state.current_player_id, trial.state.error_count
                trial.step(action=action)
            told = trial.state.game_info[mover]
            if not told["invalid_move"] and not (trial.state.current_player_id == mover and trial.state.error_count > errors):
                return action
        raise RuntimeError(
            f"the opponent of textarena:{self.source} has no valid move among {', '.join(self.opponent_actions[:8])}; "
            "give all that the game has by args.opponent_actions"
        )

    def _news(self) -> str:
        """What the game told the policy since it was last asked, without the policy's own words."""
        core = _core(self.game)
        state = core.state
        if state.done:
            told, state.observations[self.player] = state.observations[self.player], []
        else:
            told = core.get_observation()[1]
        what = f"the observation of textarena:{self.source}"
        if isinstance(told, str):
            return bounded_text(told, what=what)
        mine = {self.player, -1} if self.players == 1 else {self.player}  # some games of one player sign his words themselves
        shown = [
            text if sender == -1 else f"[{state.role_mapping.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in told
            if not (getattr(kind, "name", kind) == "PLAYER_ACTION" and sender in mine)  # a few games give kinds as text
        ]
        return bounded_text("\n".join(shown), what=what)

    def _opponent_actions(self, given: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(given, str) or (given is not None and not given):
            raise ValueError(f"args.opponent_actions = {given!r} must be a list of actions")
        if given is not None:
            return tuple(map(str, given))
        name = self.source.partition("-")[0]
        if name not in OPPONENT_ACTIONS:
            raise ValueError(
                f"textarena:{self.source} is a game of two, for which no opponent is known. Opponents play "
                f"{', '.join(OPPONENT_ACTIONS)}; for others give the list of all actions by args.opponent_actions"
            )
        return OPPONENT_ACTIONS[name]


def _make(source: str, env_args: Mapping[str, Any]) -> Any:
    arena = optional_package("textarena", extra="textarena")
    known: Sequence[str] = list(arena.envs.registration.ENV_REGISTRY)
    if source not in known:
        raise ValueError(
            f"textarena has no game {source!r}.{did_you_mean(source, known)} It has {len(known)}, see its documentation"
        )
    try:
        return arena.make(source, **env_args)
    except LookupError as error:
        raise ValueError(
            f"textarena:{source} needs word lists that NLTK fetches from the network, and they are not here. Fetch them where "
            "there is one by: python -m nltk.downloader words averaged_perceptron_tagger_eng"
        ) from error
    except SyntaxError as error:
        raise ValueError(f"textarena:{source} is written for a newer Python than this one: {error}") from error
    except Exception as error:  # games want keys of web services, further packages, or other arguments
        raise ValueError(f"textarena:{source} cannot be made with args.env_args = {dict(env_args)}: {error}") from error


def _count_players(unplayed: Any, source: str) -> int:
    reasons: list[str] = []
    for count in (1, 2):
        game = deepcopy(unplayed)
        try:
            game.reset(num_players=count, seed=0)
        except Exception as error:  # an assertion in most games, something worse in some
            reasons.append(f"with {count}: {error}")
            continue
        if PLAYERS.get(type(game.state).__name__) == count:
            return count
        reasons.append(f"with {count}: it keeps a {type(game.state).__name__}")
    raise ValueError(f"textarena:{source} is no game of one or two players ({'; '.join(reasons)}), and others are not supported")


def _core(game: Any) -> Any:
    """The game under its wrappers."""
    while "env" in vars(game):
        game = game.env
    return game
