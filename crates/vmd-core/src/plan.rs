//! What to install beside demand, as runs of neighbouring pages, in the order of installing.

use std::io::{BufRead, BufReader};
use std::iter::Peekable;
use std::ops::Range;

use crate::vm::Vm;

/// What to do beside demand faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beside {
    Nothing,
    Record,
    /// File offsets in first-touch order.
    Replay(Vec<u64>),
    /// At most so many bytes.
    Sequential(u64),
}

impl Beside {
    /// Offsets to replay; empty for what is no replay.
    pub fn offsets(&self) -> &[u64] {
        match self {
            Self::Replay(offsets) => offsets,
            _ => &[],
        }
    }

    /// As the journal has it: kind, number of offsets, most bytes.
    pub fn numbers(&self) -> (u64, u64, u64) {
        match self {
            Self::Nothing => (0, 0, 0),
            Self::Record => (1, 0, 0),
            Self::Replay(offsets) => (2, offsets.len() as u64, 0),
            Self::Sequential(bytes_max) => (3, 0, *bytes_max),
        }
    }

    /// The inverse of `numbers`; None for what it never gives.
    pub fn from_numbers(kind: u64, offsets: Vec<u64>, bytes_max: u64) -> Option<Self> {
        match (kind, offsets.is_empty()) {
            (0, true) => Some(Self::Nothing),
            (1, true) => Some(Self::Record),
            (2, _) => Some(Self::Replay(offsets)),
            (3, true) => Some(Self::Sequential(bytes_max)),
            _ => None,
        }
    }
}

/// Neighbouring pages of one region that are either all data of the image or all holes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub pages: Range<usize>,
    pub hole: bool,
}

/// Joins pages, in the order given, to runs.
pub struct Runs<'a, I: Iterator<Item = usize>> {
    vm: &'a Vm,
    pages: Peekable<I>,
    data_max: usize,
}

impl<'a, I: Iterator<Item = usize>> Runs<'a, I> {
    /// `data_max`: most pages in a run of data.
    pub fn new(vm: &'a Vm, pages: I, data_max: usize) -> Self {
        Self { vm, pages: pages.peekable(), data_max }
    }
}

impl<I: Iterator<Item = usize>> Iterator for Runs<'_, I> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let first = self.pages.next()?;
        let hole = self.vm.is_hole(first);
        let most = if hole { self.vm.zero_run_max() } else { self.data_max };
        let limit = self.vm.regions.region_end(first).min(first + most);
        let mut end = first + 1;
        while end < limit && self.pages.next_if(|&page| page == end && self.vm.is_hole(page) == hole).is_some() {
            end += 1;
        }
        Some(Run { pages: first..end, hole })
    }
}

/// The pages of recorded file offsets; those outside all regions are skipped.
pub fn recorded(vm: &Vm, offsets: &[u64]) -> Vec<usize> {
    offsets.iter().filter_map(|&offset| vm.regions.find_offset(offset)).collect()
}

/// All pages in the order of the image, at most `bytes_max` bytes of them, while memory is not short.
pub fn sequential(vm: &Vm, bytes_max: u64) -> impl Iterator<Item = usize> {
    let most = usize::try_from(bytes_max / vm.regions.page_size).unwrap_or(usize::MAX);
    let check_every = (CHECK_MEMORY_EVERY / vm.regions.page_size).max(1) as usize;
    let floor = vm.limits.memory_floor_percent;
    let regions = vm.regions.by_offset().into_iter();
    let pages = regions.flat_map(|first| first..vm.regions.region_end(first)).take(most);
    let enough = move |&(count, _): &(usize, usize)| count % check_every != 0 || available_percent() >= floor;
    pages.enumerate().take_while(enough).map(|(_, page)| page)
}

const CHECK_MEMORY_EVERY: u64 = 16 << 20;

/// MemAvailable in percent of MemTotal; 100 where the kernel does not tell.
fn available_percent() -> u64 {
    let Ok(file) = std::fs::File::open("/proc/meminfo") else { return 100 };
    let (mut total, mut available) = (1, 1);
    for line in BufReader::new(file).lines().map_while(Result::ok) {
        let mut words = line.split_ascii_whitespace();
        let slot = match words.next() {
            Some("MemTotal:") => &mut total,
            Some("MemAvailable:") => &mut available,
            _ => continue,
        };
        *slot = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(1);
    }
    available * 100 / total.max(1)
}
