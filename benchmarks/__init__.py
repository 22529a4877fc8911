"""What crosstill adds to the least that must be done: each figure is a ratio within one run."""
