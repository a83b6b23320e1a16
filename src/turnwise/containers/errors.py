"""What can go wrong with a container that is no answer of the command which ran in it."""


class ContainerError(Exception):
    """Base of every error of this package."""


class EngineDown(ContainerError):
    """A container engine does not answer or fails: nobody's container works there; wait, score nothing, try again."""


class ContainerGone(ContainerError):
    """This container ended, and not by what ran in it: its episode is void, others are untouched."""


class ImageMissing(ContainerError):
    """The engine has no such image, and no recipe makes it."""


class RecipeFailed(ContainerError):
    """An image could not be made from its recipe."""


class PoolBusy(ContainerError):
    """No place, or no GPU, became free in time."""


class TransferRefused(ContainerError):
    """Files were not taken out of, or did not get into, a container: a hostile archive, too many bytes, no room, no such file."""
