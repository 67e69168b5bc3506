"""Proof that the tests can fail: the core is built with one sabotage at a time, and the suite must notice each.

``python -m tests.mutants [NAME ...]``. In reading order:

- `table`: the sabotages, each an exact text substitution in the core's source;
- `crate`: a copy of the crate, outside the sources; one sabotage applied, built in release;
- `suite`: a run of the contract suite's native half over a built module, and what came of it;
- `witness`: inside that run, sees to it that the module under test is the one that was built;
- `hunt`: one mutant from substitution to verdict.
"""
