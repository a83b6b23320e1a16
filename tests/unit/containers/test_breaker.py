"""The circuit breaker, on a clock of its own."""

from turnwise.containers.breaker import Breaker


class Watched(Breaker):
    """A breaker with a clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[tuple[str, str | None]] = []
        super().__init__(
            "e", threshold=3, pause_s=2, max_pause_s=7, clock=lambda: self.now, listener=lambda *news: self.told.append(news)
        )


def test_it_opens_after_failures_in_a_row_and_not_before():
    breaker = Watched()
    for reason in ("a", "b"):
        breaker.failure(reason)
    breaker.success()
    for reason in ("c", "d"):
        breaker.failure(reason)
    assert (breaker.reason, breaker.told) == (None, [])
    breaker.failure("e")
    assert (breaker.reason, breaker.told) == ("e", [("e", "e")])


def test_trials_come_after_pauses_that_double_to_a_limit():
    breaker = Watched()
    for _ in range(3):
        breaker.failure("x")
    pauses: list[float] = []
    for _ in range(4):
        began = breaker.now
        while not breaker.trial_due:
            breaker.now += 0.5
        pauses.append(breaker.now - began)
        breaker.failure("still")
    assert pauses == [2, 4, 7, 7]
    assert breaker.told == [("e", "x")]  # one change, one word
    assert breaker.reason == "still"


def test_failures_of_calls_that_began_before_it_opened_do_not_lengthen_the_pause():
    breaker = Watched()
    for _ in range(30):
        breaker.failure("x")
    breaker.now = 2
    assert breaker.trial_due


def test_one_success_closes_it_and_starts_anew():
    breaker = Watched()
    for _ in range(3):
        breaker.failure("x")
    breaker.now = 2
    breaker.success()
    assert (breaker.reason, breaker.trial_due, breaker.told[-1]) == (None, False, ("e", None))
    breaker.failure("x")
    assert breaker.reason is None
