"""The machine: devices, batches that fit into memory, forked processes."""
