"""An engine's worker as a process: `python broadcast_worker.py RENDEZVOUS RANK FOLDER TIMEOUT_S [--die-after N]`.

Prints a line with the digest of each version that it receives: one for each folder in FOLDER, ascending, as soon as it is there.
"""

import argparse
import os
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rendezvous")
    parser.add_argument("rank", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("timeout_s", type=float)
    parser.add_argument("--versions", type=int, default=1)
    parser.add_argument("--die-after", type=int, default=None, help="tensors after which the process is gone")
    arguments = parser.parse_args()
    from turnwise.transport import BroadcastError, Digest, Manifest, Receiver

    receiver = None
    try:
        for version in range(arguments.versions):
            while not (arguments.folder / str(version) / "go").exists():
                time.sleep(0.01)
            manifest = Manifest.read(arguments.folder / str(version))
            receiver = receiver or Receiver(
                arguments.rendezvous, rank=arguments.rank, manifest=manifest, timeout_s=arguments.timeout_s
            )
            digest = Digest()
            for index, (name, tensor) in enumerate(receiver.receive(manifest)):
                if index == arguments.die_after:
                    os._exit(9)
                digest.add(name, tensor)
            print(digest.hexdigest(), flush=True)
    except BroadcastError as error:
        print(f"BroadcastError: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
