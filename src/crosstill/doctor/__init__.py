"""Is this machine ready, is this dataset sound? A dry run that changes nothing.

machine    versions, extras, device
dataset    what is found in a dataset that opens: leaks, captions, unreadable images
missing    listed files that are not where the listing says
"""
