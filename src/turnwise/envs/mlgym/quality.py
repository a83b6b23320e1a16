"""How tidy the Python files of a workspace are, measured inside the container, where hostile files can crash nothing of ours."""

import json
import shlex

from turnwise.containers import Box, Ending

MEASURE_S = 20.0
# printed for each file: 1 if it is Python, and the shares of functions with a docstring, of lines of at most 100 characters, of
# `except` clauses that name what they catch, and of imported names that are used
SCRIPT = r"""
import ast, json, os, sys
found = []
for folder, _, names in os.walk(sys.argv[1]):
    for name in sorted(names)[:200]:
        path = os.path.join(folder, name)
        if not name.endswith(".py") or os.path.islink(path) or os.path.getsize(path) > 200000:
            continue
        text = open(path, encoding="utf-8", errors="replace").read()
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            found.append([0, 0, 0, 0, 0])
            continue
        nodes = list(ast.walk(tree))
        share = lambda good, every: sum(map(bool, map(good, every))) / len(every) if every else 1
        functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        handlers = [n for n in nodes if isinstance(n, ast.ExceptHandler)]
        aliases = [a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
        used = {n.id for n in nodes if isinstance(n, ast.Name)}
        found.append([1, share(ast.get_docstring, functions), share(lambda l: len(l) <= 100, text.splitlines()),
                      share(lambda h: h.type is not None, handlers),
                      share(lambda a: (a.asname or a.name).split(".")[0] in used, aliases)])
print(json.dumps(found))
"""


def code_quality(box: Box, folder: str) -> float | None:
    """Mean over the Python files below `folder` of what `SCRIPT` measures, 0 to 1; None where there is none or nothing came back.

    The script runs isolated from the user's site, on the image's own interpreter. A task that tampers with it can only lie about
    its own tidiness.
    """
    done = box.run(f"python3 -I -S -c {shlex.quote(SCRIPT)} {shlex.quote(folder)}", timeout_s=MEASURE_S)
    if done.ending is not Ending.OK:
        return None
    try:
        files = json.loads(done.output.splitlines()[-1])
        values = [float(value) for file in files for value in file]
    except (ValueError, TypeError, IndexError, RecursionError):
        return None
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        return None
    return sum(values) / len(values)
