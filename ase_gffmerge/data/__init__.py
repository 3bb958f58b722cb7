"""Data sets and frame files: manifests, downloads, readers, splits (nothing here imports torch)."""
