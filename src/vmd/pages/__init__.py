"""Page faults: the heart. One page server serves one VM.

The way of a VM's memory, in reading order::

    listener -> handshake (peer, jsonscan) -> regions -> core -> pages in the guest
                                                          ^
    source (the image) -----------------------------------'

`contract`       what a core is: page states, outcomes, counters; read this first
`listener`       the socket that a VMM connects to; `peer`: who connected
`handshake`      userfaultfd and memory map, believed or refused; `jsonscan`: where its array ends
`regions`        host addresses, page numbers, image offsets
`source`         the image: pread, and holes that are known zeros
`cores`          which core serves: `native` (Rust, `crates/vmd-core`) or `reference` (the oracle)
`server`         `PageServer`: socket, handshake and core of one VM, in this process
`serving`        a page server that is a process: signals, statistics file, last words
`process`        what such a process needs of its host: descriptors, lines that stay lines
`detached`       such a process beside a sandbox that outlives its maker
`stats`, `uffd`  the statistics object; the kernel's words, for the Python side

Who owns what: a `PageServer` owns listener and image until a core takes the image; a `Handshake`
owns its descriptors until a core takes them; a core closes what it took, last, when it ends. Giving
means forgetting. Page states are written by the fault thread, and by the filler only behind the
lock that the fault thread holds while it reads and applies messages.
"""
