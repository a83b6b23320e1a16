"""What can go wrong between the client and an engine."""


class EngineError(RuntimeError):
    """The engine refused a request (4xx). Repeating it would not help; the text holds the engine's own words."""


class EngineUnavailable(RuntimeError):
    """No engine answered within the allowed repetitions."""
