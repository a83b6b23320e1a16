"""Environments of other frameworks as ours: one module or folder a framework, imported when an id `SCHEME:NAME` is made."""
