"""Measure what crosstill adds to the least that must be done, as ratios within one run.

`latency`, `agreement`, `over_http`, `data_forms` and `structure` print other figures too.
"""
