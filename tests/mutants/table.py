"""The sabotages: in ``file`` of the core's source, ``old`` (found exactly once, else the run fails) becomes ``new``.

``tests`` names the files of the contract suite that ought to notice, by stem and in the order of
running; they only save time, for a mutant that they miss is hunted by all the others. A mutant must
compile, and must be wrong: one that changes speed only, or nothing that anybody can see, is no proof.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One sabotage, and in words what it does."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str


def _faults(name: str, what: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, what, "faults.rs", old, new, tests)


def _demand(name: str, what: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, what, "demand.rs", old, new, tests)


def _fill(name: str, what: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, what, "fill.rs", old, new, tests)


# fmt: off
MUTANTS = [
    # which bytes
    Mutant("wrong-offset", "a region's place in the image is taken for 0", "regions.rs",
           "self.ordered[at].offset + (page", "(page", "content"),
    _faults("stale-byte", "the first byte of a demand page is the one of the page before",
            "read_now(&mut self.buffer, offset)", "read_now(&mut self.buffer[1..], offset + 1)", "content"),
    Mutant("stale-byte-cold", "the first byte of a demand page that comes from storage is zero", "cold.rs",
           "let mut result = self.image.read(&mut bytes, offset);",
           "let mut result = self.image.read(&mut bytes[1..], offset + 1);", "cold"),
    _fill("stale-piece", "a piece in the middle of a run gets the bytes of the run's beginning",
          "let from = (piece.start - run.pages.start) * page_size;", "let from = 0;", "sequential replay"),
    _fill("stale-buffer", "the cold reader's runs are installed from the beginning of their buffer",
          "taken.push((run, filled));", "taken.push((run, 0));", "cold"),
    Mutant("hole-eats-data", "a run of zeros goes on over the data behind it", "plan.rs",
           "&& self.vm.is_hole(page) == hole)", ")", "sequential"),
    Mutant("hole-off-by-one", "the last page before a hole is taken for a hole", "image.rs",
           "|&(_, end)| end <= offset)", "|&(_, end)| end <= offset + len)", "content"),
    _demand("poison-zeros", "a page that cannot be read is filled with zeros",
            "self.uffd.poison(address, self.regions.page_size)", "self.zero(page, 1)", "unreadable"),
    _fill("partial-is-whole", "of a run that went in in part the rest is taken for installed",
          "(bytes / vm.regions.page_size) as usize,", "piece.len(),", "partial"),

    # no fault is lost
    _faults("dropped-fault", "of faults that are read together only the first is served",
            "for at in 0..self.faults.len() {", "for at in 0..self.faults.len().min(1) {", "crowd"),
    _demand("eagain-dropped", "a fault that is refused with EAGAIN counts as served",
            "Outcome::Later | Outcome::Partial(_) => return Ok(Progress::Refused),",
            "Outcome::Later | Outcome::Partial(_) => {}", "outcomes"),
    _faults("never-retried", "a parked fault has no timer",
            "(false, _) => Some(self.retry_after),", "(false, _) => None,", "outcomes"),
    _demand("wake-forgotten", "who waits for a page that is there (EEXIST) is not woken",
            "self.uffd.wake(address, self.regions.page_size);", "", "outcomes"),
    _faults("overdue-ignored", "a fault may wait for ever",
            "if fault.read_at.elapsed() > self.vm.limits.fault_unserved", "if false", "outcomes"),

    # removed stays removed
    _faults("remove-ignored", "a REMOVE is read and forgotten",
            "abi::EVENT_REMOVE | abi::EVENT_UNMAP =>", "abi::EVENT_REMOVE => {}\n            abi::EVENT_UNMAP =>",
            "removed"),
    _demand("removed-not-sticky", "a fault on a removed page gets the snapshot's bytes",
            "self.states().get(page) == State::Absent &&",
            "matches!(self.states().get(page), State::Absent | State::Removed) &&", "removed"),
    _faults("removed-while-read", "a page that was removed while storage was asked for it gets the snapshot's bytes",
            "if !self.vm.needs_image(read.page) {", "if false {", "cold"),
    _faults("released-never", "who waits for a page that was removed while storage was asked for it waits for ever",
            "if self.vm.needs_image(fault.page) {\n", "if true {\n", "cold"),
    _fill("removed-refilled", "the filler fills pages that were removed",
          "vm.states().get(*page) == State::Absent;", "vm.states().get(*page) != State::Installed;", "removed"),
    _fill("gate-open-filler", "the filler checks and installs outside the gate",
          "let gate = vm.gate.enter_behind_demand();", "let gate = ();", "gate"),
    _faults("gate-open-faults", "REMOVEs are read and applied outside the gate",
            "let _gate = vm.enter_for_demand();", "drop(vm.enter_for_demand());", "gate"),
    _faults("faults-first", "a fault is served as soon as it is read, REMOVEs behind it or not",
            "self.faults.push(Fault { page, read_at, refused: false });",
            "self.faults.push(Fault { page, read_at, refused: false });\n"
            "self.serve_fault(self.faults.len() - 1)?;\nself.faults.pop();", "gate"),

    # killed, and taken over
    _faults("remove-lost", "messages are read into private memory, and into the journal's ring only then",
            "        let count = unsafe { self.vm.uffd.read(self.vm.outside.journal.ring(), SLOTS)? };\n"
            "        if count > 0 {\n            self.vm.pass(Point::Read);\n        }\n",
            "        let mut private = [Message::default(); SLOTS];\n"
            "        let count = unsafe { self.vm.uffd.read(private.as_mut_ptr(), SLOTS)? };\n"
            "        if count > 0 {\n            self.vm.pass(Point::Read);\n        }\n"
            "        unsafe { self.vm.outside.journal.ring().copy_from_nonoverlapping(private.as_ptr(), count) };\n",
            "takeover"),
    _faults("cleared-before-applied", "the ring is cleared before its messages are applied",
            "            let read_at = Instant::now();\n            for",
            "            let read_at = Instant::now();\n            let all: Vec<Message> = (0..count).map(|at| "
            "journal.slot(at)).collect();\n            journal.clear(count);\n            if count > 0 {\n"
            "                self.vm.pass(Point::Apply);\n            }\n"
            "            for (at, message) in all.into_iter().enumerate() {\n"
            "                unsafe { journal.ring().add(at).write(message) };\n            }\n            for",
            "takeover"),
    Mutant("ring-ignored", "a take-over does not apply what is in the ring", "takeover.rs",
           "matches!(message.event, abi::EVENT_REMOVE | abi::EVENT_UNMAP)", "message.event == abi::EVENT_FORK",
           "takeover"),
    Mutant("waiters-forgotten", "a take-over wakes nobody", "takeover.rs",
           "self.uffd.wake(region.base, region.size);", "std::hint::black_box(region);", "takeover"),
    Mutant("unfinished-forgotten", "a page that was installed and not noted is never counted", "takeover.rs",
           "self.finish(installer, &unfinished);", "drop(unfinished);", "takeover"),
    Mutant("noted-first", "a page is noted as installed before it is", "vm.rs",
           "        let (done, result) = install();\n        self.pass(installed);",
           "        pages.clone().for_each(|page| drop(self.states().set(page, State::Installed)));\n"
           "        self.pass(installed);\n        let (done, result) = install();", "takeover"),

    # the plan
    Mutant("unrecorded-replayed", "replay adds the page behind each run", "plan.rs",
           "Some(Run { pages: first..end, hole })", "Some(Run { pages: first..limit.min(end + 1), hole })", "replay"),
    Mutant("address-order", "replay goes by address", "plan.rs",
           "offsets.iter().filter_map(|&offset| vm.regions.find_offset(offset)).collect()",
           "{ let mut all: Vec<usize> = offsets.iter().filter_map(|&o| vm.regions.find_offset(o)).collect(); "
           "all.sort(); all }", "replay"),
    Mutant("bound-ignored", "the sequential fallback knows no bound", "plan.rs",
           ".take(most)", ".take(most.max(usize::MAX))", "sequential"),

    # the record, the counters
    _faults("record-disordered", "each recorded page is put before the last one",
            "vm.outside.touched.lock().unwrap().push(vm.regions.offset(page));",
            "let mut all = vm.outside.touched.lock().unwrap();\n"
            "let at = all.len().saturating_sub(1);\nall.insert(at, vm.regions.offset(page));", "record"),
    _faults("record-duplicates", "a page is recorded each time that it is faulted on",
            "replace(&mut self.seen[page], true)", "replace(&mut self.seen[page], false)", "record"),
    _demand("counted-twice", "a page that was there already is counted as installed once more",
            "Outcome::Present => {", "Outcome::Present => {\n                add(&self.counters().demand, 1);",
            "outcomes"),
    _faults("latency-lost", "the latency of a fault that had to wait is not recorded",
            "Progress::Served => self.vm",
            "Progress::Served if fault.refused => {}\nProgress::Served => self.vm", "latency"),

    # the end
    _faults("stop-ignored", "stop is not heard",
            "if ready.stop {", "if ready.stop && ready.exit {", "life"),
    _faults("exit-ignored", "the VMM's exit is not heard",
            "if ready.exit {", "if ready.exit && ready.stop {", "life"),
    Mutant("unserved-lives", "a VM that cannot be served is left hanging", "core.rs",
           "vm.process.kill();", "", "outcomes"),
    Mutant("leaked-uffd", "a copy of the userfaultfd stays open", "uffd.rs",
           "Self { fd, injecting", "std::mem::forget(fd.try_clone());\n        Self { fd, injecting", "content"),
    Mutant("leaked-image", "a copy of the image's descriptor stays open", "image.rs",
           "let file = File::from(fd);", "std::mem::forget(fd.try_clone());\nlet file = File::from(fd);", "content"),
]
# fmt: on
