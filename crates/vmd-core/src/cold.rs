//! Demand pages that the page cache does not have.
//!
//! A disk may take milliseconds, or for ever; the fault thread must not wait for it, or REMOVEs,
//! other vCPUs' faults, stop and exit would wait too. So threads of their own read such pages and
//! lay the bytes on a desk; the fault thread, woken by an eventfd, takes and installs them.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crate::crash;
use crate::image::Image;
use crate::vm::{EventFd, Outside};

/// As many reads at once as a guest has vCPUs that wait for a page; more queue up.
const THREADS_MAX: usize = 4;

/// A page that was read, or could not be.
pub struct Read {
    pub page: usize,
    pub bytes: io::Result<Vec<u8>>,
}

/// The fault thread's side of the desk. Threads start when they are first needed.
pub struct ColdReads {
    desk: Arc<Desk>,
    threads: Vec<JoinHandle<()>>,
}

struct Desk {
    image: Arc<Image>,
    outside: Arc<Outside>,
    page_size: usize,
    tries: u32,
    done: EventFd,
    papers: Mutex<Papers>,
    wanted: Condvar,
}

#[derive(Default)]
struct Papers {
    wanted: VecDeque<(usize, u64)>, // page, image offset
    read: Vec<Read>,
    reading: usize,
    closed: bool,
}

impl ColdReads {
    /// `tries`: reads of a page before it counts as lost.
    pub fn new(image: Arc<Image>, outside: Arc<Outside>, page_size: usize, tries: u32) -> io::Result<Self> {
        let (papers, wanted) = (Mutex::default(), Condvar::new());
        let desk = Desk { image, outside, page_size, tries, done: EventFd::new()?, papers, wanted };
        Ok(Self { desk: Arc::new(desk), threads: Vec::new() })
    }

    /// An eventfd, readable when there is something to `take`.
    pub fn raw(&self) -> i32 {
        self.desk.done.raw()
    }

    /// Have a page read. Fails when not even one thread can be had.
    pub fn ask(&mut self, page: usize, offset: u64) -> io::Result<()> {
        let outstanding = {
            let mut papers = self.desk.papers.lock().unwrap();
            papers.wanted.push_back((page, offset));
            papers.wanted.len() + papers.reading
        };
        if outstanding > self.threads.len() && self.threads.len() < THREADS_MAX {
            let desk = Arc::clone(&self.desk);
            let thread = std::thread::Builder::new().name("vmd-cold".into()).stack_size(64 << 10);
            match thread.spawn(move || desk.serve()) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => return Err(error),
                Err(_) => {} // those that there are will read it
            }
        }
        self.desk.wanted.notify_one();
        Ok(())
    }

    /// What has been read since the last call.
    pub fn take(&self) -> Vec<Read> {
        self.desk.done.clear();
        std::mem::take(&mut self.desk.papers.lock().unwrap().read)
    }
}

impl Drop for ColdReads {
    /// A thread whose read does not return is left behind; it ends with that read.
    fn drop(&mut self) {
        let stuck = {
            let mut papers = self.desk.papers.lock().unwrap();
            papers.closed = true;
            papers.reading > 0
        };
        self.desk.wanted.notify_all();
        for thread in self.threads.drain(..).filter(|_| !stuck) {
            let _ = thread.join();
        }
    }
}

impl Desk {
    fn serve(&self) {
        let crashes = &self.outside.journal.live().crashes;
        crash::attribute(crashes, || self.outside.cpu.measure(|| self.work()));
    }

    fn work(&self) {
        let mut papers = self.papers.lock().unwrap();
        loop {
            papers = self.wanted.wait_while(papers, |papers| papers.wanted.is_empty() && !papers.closed).unwrap();
            let Some((page, offset)) = papers.wanted.pop_front().filter(|_| !papers.closed) else { return };
            papers.reading += 1;
            drop(papers);
            let bytes = self.read(offset);
            papers = self.papers.lock().unwrap();
            papers.reading -= 1;
            papers.read.push(Read { page, bytes });
            self.done.set();
        }
    }

    fn read(&self, offset: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.page_size];
        let mut result = self.image.read(&mut bytes, offset);
        for _ in 1..self.tries {
            if result.is_ok() {
                break;
            }
            result = self.image.read(&mut bytes, offset);
        }
        result.map(|()| bytes)
    }
}
