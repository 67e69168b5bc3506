//! Which host addresses are which pages, and which bytes of the image.

/// One region of the VMM's memory; all three in bytes, aligned to the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub base: u64,
    pub size: u64,
    pub offset: u64,
}

/// A VM's regions, sorted by address. Pages are numbered in that order from 0.
///
/// The caller has checked them: aligned, not empty, apart in address and in file.
pub struct Regions {
    pub page_size: u64,
    ordered: Vec<Region>,
    first_pages: Vec<usize>, // of each region, and the total at the end
    by_offset: Vec<usize>,   // places in `ordered`, in the order of the image
}

impl Regions {
    pub fn new(mut regions: Vec<Region>, page_size: u64) -> Self {
        regions.sort_by_key(|region| region.base);
        let mut first_pages = vec![0];
        for region in &regions {
            first_pages.push(first_pages[first_pages.len() - 1] + (region.size / page_size) as usize);
        }
        let mut by_offset: Vec<usize> = (0..regions.len()).collect();
        by_offset.sort_by_key(|&at| regions[at].offset);
        Self { page_size, ordered: regions, first_pages, by_offset }
    }

    /// In the order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.ordered.iter()
    }

    pub fn pages(&self) -> usize {
        self.first_pages[self.ordered.len()]
    }

    /// The page that holds a host address.
    pub fn find(&self, address: u64) -> Option<usize> {
        let at = self.ordered.partition_point(|region| region.base <= address).checked_sub(1)?;
        let within = address - self.ordered[at].base;
        (within < self.ordered[at].size).then(|| self.first_pages[at] + (within / self.page_size) as usize)
    }

    /// The page whose bytes are at a file offset.
    pub fn find_offset(&self, offset: u64) -> Option<usize> {
        let place = self.by_offset.partition_point(|&at| self.ordered[at].offset <= offset).checked_sub(1)?;
        let at = self.by_offset[place];
        let within = offset - self.ordered[at].offset;
        (within < self.ordered[at].size).then(|| self.first_pages[at] + (within / self.page_size) as usize)
    }

    pub fn address(&self, page: usize) -> u64 {
        let at = self.region_of(page);
        self.ordered[at].base + (page - self.first_pages[at]) as u64 * self.page_size
    }

    pub fn offset(&self, page: usize) -> u64 {
        let at = self.region_of(page);
        self.ordered[at].offset + (page - self.first_pages[at]) as u64 * self.page_size
    }

    /// First page after the region that holds `page`: no run crosses it.
    pub fn region_end(&self, page: usize) -> usize {
        self.first_pages[self.region_of(page) + 1]
    }

    /// First page of each region, in the order of the image.
    pub fn by_offset(&self) -> Vec<usize> {
        self.by_offset.iter().map(|&at| self.first_pages[at]).collect()
    }

    /// The pages of an address range, clipped to the regions, as runs.
    pub fn pages_between(&self, start: u64, end: u64) -> Vec<std::ops::Range<usize>> {
        let clip = |(at, region): (usize, &Region)| {
            let low = start.max(region.base);
            let high = end.min(region.base.saturating_add(region.size)); // a region may end with the address space
            (low < high).then(|| {
                let first = self.first_pages[at];
                let from = (low - region.base) / self.page_size;
                let to = (high - region.base).div_ceil(self.page_size);
                first + from as usize..first + to as usize
            })
        };
        self.ordered.iter().enumerate().filter_map(clip).collect()
    }

    fn region_of(&self, page: usize) -> usize {
        self.first_pages.partition_point(|&first| first <= page) - 1
    }
}

impl std::fmt::Display for Regions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, region) in self.ordered.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{:#x}-{:#x}", region.base, u128::from(region.base) + u128::from(region.size))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Regions {
        let high = Region { base: 0x9000, size: 0x2000, offset: 0 };
        let low = Region { base: 0x1000, size: 0x3000, offset: 0x2000 };
        Regions::new(vec![high, low], 0x1000)
    }

    #[test]
    fn pages_are_numbered_by_address() {
        let regions = two();
        assert_eq!(regions.pages(), 5);
        assert_eq!(regions.find(0xfff), None);
        assert_eq!(regions.find(0x1000), Some(0));
        assert_eq!(regions.find(0x3fff), Some(2));
        assert_eq!(regions.find(0x4000), None);
        assert_eq!(regions.find(0xafff), Some(4));
        assert_eq!(regions.find(0xb000), None);
        for page in 0..5 {
            assert_eq!(regions.find(regions.address(page)), Some(page));
            assert_eq!(regions.find_offset(regions.offset(page)), Some(page));
        }
        assert_eq!(regions.find_offset(0x5000), None);
        assert_eq!((regions.region_end(0), regions.region_end(4)), (3, 5));
        assert_eq!(regions.by_offset(), [3, 0]);
    }

    #[test]
    fn ranges_are_clipped_to_regions() {
        let regions = two();
        assert_eq!(regions.pages_between(0x1800, 0xa000), [0..3, 3..4]);
        assert_eq!(regions.pages_between(0x2000, 0xa000), [1..3, 3..4]);
        assert!(regions.pages_between(0x4000, 0x9000).is_empty());
    }

    #[test]
    fn a_region_may_end_with_the_address_space() {
        let regions = Regions::new(vec![Region { base: 0_u64.wrapping_sub(0x2000), size: 0x2000, offset: 0 }], 0x1000);
        let pages_below = |end| regions.pages_between(0, end).into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(pages_below(u64::MAX), [0, 1]);
        assert_eq!(pages_below(0_u64.wrapping_sub(0x1000)), [0]);
        assert_eq!(regions.find(u64::MAX), Some(1));
        assert_eq!(regions.to_string(), "0xffffffffffffe000-0x10000000000000000");
    }
}
