//! Page servers that die, over a real userfaultfd, in a million orders of events.
//!
//! One interleaving: guests (threads of this process) read, write and remove pages of fresh memory; a
//! core made of the crate's own modules serves them; it is killed at a point, or at any moment, and
//! another goes on from its journal, several in a row. Then each byte that was read is judged by
//! everything that was done to its page, and notes and counters by the pages that are there. Wrong
//! bytes, guests that nobody wakes and cores that give up are reported with the seed, from which the
//! same can be run again.
//!
//! | module | what it is |
//! |---|---|
//! | `chance` | numbers drawn from a seed |
//! | `events` | one log of what happened, in order; waits where order matters |
//! | `image`, `memory` | the bytes of the image; pages of this process and their userfaultfd |
//! | `plan` | what one interleaving is made of |
//! | `guest` | the threads that touch the memory |
//! | `lives` | the page servers, one after the other |
//! | `verify` | which bytes, notes and counters are right |
//! | `board` | what the processes of the runner share |
//! | `worker` | one process: one interleaving after the other |
//! | `parent` | starts the processes, notices hangs, reports |

mod board;
mod chance;
mod events;
mod guest;
mod image;
mod lives;
mod memory;
mod parent;
mod plan;
mod verify;
mod worker;

use std::process::ExitCode;
use std::time::Duration;

/// What is asked for on the command line.
pub struct Asked {
    /// The first seed; all seeds from it on are run, or only this one again and again.
    pub seed: u64,
    pub only: bool,
    pub count: u64,
    pub workers: usize,
    /// No interleaving may take longer.
    pub hang: Duration,
}

/// What test runners take for "skipped".
const CANNOT: u8 = 77;

const USAGE: &str = "usage: interleave [--count N] [--from SEED | --seed SEED] [--workers N] [--hang-seconds N]";

fn main() -> ExitCode {
    let Some(asked) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if let Err(error) = memory::userfaultfd() {
        eprintln!("interleave: no userfaultfd may be had: {error}");
        return ExitCode::from(CANNOT);
    }
    match parent::run(&asked) {
        Ok(words) => {
            println!("{words}");
            ExitCode::SUCCESS
        }
        Err(words) => {
            eprintln!("{words}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Asked> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut asked = Asked { seed: 0, only: false, count: 2000, workers: 2 * cpus, hang: Duration::from_secs(10) };
    while let Some(word) = words.next() {
        let number: u64 = words.next()?.parse().ok()?;
        match word.as_str() {
            "--count" => asked.count = number,
            "--from" => asked.seed = number,
            "--seed" => (asked.seed, asked.only) = (number, true),
            "--workers" => asked.workers = (number as usize).clamp(1, board::WORKERS_MAX),
            "--hang-seconds" => asked.hang = Duration::from_secs(number),
            _ => return None,
        }
    }
    Some(asked)
}
