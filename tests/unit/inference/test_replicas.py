"""Choice among engines."""

import pytest

from turnwise.inference import replicas as module
from turnwise.inference.replicas import AFFINITY_MARGIN, Replicas


def test_the_least_loaded_replica_is_chosen() -> None:
    replicas = Replicas(["http://a", "http://b", "http://c"])
    for replica, load in zip(replicas.all, (3, 1, 2), strict=True):
        replica.load = load
    assert replicas.choose(None).url == "http://b"


def test_a_conversation_leaves_its_replica_only_beyond_the_margin() -> None:
    replicas = Replicas(["http://a", "http://b"])
    home = replicas.choose("x")
    home.load = AFFINITY_MARGIN
    assert replicas.choose("x") is home
    home.load = AFFINITY_MARGIN + 1
    assert replicas.choose("x") is not home


def test_a_failed_replica_is_avoided_until_it_answers() -> None:
    replicas = Replicas(["http://a", "http://b"])
    first, second = replicas.all
    second.load = 100
    first.failed()
    assert replicas.choose(None) is second
    first.answered()
    assert replicas.choose(None) is first


def test_a_replica_that_failed_this_request_comes_last() -> None:
    replicas = Replicas(["http://a", "http://b"])
    first, second = replicas.all
    second.load = 100
    assert replicas.choose(None, [first]) is second


def test_the_memory_of_conversations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFFINITY_ENTRIES", 10)
    replicas = Replicas(["http://a", "http://b"])
    for i in range(100):
        replicas.choose(str(i))
    assert len(replicas._known) == 10  # pyright: ignore[reportPrivateUsage]


def test_no_urls_are_refused() -> None:
    with pytest.raises(ValueError, match="names no engine"):
        Replicas([])


def test_a_replica_is_busy_from_its_first_request_to_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    replica = Replicas(["http://a"]).all[0]
    for passed, event in ((3.0, replica.sent), (1.0, replica.sent), (2.0, replica.returned), (4.0, replica.returned)):
        now += passed
        event()
    now += 100.0
    assert (replica.load, replica.busy_s()) == (0, 7.0)
    replica.sent()
    now += 0.5
    assert replica.busy_s() == 7.5
