"""Models with MXFP4 weights on disk: recognised, written once, and loaded by trainer and engines from the same bytes."""
