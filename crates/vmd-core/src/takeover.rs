//! Going on where another page server died: from the journal, and from what the kernel holds.
//!
//! What may be open when a page server is killed, and how it is settled here:
//!
//! | killed | left behind | settled by |
//! |---|---|---|
//! | after reading, before applying | REMOVEs in the ring | applying them; twice is as good as once |
//! | after reading faults, before serving them | vCPUs that nobody will wake | WAKE over all regions: they fault again |
//! | after an install, before its note | a page that is in and not noted | the intent, and the VMM's pagemap |
//!
//! A page that is in and not noted would be harmless (an install of it meets EEXIST), but not counted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::abi;
use crate::death::Point;
use crate::journal::SLOTS;
use crate::live::{Installer, Unfinished};
use crate::states::State;
use crate::stats::add;
use crate::vm::Vm;

const PAGEMAP_ENTRY: u64 = 8;
const PAGEMAP_PAGE: u64 = 4096;
/// Present, or swapped out (Documentation/admin-guide/mm/pagemap.rst).
const RESIDENT: u64 = 3 << 62;

impl Vm {
    /// Note that a range was freed: from now on its pages are only ever filled with zeros.
    pub fn apply_remove(&self, start: u64, end: u64) {
        for page in self.regions.pages_between(start, end).into_iter().flatten() {
            if self.states().set(page, State::Removed) == State::Installed {
                add(&self.counters().removed, 1);
            }
        }
    }

    /// Make good what the page server before left open. Before anything is read or installed.
    pub fn take_over(&self) {
        let _gate = self.enter_for_demand();
        let journal = &self.outside.journal;
        self.outside.go_on();
        self.pass(Point::AdoptApply);
        for message in (0..SLOTS).map(|at| journal.slot(at)) {
            if matches!(message.event, abi::EVENT_REMOVE | abi::EVENT_UNMAP) {
                self.apply_remove(message.first, message.second);
            }
        }
        journal.clear(SLOTS);
        for installer in &journal.live().installers {
            if let Some(unfinished) = installer.unfinished(self.regions.pages()) {
                self.finish(installer, &unfinished);
            }
            installer.intend_nothing();
        }
        self.settle_removed();
        self.outside.set_oldest(None); // who still waits is about to ask again
        self.pass(Point::AdoptWake);
        for region in self.regions.iter() {
            self.uffd.wake(region.base, region.size);
        }
        self.pass(Point::Adopted);
    }

    /// Note and count the pages of an install that its page server did not live to note.
    fn finish(&self, installer: &Installer, unfinished: &Unfinished) {
        let pages = unfinished.pages.clone();
        let brought: Vec<usize> = match (unfinished.brought, File::open(format!("/proc/{}/pagemap", self.process.pid)))
        {
            // What it brought may have been taken away since, by a REMOVE that will still be read and counted.
            (Some(brought), _) => pages.take(brought).collect(),
            // One that is noted was there before: the install met EEXIST.
            (None, Ok(pagemap)) => pages
                .filter(|&page| self.states().get(page) != State::Installed && self.is_resident(&pagemap, page))
                .collect(),
            (None, Err(_)) => return,
        };
        installer.brought(brought.len() as u64); // we may be killed too; what an install brings are the first pages
        for &page in &brought {
            self.states().set(page, State::Installed);
        }
        installer.settle(unfinished, brought.len() as u64);
    }

    fn is_resident(&self, pagemap: &File, page: usize) -> bool {
        let mut entry = [0; PAGEMAP_ENTRY as usize];
        let at = self.regions.address(page) / PAGEMAP_PAGE * PAGEMAP_ENTRY;
        pagemap.read_exact_at(&mut entry, at).is_ok() && u64::from_le_bytes(entry) & RESIDENT != 0
    }

    /// A kill between the note of a removed page and its count leaves it uncounted.
    fn settle_removed(&self) {
        let (installs, installed) = (self.outside.journal.live().installs(), self.states().installed());
        if let Some(removed) = installs.checked_sub(installed) {
            self.counters().removed.store(removed, Ordering::Relaxed);
        }
    }
}
