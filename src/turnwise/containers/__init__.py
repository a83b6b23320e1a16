"""Task containers: leased from a pool, used through a shell that stays, hardened unless the configuration says otherwise."""

from turnwise.containers.backends import make_pool
from turnwise.containers.box import Box, CommandResult, Ending
from turnwise.containers.errors import (
    ContainerError,
    ContainerGone,
    EngineDown,
    ImageMissing,
    PoolBusy,
    RecipeFailed,
    TransferRefused,
)
from turnwise.containers.leases import PoolState
from turnwise.containers.pool import Pool
from turnwise.containers.pools import Pools, open_pools
from turnwise.containers.spec import DATA, HOME

__all__ = [
    "DATA",
    "HOME",
    "Box",
    "CommandResult",
    "ContainerError",
    "ContainerGone",
    "Ending",
    "EngineDown",
    "ImageMissing",
    "Pool",
    "PoolBusy",
    "PoolState",
    "Pools",
    "RecipeFailed",
    "TransferRefused",
    "make_pool",
    "open_pools",
]
