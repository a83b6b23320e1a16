"""What can go wrong between the client and an engine."""


class EngineError(RuntimeError):
    """The engine refused a request (4xx), or its answer cannot be used. Repeating it would not help; the text holds the engine's
    own words, or which engine it was and what is wrong with the answer."""


class EngineUnavailable(RuntimeError):
    """No engine answered within the allowed repetitions."""
