//! Memory maps out of an input: always such as Python lets pass, anywhere in the address space.
#![allow(dead_code)] // no target needs all of it

use vmd_core::internals::body::Body;
use vmd_core::internals::regions::{Region, Regions};

pub const PAGE: u64 = 4096;
const REGIONS_MAX: usize = 8;
/// 2^64, where the last region may end.
pub const END: u128 = 1 << 64;

/// A region: pages left out before it in the address space and in the file, its pages, its place in the file.
pub type Step = (u16, u8, u16, u8);

/// One memory map, as the page server gets it and as plain numbers.
pub struct Map {
    pub page_size: u64,
    pub regions: Vec<Region>,
}

impl Map {
    /// Regions of at most `pages_max` pages from `base` on, or up to the end of the address space where that is None.
    /// None when they lead out of it.
    pub fn new(page_size: u64, pages_max: u16, steps: &[Step], base: Option<u64>) -> Option<Self> {
        let steps = &steps[..steps.len().min(REGIONS_MAX)];
        let pages = |step: &Step| u64::from(step.2 % pages_max) + 1;
        let whole: u64 = steps.iter().map(|step| (u64::from(step.0) + pages(step)) * page_size).sum();
        let mut at = base.map_or(END - u128::from(whole), |base| u128::from(base / page_size * page_size));
        let mut regions = Vec::new();
        for step in steps {
            at += u128::from(step.0) * u128::from(page_size);
            let size = pages(step) * page_size;
            regions.push(Region { base: u64::try_from(at).ok()?, size, offset: 0 });
            at += u128::from(size);
            if at > END {
                return None;
            }
        }
        place_in_file(&mut regions, steps, page_size);
        Some(Self { page_size, regions })
    }

    /// Those of a journal.
    pub fn of(body: &Body) -> Self {
        Self { page_size: body.page_size, regions: body.regions.clone() }
    }

    /// In any order: they need not be announced by address.
    pub fn build(&self, rotated: u8) -> Regions {
        let mut regions = self.regions.clone();
        let by = usize::from(rotated) % regions.len().max(1);
        regions.rotate_left(by);
        Regions::new(regions, self.page_size)
    }

    /// The page at a host address (`region.base`) or a file offset (`region.offset`), the plain way.
    pub fn page_at(&self, place: u64, start: impl Fn(&Region) -> u64) -> Option<usize> {
        let (place, mut first) = (u128::from(place), 0);
        for region in &self.regions {
            let start = u128::from(start(region));
            if (start..start + u128::from(region.size)).contains(&place) {
                return Some(first + ((place - start) / u128::from(self.page_size)) as usize);
            }
            first += (region.size / self.page_size) as usize;
        }
        None
    }
}

fn place_in_file(regions: &mut [Region], steps: &[Step], page_size: u64) {
    let mut order: Vec<usize> = (0..regions.len()).collect();
    order.sort_by_key(|&at| steps[at].3);
    let mut offset = 0;
    for at in order {
        offset += u64::from(steps[at].1) * page_size;
        regions[at].offset = offset;
        offset += regions[at].size;
    }
}
