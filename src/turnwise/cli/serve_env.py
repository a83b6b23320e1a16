"""`turnwise serve-env`: an environment as a server that clients of OpenEnv play."""

import argparse
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from turnwise.cli.arguments import AddCommand, env_arguments
from turnwise.config import ConfigError

if TYPE_CHECKING:
    from turnwise.envs import TextEnv

MAX_MESSAGE_BYTES = 4 << 20  # of one reply


def add_command(add: AddCommand) -> None:
    """Add the subcommand."""
    parser = add(
        "serve-env",
        help="serve an environment to clients of OpenEnv",
        usage="turnwise serve-env ID [--host HOST] [--port N] [--max-sessions N] [--session-timeout S] [--argument value ...]",
        epilog="Arguments of the environment follow, as of `turnwise play`. Needs turnwise[openenv]. docs/adapters.md",
        allow_abbrev=False,
    )
    parser.add_argument("id", metavar="ID", help="name, package.module:Class or SCHEME:NAME")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000 by default")
    parser.add_argument("--max-sessions", type=int, default=256, metavar="N", help="sessions at a time; 256 by default")
    parser.add_argument(
        "--session-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which an idle session ends; 600 by default",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.config import EnvConfig, OrchestratorConfig, RLConfig
    from turnwise.envs.containers import containers_of

    if options.max_sessions < 1 or options.session_timeout <= 0:
        raise ConfigError("--max-sessions and --session-timeout must be above 0.")
    arguments = env_arguments(rest)
    config = RLConfig(orchestrator=OrchestratorConfig(env=[EnvConfig(id=options.id, args=arguments)]), run_name="serve-env")
    with containers_of(config, _say) as pools:

        def make_env() -> "TextEnv":
            from turnwise.envs import make

            env = make(options.id, arguments)
            env.containers = pools
            return env

        app = _app(make_env, options)
        if not _is_loopback(options.host):
            _say(
                f"Warning: whoever reaches {options.host}:{options.port} can play on this machine; the server asks for no "
                "password. Keep it behind a firewall or an SSH tunnel, or leave --host out."
            )
        _serve(app, options)
    return 0


def _app(make_env: Any, options: argparse.Namespace) -> Any:
    try:
        from turnwise.adapters.openenv.server import make_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "openenv":
            raise
        raise ConfigError("serve-env needs the package openenv: pip install 'turnwise[openenv]'.") from error
    name = options.id.rpartition(":")[2].rpartition("/")[2]
    return make_app(make_env, name, max_sessions=options.max_sessions, session_timeout_s=options.session_timeout)


def _serve(app: Any, options: argparse.Namespace) -> None:
    import uvicorn  # pyright: ignore[reportMissingImports]  # comes with openenv

    _say(f"{options.id} for clients of OpenEnv on http://{options.host}:{options.port}; Ctrl-C ends it")
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", ws_max_size=MAX_MESSAGE_BYTES)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
