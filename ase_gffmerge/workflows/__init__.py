"""Several steps as one: load or merge through the cache, merge and distill, merge again on visited frames."""
