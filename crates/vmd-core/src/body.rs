//! What a journal says that never changes: which VM, which memory, which image, what to install.

use std::time::Duration;

use crate::journal::TAIL_AT;
use crate::plan::Beside;
use crate::regions::Region;
use crate::vm::Limits;

const MAGIC: &[u8; 8] = b"vmdjrnl\0";
const VERSION: u32 = 1;
const CHECKED_AT: usize = 24;
pub const FIXED_BYTES: usize = CHECKED_AT + 8 + 16 + WORDS * 8;
const WORDS: usize = 17;
const REGION_BYTES: usize = 24;

/// Bounds that a journal of ours keeps; whatever else is in a file, no more than this is allocated for it.
const PATH_BYTES_MAX: u64 = 4096;
const REGIONS_MAX: u64 = 1 << 16;
const PLAN_MAX: u64 = 1 << 28;
const HUGE_PAGE: u64 = 2 << 20;

/// Why a journal is not used: what was expected, and what came.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

/// Which file the pages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageId {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub mtime_ns: i64,
    pub path: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    pub boot_id: [u8; 16],
    pub vmm_pid: u32,
    pub vmm_start: u64,
    pub page_size: u64,
    /// Empty before the handshake.
    pub regions: Vec<Region>,
    pub beside: Beside,
    pub image: ImageId,
    pub limits: Limits,
}

impl Body {
    /// Before the handshake.
    pub fn waiting(boot_id: [u8; 16], image: ImageId) -> Self {
        let (regions, beside) = (Vec::new(), Beside::Nothing);
        Self { boot_id, vmm_pid: 0, vmm_start: 0, page_size: 4096, regions, beside, image, limits: Limits::default() }
    }

    pub fn pages(&self) -> usize {
        self.regions.iter().map(|region| (region.size / self.page_size) as usize).sum()
    }

    pub fn guest_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    pub fn tail_bytes(&self) -> usize {
        tail_bytes(self.image.path.len(), self.regions.len(), self.beside.offsets().len())
    }

    /// Path, regions and planned offsets as they are written.
    pub fn tail(&self) -> Vec<u8> {
        let mut bytes = self.image.path.clone();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let regions = self.regions.iter().flat_map(|region| [region.base, region.size, region.offset]);
        for word in regions.chain(self.beside.offsets().iter().copied()) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The first bytes of the file, which is `len` bytes long.
    pub fn fixed(&self, len: usize) -> Vec<u8> {
        let (beside, offsets, bytes_max) = self.beside.numbers();
        let image = &self.image;
        let before = [self.vmm_pid.into(), self.vmm_start, self.page_size, self.regions.len() as u64];
        let plan = [beside, offsets, bytes_max];
        let file = [image.device, image.inode, image.size, image.mtime_ns as u64, image.path.len() as u64];
        let limits = limit_words(&self.limits);
        let mut checked = (len as u64).to_le_bytes().to_vec();
        checked.extend_from_slice(&self.boot_id);
        for word in before.into_iter().chain(plan).chain(file).chain(limits) {
            checked.extend_from_slice(&word.to_le_bytes());
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&checksum(&checked, &self.tail()).to_le_bytes());
        bytes.extend_from_slice(&checked);
        debug_assert_eq!(bytes.len(), FIXED_BYTES);
        bytes
    }
}

/// The fixed part, read but not yet believed.
pub struct Head {
    words: [u64; WORDS],
    file_bytes: u64,
    size: u64,
}

impl Head {
    /// `size`: of the file.
    pub fn parse(fixed: &[u8; FIXED_BYTES], size: u64) -> Result<Self, Refusal> {
        if &fixed[..8] != MAGIC {
            return Err(Refusal("not a journal: no magic".into()));
        }
        let version = u32::from_le_bytes(fixed[8..12].try_into().expect("four bytes"));
        if version != VERSION {
            return Err(Refusal(format!("of another version: expected {VERSION}, got {version}")));
        }
        if fixed[12..16] != [0; 4] {
            return Err(Refusal("corrupt: what is to be zero is not".into()));
        }
        let words = std::array::from_fn(|at| word(fixed, CHECKED_AT + 24 + at * 8));
        let head = Self { words, file_bytes: word(fixed, CHECKED_AT), size };
        if head.regions() > REGIONS_MAX || head.offsets() > PLAN_MAX || head.path() > PATH_BYTES_MAX {
            return Err(Refusal("corrupt: a length beyond its bound".into()));
        }
        Ok(head)
    }

    pub fn tail_bytes(&self) -> usize {
        let most = (self.size as usize).saturating_sub(TAIL_AT); // what is not there is not allocated for
        tail_bytes(self.path() as usize, self.regions() as usize, self.offsets() as usize).min(most)
    }

    /// Check all of it.
    pub fn with_tail(self, fixed: &[u8; FIXED_BYTES], tail: &[u8]) -> Result<Body, Refusal> {
        let [vmm_pid, vmm_start, page_size, regions, beside, offsets, bytes_max, ..] = self.words;
        let [.., device, inode, size, mtime, path, _, _, _, _, _] = self.words;
        if tail.len() != tail_bytes(path as usize, regions as usize, offsets as usize) {
            return Err(Refusal(format!("truncated: {} bytes", self.size)));
        }
        if word(fixed, 16) != checksum(&fixed[CHECKED_AT..], tail) {
            return Err(Refusal("corrupt: its checksum is not that of its contents".into()));
        }
        if regions == 0 {
            return Err(Refusal("no VMM has connected to its page server yet".into()));
        }
        if self.file_bytes != self.size {
            return Err(Refusal(format!("truncated: expected {} bytes, got {}", self.file_bytes, self.size)));
        }
        let corrupt = || Refusal("corrupt: what it says cannot be".into());
        let (path_end, words) = ((path as usize).next_multiple_of(8), |at: usize| word(tail, at));
        let regions_end = path_end + regions as usize * REGION_BYTES;
        let read_region = |at| Region { base: words(at), size: words(at + 8), offset: words(at + 16) };
        let regions: Vec<_> = (path_end..regions_end).step_by(REGION_BYTES).map(read_region).collect();
        let offsets = (regions_end..tail.len()).step_by(8).map(words).collect();
        let beside = Beside::from_numbers(beside, offsets, bytes_max).ok_or_else(corrupt)?;
        let image = ImageId { device, inode, size, mtime_ns: mtime as i64, path: tail[..path as usize].to_vec() };
        let boot_id = fixed[CHECKED_AT + 8..CHECKED_AT + 24].try_into().expect("16 bytes");
        let vmm_pid = u32::try_from(vmm_pid).map_err(|_| corrupt())?;
        let limits = limits_of(&self.words).ok_or_else(corrupt)?;
        let body = Body { boot_id, vmm_pid, vmm_start, page_size, regions, beside, image, limits };
        if is_possible(&body) { Ok(body) } else { Err(corrupt()) }
    }

    fn regions(&self) -> u64 {
        self.words[3]
    }

    fn offsets(&self) -> u64 {
        self.words[5]
    }

    fn path(&self) -> u64 {
        self.words[11]
    }
}

fn limit_words(limits: &Limits) -> [u64; 5] {
    [
        limits.fault_unserved.as_millis() as u64,
        limits.exit_wait.as_millis() as u64,
        limits.image_read_tries.into(),
        limits.poison_lines_max,
        limits.memory_floor_percent,
    ]
}

fn limits_of(words: &[u64; WORDS]) -> Option<Limits> {
    let [.., fault_unserved, exit_wait, tries, poison_lines_max, memory_floor_percent] = *words;
    Some(Limits {
        fault_unserved: Duration::from_millis(fault_unserved),
        exit_wait: Duration::from_millis(exit_wait),
        image_read_tries: u32::try_from(tries).ok()?,
        poison_lines_max,
        memory_floor_percent,
    })
}

/// What a handshake is checked for, checked again: a file may lie.
fn is_possible(body: &Body) -> bool {
    let size = body.page_size;
    if size != 4096 && size != HUGE_PAGE {
        return false;
    }
    let aligned = |value: u64| value % size == 0;
    let sound = |region: &Region| {
        region.size > 0
            && [region.base, region.size, region.offset].into_iter().all(aligned)
            && region.base.checked_add(region.size).is_some()
            && region.offset.checked_add(region.size).is_some_and(|end| end <= body.image.size)
    };
    body.regions.iter().all(sound)
        && are_apart(body.regions.iter().map(|region| (region.base, region.size)).collect())
        && are_apart(body.regions.iter().map(|region| (region.offset, region.size)).collect())
        && body.beside.offsets().iter().all(|&offset| aligned(offset))
}

fn are_apart(mut ranges: Vec<(u64, u64)>) -> bool {
    ranges.sort_unstable();
    ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}

fn tail_bytes(path: usize, regions: usize, offsets: usize) -> usize {
    path.next_multiple_of(8) + regions * REGION_BYTES + offsets * 8
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// FNV-1a, over words: it must find what a torn write or a stranger left, not an attacker.
fn checksum(fixed: &[u8], tail: &[u8]) -> u64 {
    let step = |hash: u64, bytes: &[u8]| (hash ^ word(bytes, 0)).wrapping_mul(0x100_0000_01b3);
    fixed.chunks_exact(8).chain(tail.chunks_exact(8)).fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_no_handshake_could_give_are_impossible() {
        let image = ImageId { device: 0, inode: 0, size: 1 << 20, mtime_ns: 0, path: Vec::new() };
        let possible = |regions: &[(u64, u64, u64)], offsets: &[u64], page_size| {
            let regions = regions.iter().map(|&(base, size, offset)| Region { base, size, offset }).collect();
            let (beside, image) = (Beside::Replay(offsets.to_vec()), image.clone());
            is_possible(&Body {
                boot_id: [0; 16],
                vmm_pid: 1,
                vmm_start: 1,
                page_size,
                regions,
                beside,
                image,
                limits: Limits::default(),
            })
        };
        assert!(possible(&[(0x8000, 0x2000, 0x1000), (0x4000, 0x4000, 0x3000)], &[0x1000], 4096));
        assert!(!possible(&[(0x8000, 0x2000, 0)], &[], 8192));
        assert!(!possible(&[(0x8000, 0x2000, 0)], &[], 0));
        assert!(!possible(&[(0x8000, 0, 0)], &[], 4096));
        assert!(!possible(&[(0x8001, 0x1000, 0)], &[], 4096));
        assert!(!possible(&[(u64::MAX - 0xfff, 0x1000, 0)], &[], 4096));
        assert!(!possible(&[(0x8000, 0x2000, (1 << 20) - 0x1000)], &[], 4096));
        assert!(!possible(&[(0x8000, 0x2000, 0), (0x9000, 0x1000, 0x8000)], &[], 4096));
        assert!(!possible(&[(0x8000, 0x2000, 0), (0xa000, 0x1000, 0x1000)], &[], 4096));
        assert!(!possible(&[(0x8000, 0x2000, 0)], &[1], 4096));
    }
}
