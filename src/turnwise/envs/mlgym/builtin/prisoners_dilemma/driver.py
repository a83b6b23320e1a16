"""Runs beside a submission: what strategy.py chooses in each of the games of a file, as one line of 0 and 1."""

import json
import runpy
import sys

with open(sys.argv[1]) as file:
    histories = [[tuple(pair) for pair in seen] for seen in json.load(file)]
strategy = runpy.run_path("strategy.py")["row_strategy"]
choices = [strategy(seen) for seen in histories]
if not all(choice in (0, 1) for choice in choices):
    sys.exit(f"row_strategy returned {next(c for c in choices if c not in (0, 1))!r}; it must return 0 or 1")
print("\n" + "".join(str(int(choice)) for choice in choices))
