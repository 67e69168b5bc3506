//! A journal of anybody: refused with a word, or good enough to go on from.
#![no_main]

mod map;
mod vm;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use libfuzzer_sys::fuzz_target;
use map::{Map, PAGE, Step};
use vm::{memory_file, serve};
use vmd_core::internals::abi::{EVENT_REMOVE, EVENT_UNMAP};
use vmd_core::internals::body::{Body, FIXED_BYTES, ImageId};
use vmd_core::internals::journal::{self, Journal, SLOTS, TAIL_AT};
use vmd_core::internals::plan::Beside;
use vmd_core::internals::states::State;
use vmd_core::internals::vm::Limits;

const BASE: u64 = 1 << 40;
const REGION_PAGES_MAX: u16 = 60;
const PLAN_MAX: usize = 40;
const PATH: &[u8] = b"/images/memory";
const CHECKSUM_AT: usize = 16;
const CHECKED_AT: usize = 24;
/// Header, live part, ring, latency, incident, tail.
const AREAS: [usize; 6] = [0, 1024, 2048, 4096, 12288, TAIL_AT];
const RING_AT: usize = AREAS[2];
const SLOT_BYTES: usize = 32;

/// One word changed: its area (one more: the page states), its place there, its value.
type Patch = (u8, u8, u64);
/// A REMOVE in the ring: slot, first page, pages.
type Remove = (u8, u16, u16);
/// The regions, what goes on beside demand and with which offsets, changes under the checksum and behind its back,
/// what the ring holds, and where the file ends.
type Input = (Vec<Step>, u8, Vec<u16>, Vec<Patch>, Vec<Patch>, Vec<Remove>, Option<u16>);

fuzz_target!(|input: Input| {
    let (steps, beside, offsets, sealed, late, removes, cut) = input;
    let Some(map) = Map::new(PAGE, REGION_PAGES_MAX, &steps, Some(BASE)) else { return };
    let body = body(&map, beside, &offsets);
    let file = memory_file();
    journal::write(&file, &body).unwrap();
    let (len, states_at) = journal::layout(&body);
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0).unwrap();
    patch(&mut bytes, states_at, &sealed);
    seal(&mut bytes);
    remove(&mut bytes, &removes);
    patch(&mut bytes, states_at, &late);
    bytes.truncate(cut.map_or(len, usize::from));
    file.set_len(0).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let intact = sealed.is_empty() && late.is_empty() && bytes.len() == len && !body.regions.is_empty();
    match journal::read(&file) {
        Ok(read) => {
            assert!(!intact || read == body);
            check_body(&read, bytes.len());
            go_on(file, &read);
        }
        Err(refusal) => assert!(!intact && !refusal.0.contains('\n') && refusal.0.len() < 200, "{}", refusal.0),
    }
});

fn body(map: &Map, beside: u8, offsets: &[u16]) -> Body {
    let end = map.regions.iter().map(|region| region.offset + region.size).max().unwrap_or(0);
    let offsets = offsets.iter().take(PLAN_MAX).map(|&page| u64::from(page) * PAGE);
    let beside = match beside % 4 {
        0 => Beside::Nothing,
        1 => Beside::Record,
        2 => Beside::Replay(offsets.collect()),
        _ => Beside::Sequential(1 << 30),
    };
    let image = ImageId { device: 1, inode: 2, size: end, mtime_ns: -3, path: PATH.to_vec() };
    let regions = map.regions.clone();
    let limits = Limits::default();
    Body { boot_id: [7; 16], vmm_pid: 42, vmm_start: 4711, page_size: PAGE, regions, beside, image, limits }
}

fn patch(bytes: &mut [u8], states_at: usize, patches: &[Patch]) {
    for &(area, place, value) in patches {
        let start = AREAS.get(usize::from(area) % (AREAS.len() + 1)).copied().unwrap_or(states_at);
        let at = start + usize::from(place) * 8;
        if let Some(word) = bytes.get_mut(at..at + 8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Make the checksum that of the contents, as far as the header says where they end.
fn seal(bytes: &mut [u8]) {
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let counts = |at: usize| word(bytes, CHECKED_AT + 24 + at * 8).min(bytes.len() as u64) as usize;
    let tail = counts(11).next_multiple_of(8) + counts(3) * 24 + counts(5) * 8;
    let end = (TAIL_AT + tail).min(bytes.len());
    let words = (CHECKED_AT..FIXED_BYTES).chain(TAIL_AT..end).step_by(1).filter(|at| at % 8 == 0);
    let step = |hash: u64, at| (hash ^ word(bytes, at)).wrapping_mul(0x100_0000_01b3);
    let sum = words.fold(0xcbf2_9ce4_8422_2325, step);
    bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
}

fn remove(bytes: &mut [u8], removes: &[Remove]) {
    for &(slot, first, pages) in removes {
        let start = BASE + u64::from(first) * PAGE;
        let at = RING_AT + usize::from(slot) % SLOTS * SLOT_BYTES;
        let message = [u64::from(EVENT_REMOVE), start, start + u64::from(pages) * PAGE];
        let message: Vec<u8> = message.into_iter().flat_map(u64::to_le_bytes).collect();
        bytes[at..at + message.len()].copy_from_slice(&message);
    }
}

/// What was believed is what a handshake could have said.
fn check_body(body: &Body, len: usize) {
    assert_eq!(journal::layout(body).0, len);
    assert!(!body.regions.is_empty() && (body.page_size == PAGE || body.page_size == 2 << 20));
    let ends = |start: u64, size: u64| u128::from(start) + u128::from(size);
    for (at, one) in body.regions.iter().enumerate() {
        assert!(one.size > 0 && (one.base | one.size | one.offset) % body.page_size == 0);
        assert!(ends(one.base, one.size) <= map::END && ends(one.offset, one.size) <= body.image.size.into());
        for two in &body.regions[..at] {
            let apart = |a: u64, b: u64| ends(a, one.size) <= b.into() || ends(b, two.size) <= a.into();
            assert!(apart(one.base, two.base) && apart(one.offset, two.offset));
        }
    }
    assert!(body.beside.offsets().iter().all(|offset| offset % body.page_size == 0));
}

/// Take over: afterwards the ring is clear, and what it said was removed is removed.
fn go_on(file: File, body: &Body) {
    let look = Journal::look(file.try_clone().unwrap(), body).unwrap();
    let vm = serve(Map::of(body).build(0), memory_file(), Journal::open(file, body).unwrap(), true);
    let pages = vm.regions.pages();
    let mut expected: Vec<State> = (0..pages).map(|page| look.states().get(page)).collect();
    for message in (0..SLOTS).map(|at| look.slot(at)) {
        let freed = |page: usize| {
            let low = u128::from(vm.regions.address(page));
            u128::from(message.first).max(low) < u128::from(message.second).min(low + u128::from(body.page_size))
        };
        if message.event == EVENT_REMOVE || message.event == EVENT_UNMAP {
            (0..pages).filter(|&page| freed(page)).for_each(|page| expected[page] = State::Removed);
        }
    }
    let unfinished = |journal: &Journal| -> Vec<_> {
        journal.live().installers.iter().filter_map(|installer| installer.unfinished(pages)).collect()
    };
    assert!(unfinished(&look).iter().all(|install| install.pages.end <= pages));
    let (incident, _) = (look.incident(), look.latency().read([0.5, 0.99]));
    assert!(incident.len() < 3 * (TAIL_AT - AREAS[4]));
    look.oldest_age();
    vm.take_over();
    assert!((0..SLOTS).all(|at| look.slot(at).event == 0));
    assert!(unfinished(&look).is_empty());
    let read: Vec<State> = (0..pages).map(|page| look.states().get(page)).collect();
    assert_eq!(read, expected); // of an unfinished install nothing is resident here
    let (installs, installed) = (look.live().installs(), look.states().installed());
    assert!(installs < installed || vm.counters().removed.load(Relaxed) == installs - installed);
    vm.outside.cpu();
    vm.outside.journal.note_incident("the fuzzer was here");
    assert_eq!(look.incident(), "the fuzzer was here");
}
