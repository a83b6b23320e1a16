"""Matrix products and, later, quantised layers: plain torch beside what is faster."""
