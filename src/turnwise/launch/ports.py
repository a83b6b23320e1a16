"""TCP ports of this machine."""

import socket

from turnwise.config import ConfigError


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_range(host: str, count: int, *, tries: int = 64) -> int:
    """The first of `count` neighbouring ports that are free.

    Raises:
        ConfigError: none were found, or `host` is no address of this machine.
    """
    for _ in range(tries):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, 0))
            except OSError as error:
                raise ConfigError(f'inference.host = "{host}" is no address of this machine ({error}); use 127.0.0.1.') from error
            first = int(probe.getsockname()[1])
        if all(is_free(host, first + i) for i in range(count)):
            return first
    raise ConfigError(f"no {count} neighbouring free ports on {host}; set inference.port yourself.")


def check_free(host: str, first: int, count: int) -> None:
    """Raises ConfigError naming the first port of the range that is taken."""
    for port in range(first, first + count):
        if not is_free(host, port):
            raise ConfigError(
                f"inference.port = {first}: port {port} on {host} is in use by another process; "
                "choose another one, or leave inference.port out to take a free one."
            )
