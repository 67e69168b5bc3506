"""vmd: Firecracker sandboxes that start before their memory has arrived."""
