"""`turnwise sweep`: many runs, one after the other or side by side, and one page about all of them."""
