"""Where a server is, and what it says of itself outside of episodes."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from turnwise.adapters.openenv.local import Launch, image_launch
from turnwise.adapters.openenv.wire import OpenEnvError, Refused, get_json
from turnwise.envs.base import Task

SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


def reached_by(source: str, command: Sequence[str] | None, log: str | None, start_timeout_s: float) -> tuple[str, Launch | None]:
    """The URL of a server that runs, or how it is started. Raises ValueError."""
    scheme, separator, rest = source.partition("://")
    if separator:
        if scheme not in SCHEMES or not rest.strip("/"):
            raise ValueError(f"openenv:{source}: a URL begins with {', '.join(f'{one}://' for one in SCHEMES)} and names a host")
        if command is not None:
            raise ValueError(
                f"openenv:{source} is a server that runs already; leave args.command out, or give a name for the URL"
            )
        return f"{SCHEMES[scheme]}://{rest.rstrip('/')}", None
    if not source:
        raise ValueError('openenv: needs a URL, an image, or a name beside args.command: id = "openenv:http://127.0.0.1:8000"')
    if command is None:
        return "", image_launch(source, log, start_timeout_s)
    words = tuple(map(str, command))
    if not any("{port}" in word for word in words):
        raise ValueError(
            f"args.command = {list(words)} lacks {{port}}, which stands for the port that the server shall listen on"
        )
    return "", Launch(words, log, start_timeout_s)


def schema_of(url: str, timeout_s: float) -> Mapping[str, Any]:
    """The JSON schemas of `action`, `observation` and, where it differs, `reset_observation`; asked for once."""
    if url not in _SCHEMAS:
        _SCHEMAS[url] = get_json(f"{url}/schema", timeout_s=timeout_s)
    return _SCHEMAS[url]


def server_tasks(url: str, split: str, timeout_s: float) -> Sequence[Task]:
    """A row for each task that the server counts in a split."""
    name = str(get_json(f"{url}/list_environments", timeout_s=timeout_s)[0])
    try:
        counted = get_json(f"{url}/{quote(name)}/num_tasks", timeout_s=timeout_s, body={"split": split})["num_tasks"]
    except Refused as error:
        raise OpenEnvError(f"{url} counts no tasks of the split {split!r}; give a number ({error})") from error
    return [{"id": f"{split}/{index}", "split": split, "index": index} for index in range(int(counted))]


_SCHEMAS: dict[str, Mapping[str, Any]] = {}
