"""Data sets and frame files: manifests, downloads, readers, frames (nothing here imports torch)."""
