//! `Regions` on any map that Python lets pass: each look-up says what a plain search says.
#![no_main]

mod map;

use libfuzzer_sys::fuzz_target;
use map::{END, Map, PAGE, Step};
use vmd_core::internals::regions::{Region, Regions};

const HUGE_PAGE: u64 = 2 << 20;
const REGION_PAGES_MAX: u16 = 40;
const BASE: fn(&Region) -> u64 = |region| region.base;
const OFFSET: fn(&Region) -> u64 = |region| region.offset;

/// Huge pages, where the first region begins, how far the regions are rotated, the regions, places to look for.
type Input = (bool, Option<u64>, u8, Vec<Step>, Vec<u64>);

fuzz_target!(|input: Input| {
    let (huge, base, rotated, steps, probes) = input;
    let page_size = if huge { HUGE_PAGE } else { PAGE };
    let Some(map) = Map::new(page_size, REGION_PAGES_MAX, &steps, base) else { return };
    let regions = map.build(rotated);
    let mut first = 0;
    for region in &map.regions {
        let pages = (region.size / map.page_size) as usize;
        for page in first..first + pages {
            assert_eq!(regions.find(regions.address(page)), Some(page));
            assert_eq!(regions.find_offset(regions.offset(page)), Some(page));
            assert_eq!(map.page_at(regions.address(page), BASE), Some(page));
            assert_eq!(map.page_at(regions.offset(page), OFFSET), Some(page));
            assert_eq!(regions.region_end(page), first + pages);
        }
        first += pages;
    }
    assert_eq!(regions.pages(), first);
    let edges = map.regions.iter().flat_map(|region| [region.base, region.offset, region.base.wrapping_sub(1)]);
    let probes: Vec<u64> = edges.chain(probes).chain([0, u64::MAX]).collect();
    for &probe in &probes {
        assert_eq!(regions.find(probe), map.page_at(probe, BASE));
        assert_eq!(regions.find_offset(probe), map.page_at(probe, OFFSET));
    }
    for pair in probes.windows(2) {
        check_range(&map, &regions, pair[0], pair[1]);
    }
    let ends = map.regions.iter().map(|region| u128::from(region.base) + u128::from(region.size));
    let spans: Vec<_> =
        map.regions.iter().zip(ends).map(|(region, end)| format!("{:#x}-{end:#x}", region.base)).collect();
    assert_eq!(regions.to_string(), spans.join(", "));
});

/// A range covers exactly the pages that share a byte with it.
fn check_range(map: &Map, regions: &Regions, start: u64, end: u64) {
    let runs = regions.pages_between(start, end);
    assert!(runs.iter().all(|run| !run.is_empty()));
    let found: Vec<usize> = runs.into_iter().flatten().collect();
    let touched = |&page: &usize| {
        let low = u128::from(regions.address(page));
        let high = low + u128::from(map.page_size);
        assert!(high <= END);
        u128::from(start).max(low) < u128::from(end).min(high)
    };
    let expected: Vec<usize> = (0..regions.pages()).filter(touched).collect();
    assert_eq!(found, expected);
}
