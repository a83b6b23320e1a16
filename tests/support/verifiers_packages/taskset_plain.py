"""The taskset of `taskset_cases` without an environment of its own, as most are: one agent plays a task."""

from taskset_cases import Numbers as Shared


class Numbers(Shared):
    pass


__all__ = ["Numbers"]
