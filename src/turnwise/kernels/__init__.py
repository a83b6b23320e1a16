"""Matrix products, MXFP4 weights, and model folders that hold them: plain torch beside what is faster."""
