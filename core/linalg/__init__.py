"""Matrix functions that work on shards through their layout."""
