"""What verifiers loads under the id `turnwise-verifiers`: any environment of turnwise, named by `env`.

Their loaders take the name of a top-level module and nothing else, hence this one beside `turnwise`.
"""

from turnwise.adapters.for_verifiers import api, load_environment

__all__ = ["load_environment"]

if api() == "v1":
    from turnwise.adapters.for_verifiers.v1 import TurnwiseEnv, TurnwiseHarness, TurnwiseTaskset

    __all__ += ["TurnwiseEnv", "TurnwiseHarness", "TurnwiseTaskset"]
