//! One process of the runner: goes through interleavings, one after the other.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmd_core::internals::adopt::image_id;
use vmd_core::internals::body::Body;
use vmd_core::internals::host;
use vmd_core::internals::regions::Region;

use crate::board::{Board, Slot};
use crate::events::Log;
use crate::guest::{Guests, Round};
use crate::image::{self, WORDS};
use crate::lives::{self, Held};
use crate::memory::Arena;
use crate::plan::{Act, PAGE, Plan};
use crate::verify;

pub struct Worker {
    board: &'static Board,
    slot: &'static Slot,
    arena: Arena,
    guests: Guests,
    log: Arc<Log>,
    words: Arc<Vec<[u64; WORDS]>>,
    image: File,
    journal: File,
    boot_id: [u8; 16],
    vmm_start: u64,
}

impl Worker {
    pub fn new(board: &'static Board, number: usize, journal: File) -> io::Result<Self> {
        let slot = board.slot(number);
        Ok(Self {
            board,
            slot,
            arena: Arena::new()?,
            guests: Guests::new(slot),
            log: Arc::new(Log::new()),
            words: Arc::new(image::words()),
            image: image::file()?,
            journal,
            boot_id: host::boot_id()?,
            vmm_start: host::start_ticks(std::process::id())?,
        })
    }

    /// One interleaving. An error says what was wrong, and in which order things happened.
    pub fn run(&self, seed: u64) -> Result<(), String> {
        self.slot.seed.store(seed, Ordering::Relaxed);
        self.play(Plan::draw(seed)).map_err(|why| format!("{why}\n{}", self.log.tell()))?;
        self.board.see(self.log.order());
        self.slot.done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn play(&self, plan: Plan) -> Result<(), String> {
        let words = |error: io::Error| format!("the runner itself: {error}");
        let (uffd, regions) = self.arena.fresh(&plan.spans).map_err(words)?;
        let body = self.body(&plan, &regions).map_err(words)?;
        let round =
            Arc::new(Round::new(plan, &regions, Arc::clone(&self.log), Arc::clone(&self.words)).map_err(words)?);
        let held = Held { uffd, image: &self.image, journal: &self.journal, board: self.board };
        let outside = lives::serve(&round, &held, body, || self.guests.begin(&round))?;
        let accesses = round.accesses();
        verify::contents(&round, &accesses)?;
        let resident = self.arena.resident(&regions).map_err(words)?;
        verify::notes(&round, &accesses, &outside.journal, &resident)?;
        let counters = outside.counters();
        let sum = |to: &AtomicU64, from: &AtomicU64| to.fetch_add(from.load(Ordering::Relaxed), Ordering::Relaxed);
        sum(&self.board.faults, &counters.faults);
        sum(&self.board.parked, &counters.parked);
        sum(&self.board.present, &counters.present);
        let removals = accesses.iter().filter(|access| access.op.act == Act::Remove).count();
        self.board.removals.fetch_add(removals as u64, Ordering::Relaxed);
        Ok(())
    }

    fn body(&self, plan: &Plan, regions: &[Region]) -> io::Result<Body> {
        Ok(Body {
            boot_id: self.boot_id,
            vmm_pid: std::process::id(),
            vmm_start: self.vmm_start,
            page_size: PAGE as u64,
            regions: regions.to_vec(),
            beside: plan.beside.clone(),
            image: image_id(&self.image, b"/memory")?,
            limits: lives::LIMITS,
        })
    }
}
