"""Whether the Hugging Face hub answers, asked once, before its clients ask again and again."""

import os
import socket
import urllib.request
from collections.abc import MutableMapping
from urllib.parse import urlsplit

OFFLINE, ENDPOINT = "HF_HUB_OFFLINE", "HF_ENDPOINT"
TIMEOUT_S = 3.0


def go_offline_without_hub(environment: MutableMapping[str, str] = os.environ) -> tuple[str, ...]:
    """Set HF_HUB_OFFLINE where no connection to the hub can be made: its clients would try for 20 s at every question.

    To be called before anything imports `huggingface_hub`, which reads the variable once. Behind a proxy nothing is tried or set.

    Returns:
        Lines for the user; none where nothing was set.
    """
    if environment.get(OFFLINE) or urllib.request.getproxies():
        return ()
    url = urlsplit(environment.get(ENDPOINT) or "https://huggingface.co")
    try:
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), TIMEOUT_S):
            return ()
    except OSError as error:
        environment[OFFLINE] = "1"
        return (
            f"{url.hostname} cannot be reached ({error}): of models and data sets there, only what is in the cache is known.",
        )
