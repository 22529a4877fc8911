"""From a bundle to a search box, without torch: encode, index, find, serve."""
