"""The pager: the process that serves the pages of every detached VM of a run directory.

It is native (`crates/vmd-core/src/pager`), is started when absent and ends after its last VM. A
standby beside it holds the same descriptors and goes on when it dies. Here is its owner's side:

- `start`: find it, or start it
- `control`: talk to it
- `handed`: hand a VM over to it, as a page core that lives elsewhere
- `look`: what the journal of a VM says, whoever serves it
"""
