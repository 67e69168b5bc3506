//! What is installed beside demand: recorded offsets of anybody, joined to runs over an image with holes.
#![no_main]

mod map;
mod vm;

use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use map::{Map, PAGE, Step};
use vm::{memory_file, serve};
use vmd_core::internals::body::{Body, ImageId};
use vmd_core::internals::journal::Journal;
use vmd_core::internals::plan::{Beside, Runs, recorded, sequential};
use vmd_core::internals::vm::{Limits, Vm};

const RUN_PAGES_MAX: usize = 64;
const REGION_PAGES_MAX: u16 = 700; // more than are zeroed at once

/// The regions, the pages of the image that hold data, most pages of a run, recorded offsets or bytes in sequence.
type Input = (Vec<Step>, Vec<u16>, u8, Vec<u64>, Option<u32>);

fuzz_target!(|input: Input| {
    let (steps, data, run_max, offsets, bytes_max) = input;
    let Some(map) = Map::new(PAGE, REGION_PAGES_MAX, &steps, Some(1 << 40)) else { return };
    let vm = build(&map, &data);
    let run_max = usize::from(run_max) % RUN_PAGES_MAX + 1;
    let pages = match bytes_max {
        None => {
            let expected: Vec<_> = offsets.iter().filter_map(|&at| map.page_at(at, |region| region.offset)).collect();
            let pages = recorded(&vm, &offsets);
            assert_eq!(pages, expected);
            pages
        }
        Some(bytes_max) => {
            let pages: Vec<_> = sequential(&vm, u64::from(bytes_max)).collect();
            assert_eq!(pages.len(), vm.regions.pages().min((u64::from(bytes_max) / PAGE) as usize));
            assert!(pages.is_sorted_by_key(|&page| vm.regions.offset(page)));
            pages
        }
    };
    check_runs(&vm, &pages, run_max);
});

/// All pages in their order, in runs that no run could be joined with.
fn check_runs(vm: &Vm, pages: &[usize], run_max: usize) {
    let runs: Vec<_> = Runs::new(vm, pages.iter().copied(), run_max).collect();
    let joined: Vec<usize> = runs.iter().flat_map(|run| run.pages.clone()).collect();
    assert_eq!(joined, pages);
    let most = |hole| if hole { vm.zero_run_max() } else { run_max };
    for run in &runs {
        assert!((1..=most(run.hole)).contains(&run.pages.len()));
        assert!(run.pages.end <= vm.regions.region_end(run.pages.start));
        assert!(run.pages.clone().all(|page| vm.is_hole(page) == run.hole));
    }
    for pair in runs.windows(2) {
        let full = pair[0].pages.len() == most(pair[0].hole);
        let next = pair[0].pages.end == pair[1].pages.start && pair[0].hole == pair[1].hole;
        assert!(!next || full || vm.regions.region_end(pair[0].pages.start) == pair[0].pages.end);
    }
}

/// Its image is one hole, but for the pages in `data`.
fn build(map: &Map, data: &[u16]) -> Vm {
    let image = memory_file();
    let end = map.regions.iter().map(|region| region.offset + region.size).max().unwrap_or(0);
    image.set_len(end).unwrap();
    for page in data.iter().map(|&page| u64::from(page)).filter(|page| page * PAGE < end) {
        image.write_all_at(&[1], page * PAGE).unwrap();
    }
    let nowhere = ImageId { device: 0, inode: 0, size: end, mtime_ns: 0, path: Vec::new() };
    let body = Body {
        boot_id: [0; 16],
        vmm_pid: 1,
        vmm_start: 1,
        page_size: PAGE,
        regions: map.regions.clone(),
        beside: Beside::Nothing,
        image: nowhere,
        limits: Limits::default(),
    };
    serve(map.build(0), image, Journal::private(&body).unwrap(), false)
}
