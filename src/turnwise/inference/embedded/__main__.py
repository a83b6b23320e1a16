"""`python -m turnwise.inference.embedded --config CONFIG --port P`: serve the configured model from this process."""

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path

from turnwise.config import RLConfig, load_config

# Idle OpenMP threads sleep at once. Spinning, their default, gains a little on quiet cores and ruins shared ones: two threads
# on two busy cores decoded 7 tokens a second spinning, 254 sleeping (8 rows of the 135M model in float32).
WAIT_POLICY = "PASSIVE"


async def serve(config: RLConfig, host: str, port: int) -> None:
    """Load the model, listen, and run until SIGTERM or SIGINT."""
    from aiohttp import web

    from turnwise.inference.embedded.build import build_server

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await asyncio.to_thread(build_server, config)
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
        logging.getLogger(__name__).info("serving %s on http://%s:%d", config.model.name, host, port)
        await stopped.wait()
    finally:
        server.engine.stop()
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m turnwise.inference.embedded", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration of the run (TOML)")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--host", help="address to listen on; inference.host of the configuration when unset")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)  # read when torch loads its OpenMP runtime, which is still to come
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = load_config(arguments.config)
    asyncio.run(serve(config, arguments.host or config.inference.host, arguments.port))


if __name__ == "__main__":
    main()
