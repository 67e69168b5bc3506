"""The machine that vmd runs on: its kernel (`kernel`), its file systems (`filesystem`)."""
