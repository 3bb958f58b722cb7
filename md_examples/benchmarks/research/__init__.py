"""Trials of ``research_convex.py``: one module per family; :mod:`.catalogue` lists them in the order in which they run."""
