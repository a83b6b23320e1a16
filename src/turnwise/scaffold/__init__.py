"""`turnwise new-env`: a package of one environment, with its entry point, tests and a configuration that trains at once."""

from turnwise.scaffold.package import Kind, files_of, write_package

__all__ = ["Kind", "files_of", "write_package"]
