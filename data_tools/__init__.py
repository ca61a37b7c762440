"""Data sets on disk: draw them, convert them to shards, check them."""
