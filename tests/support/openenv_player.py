"""Plays environments of one id side by side: `openenv_player.py ID ARGS SESSIONS`, a line of JSON out for each line in.

ARGS are JSON. The first line out is of the resets to the tasks 0, 1 and so on; each line in is a reply in every episode. An error
is `{"error": ...}`. The end of the input is that of the run.
"""

import json
import sys
from collections.abc import Callable, Sequence

from turnwise.envs import TextEnv, make


def told(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def begin(envs: Sequence[TextEnv]) -> list[str]:
    return [env.reset(seed=0, options={"task": env.tasks("train")[number]})[0] for number, env in enumerate(envs)]


def main() -> None:
    name, args, sessions = sys.argv[1:]
    envs = [make(name, json.loads(args)) for _ in range(int(sessions))]
    print(json.dumps(told(lambda: begin(envs))), flush=True)
    for line in sys.stdin:
        print(json.dumps([told(lambda env=env, line=line: env.step(line.strip())) for env in envs]), flush=True)
    for env in envs:
        env.close()


if __name__ == "__main__":
    main()
