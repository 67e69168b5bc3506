"""Firecracker: its API (`api`), its process (`process`), its serial line (`console`), all three as one (`vmm`)."""
