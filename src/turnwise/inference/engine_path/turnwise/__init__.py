"""This package for an interpreter of another environment, such as vLLM's.

With the folder above on its path it finds `turnwise`, and nothing else of the environment that turnwise is installed in.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
