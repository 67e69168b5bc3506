//! The guests: threads that read, write and remove pages, and note what they saw.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier, Mutex};

use vmd_core::internals::regions::Region;
use vmd_core::internals::vm::EventFd;

use crate::board::Slot;
use crate::events::{Kind, Log};
use crate::image::WORDS;
use crate::plan::{Act, GUESTS, Op, PAGE, Plan, image_page};

/// One interleaving, as guests and page servers see it.
pub struct Round {
    pub plan: Plan,
    /// Of each page, its address and its page of the image.
    pages: Vec<(usize, usize)>,
    pub log: Arc<Log>,
    image: Arc<Vec<[u64; WORDS]>>,
    accesses: [Mutex<Vec<Access>>; GUESTS],
    through: Barrier, // with their operations
    left: AtomicUsize,
    /// All guests are through with everything.
    pub done: EventFd,
}

/// An operation as it went. `begin` and `end` are places in the log.
pub struct Access {
    pub guest: usize,
    pub op: Op,
    pub begin: u32,
    pub end: u32,
    pub seen: Seen,
}

/// What a read found: each guest's word, and the words that nobody writes.
#[derive(Default)]
pub struct Seen {
    pub words: [u64; GUESTS],
    /// The first word that is not the image's, and what it is; `WORDS` when all are.
    pub not_image: (usize, u64),
    /// The last word that is not zero, and what it is; None when all are zero.
    pub not_zero: Option<(usize, u64)>,
}

/// The word of each page that a guest writes, and nobody else.
pub fn own_word(guest: usize) -> usize {
    7 + guest * 170
}

/// What a guest writes with its operation number `at`.
pub fn own_value(seed: u64, guest: usize, at: usize) -> u64 {
    0xbeef << 48 | (seed & 0xffff_ffff) << 16 | (guest as u64) << 8 | at as u64
}

impl Round {
    pub fn new(plan: Plan, regions: &[Region], log: Arc<Log>, image: Arc<Vec<[u64; WORDS]>>) -> std::io::Result<Self> {
        log.clear();
        let addresses = regions
            .iter()
            .flat_map(|region| (region.base..region.base + region.size).step_by(PAGE).map(|address| address as usize));
        let pages = addresses.enumerate().map(|(page, address)| (address, image_page(&plan.spans, page))).collect();
        Ok(Self {
            plan,
            pages,
            log,
            image,
            accesses: Default::default(),
            through: Barrier::new(GUESTS),
            left: AtomicUsize::new(GUESTS),
            done: EventFd::new()?,
        })
    }

    pub fn image_word(&self, page: usize, word: usize) -> u64 {
        self.image[self.pages[page].1][word]
    }

    /// What a word is, that is found where it should not be.
    pub fn origin(&self, page: usize, word: usize, value: u64) -> String {
        if value == self.image_word(page, word) {
            return "the image's".into();
        }
        if value == 0 {
            return "zero".into();
        }
        let places = self.image.iter().enumerate();
        let found = places.flat_map(|(page, words)| words.iter().position(|&word| word == value).map(|at| (page, at)));
        match found.into_iter().next() {
            Some((page, at)) => format!("that of byte {:#x} of the image's page {page}", at * 8),
            None => format!("{value:#x}"),
        }
    }

    /// All that the guests did.
    pub fn accesses(&self) -> Vec<Access> {
        self.accesses.iter().flat_map(|accesses| std::mem::take(&mut *accesses.lock().unwrap())).collect()
    }

    /// Do all operations of a guest, and then, when all are through with theirs, read its share of the pages.
    fn play(&self, guest: usize, slot: &Slot) {
        let mut accesses = Vec::new();
        for (at, &op) in self.plan.ops[guest].iter().enumerate() {
            slot.tell(guest, op);
            accesses.push(self.act(guest, at, op));
        }
        slot.tell_nothing(guest);
        self.through.wait();
        for &page in self.plan.checked.iter().skip(guest).step_by(GUESTS) {
            let op = Op::read(page);
            slot.tell(guest, op);
            accesses.push(self.act(guest, 0, op));
        }
        slot.tell_nothing(guest);
        *self.accesses[guest].lock().unwrap() = accesses;
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.done.set();
        }
    }

    fn act(&self, guest: usize, at: usize, op: Op) -> Access {
        op.before.stand(&self.log);
        let (begins, ends) = match op.act {
            Act::Read => (Kind::BeginRead, Kind::EndRead),
            Act::Write => (Kind::BeginWrite, Kind::EndWrite),
            Act::Remove => (Kind::BeginRemove, Kind::EndRemove),
        };
        let begin = self.log.note(guest, begins, op.page);
        let seen = match op.act {
            Act::Read => self.read(op.page),
            Act::Write => self.write(guest, op.page, own_value(self.plan.seed, guest, at)),
            Act::Remove => self.remove(op.page, op.pages),
        };
        Access { guest, op, begin, end: self.log.note(guest, ends, op.page), seen }
    }

    fn read(&self, page: usize) -> Seen {
        let (address, image) = self.pages[page];
        let image = &self.image[image];
        let mut seen = Seen { not_image: (WORDS, 0), ..Seen::default() };
        for (at, &expected) in image.iter().enumerate() {
            // SAFETY: a word of the guest's memory, which is mapped for as long as the round lasts;
            // other guests write it by single stores, and whatever is read is judged later.
            let word = unsafe { (address as *const u64).add(at).read_volatile() };
            if let Some(guest) = owner(at) {
                seen.words[guest] = word;
                continue;
            }
            if word != expected && seen.not_image.0 == WORDS {
                seen.not_image = (at, word);
            }
            if word != 0 {
                seen.not_zero = Some((at, word));
            }
        }
        seen
    }

    fn write(&self, guest: usize, page: usize, value: u64) -> Seen {
        let address = self.pages[page].0 as *mut u64;
        // SAFETY: a word of the guest's memory that no other thread writes.
        unsafe { address.add(own_word(guest)).write_volatile(value) };
        Seen { words: std::array::from_fn(|at| if at == guest { value } else { 0 }), ..Seen::default() }
    }

    fn remove(&self, page: usize, pages: usize) -> Seen {
        // SAFETY: pages of the guest's memory, in which no Rust value lives.
        let result = unsafe { libc::madvise(self.pages[page].0 as *mut _, pages * PAGE, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise: {}", std::io::Error::last_os_error());
        Seen::default()
    }
}

fn owner(word: usize) -> Option<usize> {
    (0..GUESTS).find(|&guest| own_word(guest) == word)
}

/// The guests' threads, which go from round to round.
pub struct Guests(Vec<Sender<Arc<Round>>>);

impl Guests {
    pub fn new(slot: &'static Slot) -> Self {
        let start = |guest| {
            let (give, take) = channel::<Arc<Round>>();
            std::thread::spawn(move || take.iter().for_each(|round| round.play(guest, slot)));
            give
        };
        Self((0..GUESTS).map(start).collect())
    }

    pub fn begin(&self, round: &Arc<Round>) {
        for guest in &self.0 {
            guest.send(Arc::clone(round)).expect("a guest's thread does not end");
        }
    }
}
