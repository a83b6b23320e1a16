"""Tables of the configuration that no process reads: a run that names one is refused rather than run without it."""

from turnwise.config import ConfigError, RLConfig


def refuse_unused(config: RLConfig) -> None:
    """Raises ConfigError naming the tables that are set and would have no effect."""
    named = {
        "[trainer.model.quant]": ("unquantised weights", config.trainer.model.quant),
    }
    found = [f"{table} is set, and this version would run with {instead}" for table, (instead, value) in named.items() if value]
    if found:
        raise ConfigError(f"{'; '.join(found)}. Remove the table, or use a version that reads it; --dry-run works with it.")
