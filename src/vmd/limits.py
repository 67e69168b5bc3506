"""Every bound of vmd, in one place: unit last in the name, the reason above it."""

from __future__ import annotations

# --- handshake -------------------------------------------------------------------------------

# A peer that connected has this long for its whole handshake (interfaces.md, "One VMM").
# Firecracker sends it in one message right after connecting; more is a stuck or hostile peer.
HANDSHAKE_PEER_SECONDS = 10.0

# A region takes about 120 bytes; 1 MiB is room for eight thousand of them (interfaces.md).
HANDSHAKE_BODY_BYTES_MAX = 1 << 20

# sockaddr_un.sun_path with its terminating zero (unix(7)).
SOCKET_PATH_BYTES_MAX = 107

# --- page server -----------------------------------------------------------------------------

# The oldest fault may wait this long (EAGAIN while a REMOVE is pending lasts milliseconds).
# Beyond it the guest is as good as hung: the VM is failed and killed, never left hanging.
FAULT_UNSERVED_SECONDS_MAX = 10.0

# The kernel says that a VMM's memory has gone (ESRCH) when it begins to free it, and its pidfd says
# that the VMM has exited when it is done: about 70 ms a GiB. Beyond this it is no exit.
VMM_EXIT_SECONDS = 30.0

# Reads of the image that fail are tried this often in all before the page counts as lost.
IMAGE_READ_TRIES = 3

# Lines on stderr that name single pages; the rest becomes a count (interfaces.md, "End").
POISON_LINES_MAX = 10

# Default of VMD_PREFETCH_MAX_BYTES: 100 sandboxes must not read 100 whole images.
PREFETCH_BYTES_MAX = 1 << 30

# The sequential fallback stops when less than this share of the host's memory is available.
PREFETCH_MEMORY_FLOOR_PERCENT = 10

# The statistics file is replaced this often while serving (interfaces.md, "--stats").
STATS_PERIOD_SECONDS = 0.2

# SIGTERM to exit of `pages serve` (interfaces.md, "End"); waits inside it are cut shorter.
PAGES_STOP_SECONDS = 0.5

# --- pager -----------------------------------------------------------------------------------

# The pager answers within a millisecond, and within its start-up of some 10 ms when it is new; it
# may have to look through an image of many holes first.
PAGER_REPLY_SECONDS = 10.0

# The pager ends when it has had nothing to serve for so long: the next sandbox often follows at once.
PAGER_IDLE_SECONDS = 0.5

# --- recording -------------------------------------------------------------------------------

# Settle detector: sample period, least time, and quiet ticks in a row that end a recording.
SETTLE_TICK_SECONDS = 0.1
SETTLE_LEAST_SECONDS = 0.5
SETTLE_QUIET_TICKS = 3

# Default of VMD_UFFD_RECORD_MAX_SECONDS.
RECORD_SECONDS_MAX = 10.0

# A log names each page once; 16 million lines are 64 GiB of 4 KiB pages.
ACCESS_LOG_LINES_MAX = 1 << 24

# --- VMM -------------------------------------------------------------------------------------

# Firecracker's API socket appears 1-2 ms after exec; a loaded host may take a thousand times that.
VMM_SOCKET_SECONDS = 5.0

# LoadSnapshot (design.md): a VMM that takes longer is stuck, most likely on its own memory.
VMM_LOAD_SECONDS = 30.0

# Writing a full snapshot moves all of the guest's memory through the disk.
VMM_SNAPSHOT_SECONDS = 120.0

# Any other API request is answered within a millisecond.
VMM_REQUEST_SECONDS = 10.0

# A reply of Firecracker's API is a status line and at most one JSON error.
VMM_REPLY_BYTES_MAX = 1 << 20

# SIGKILL to death; a VMM in the middle of a page fault needs its page server to be gone first.
VMM_KILL_SECONDS = 10.0

# --- guest -----------------------------------------------------------------------------------

# First boot of the built-in guest, which writes most of its memory: about 2 s a GiB here.
GUEST_BOOT_SECONDS = 120.0

# A restored guest answers its first ping in milliseconds; a slow disk may take seconds.
GUEST_READY_SECONDS = 30.0

# One command line on the built-in guest's console, tag included (guest/micro/README.md).
CONSOLE_LINE_BYTES_MAX = 255

# An answer line of the guest; the guest is not trusted to end it.
CONSOLE_REPLY_BYTES_MAX = 4096

# Default bound of `vmd exec`: a full check of a 4 GiB guest on demand takes about a minute.
EXEC_SECONDS = 120.0

# --- host ------------------------------------------------------------------------------------

# The locks in the state and run directories are held for a few system calls. Whoever holds one for
# longer is stopped, or means ill; the command that waits says so and ends.
STORE_LOCK_SECONDS = 5.0

# Default of VMD_MAX_CONCURRENT_RESTORES.
CONCURRENT_RESTORES_MAX = 100

# Names of templates become directory names.
NAME_CHARS_MAX = 63
