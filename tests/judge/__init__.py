"""The standing judge: random graphs, what has to hold for each of them, and the smallest graph that breaks it."""
