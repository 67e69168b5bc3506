"""Coverage-guided fuzzing of all that reads what others wrote, and the native core under sanitizers: see README.md."""
