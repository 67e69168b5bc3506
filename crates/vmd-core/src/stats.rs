//! Counters, latency histogram and CPU time, readable at any moment without stopping anybody.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What an install is counted as; the names are those of `--stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Demand,
    Replayed,
    Prefetched,
    Zero,
}

impl Kind {
    pub const COUNT: usize = 4;
    pub const ALL: [Self; Self::COUNT] = [Self::Demand, Self::Replayed, Self::Prefetched, Self::Zero];
}

/// Page counts in pages of the VM's page size, but for the installs; the names are those of `--stats`.
#[repr(C)]
#[derive(Default)]
pub struct Counters {
    pub faults: AtomicU64,
    pub removed: AtomicU64,
    pub poisoned: AtomicU64,
    pub present: AtomicU64,
    pub parked: AtomicU64,
}

pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Relaxed);
}

/// CLOCK_MONOTONIC, which all processes of a boot share.
pub fn monotonic() -> Duration {
    read_clock(libc::CLOCK_MONOTONIC)
}

const SUB_BITS: u32 = 4; // 16 steps to each power of two: at most 6 % wide
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) << SUB_BITS;

/// A log-linear histogram of nanoseconds. One writer, any number of readers.
#[repr(C)]
pub struct Histogram {
    max_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Histogram {
    pub fn record(&self, elapsed: Duration) {
        let ns = elapsed.as_nanos() as u64;
        add(&self.buckets[bucket(ns)], 1);
        self.max_ns.fetch_max(ns, Relaxed);
    }

    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Relaxed)
    }

    /// The count, and for each share the value below which that share of the samples lies.
    pub fn read<const N: usize>(&self, shares: [f64; N]) -> (u64, [Option<f64>; N]) {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let total = counts.iter().copied().fold(0, u64::saturating_add); // a journal may say anything
        let quantile = |share: f64| {
            let rank = ((total as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let at = counts.iter().position(|&count| {
                seen = count.saturating_add(seen);
                seen >= rank
            })?;
            Some(middle(at).min(self.max_ns() as f64))
        };
        (total, shares.map(quantile))
    }
}

fn bucket(ns: u64) -> usize {
    let steps = 1 << SUB_BITS;
    if ns < steps {
        return ns as usize;
    }
    let exponent = ns.ilog2() - SUB_BITS;
    ((exponent as usize + 1) << SUB_BITS) + ((ns >> exponent) as usize & (steps as usize - 1))
}

fn middle(bucket: usize) -> f64 {
    let steps = 1 << SUB_BITS;
    if bucket < steps {
        return bucket as f64;
    }
    let exponent = (bucket >> SUB_BITS) - 1;
    let low = ((steps + (bucket & (steps - 1))) as u64) << exponent;
    low as f64 + (1u64 << exponent) as f64 / 2.0
}

/// CPU time of the threads that worked for one VM, those that have ended included.
#[derive(Default)]
pub struct CpuMeter {
    clocks: Mutex<Vec<Clock>>,
}

enum Clock {
    Running(libc::clockid_t),
    Ended(Duration),
}

impl CpuMeter {
    /// Run `work` on this thread and account for the CPU time that it takes.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut clock = 0;
        // SAFETY: the calling thread is alive; the clock is stored through a valid pointer.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        let slot = {
            let mut clocks = self.clocks.lock().unwrap();
            clocks.push(Clock::Running(clock));
            clocks.len() - 1
        };
        let result = work();
        let mut clocks = self.clocks.lock().unwrap(); // first: the total must never go back
        clocks[slot] = Clock::Ended(read_clock(clock));
        result
    }

    pub fn total(&self) -> Duration {
        let read = |clock: &Clock| match clock {
            Clock::Running(id) => read_clock(*id),
            Clock::Ended(spent) => *spent,
        };
        self.clocks.lock().unwrap().iter().map(read).sum()
    }
}

fn read_clock(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec through a valid pointer.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut last = 0;
        for ns in 0..1_000_000u64 {
            let at = bucket(ns);
            assert!(at == last || at == last + 1, "{ns}");
            assert!((middle(at) - ns as f64).abs() <= 1.0 + ns as f64 * 0.04, "{ns}");
            last = at;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_of_known_samples() {
        let histogram = Histogram { max_ns: AtomicU64::new(0), buckets: [const { AtomicU64::new(0) }; BUCKETS] };
        assert_eq!(histogram.read([0.5]), (0, [None]));
        for us in 1..=100 {
            histogram.record(Duration::from_micros(us));
        }
        let (count, [median, last]) = histogram.read([0.5, 0.99]);
        assert_eq!(count, 100);
        assert!((median.unwrap() - 50_000.0).abs() < 3_000.0);
        assert!((last.unwrap() - 99_000.0).abs() < 6_000.0);
        assert_eq!(histogram.max_ns(), 100_000);
    }

    #[test]
    fn numbers_of_a_stranger_do_not_overflow() {
        let histogram = Histogram { max_ns: AtomicU64::new(9), buckets: [const { AtomicU64::new(u64::MAX) }; BUCKETS] };
        assert_eq!(histogram.read([0.5]), (u64::MAX, [Some(0.0)]));
    }

    #[test]
    fn cpu_time_outlives_its_thread() {
        let meter = CpuMeter::default();
        std::thread::scope(|scope| {
            scope.spawn(|| meter.measure(|| (0..3_000_000u64).fold(0, |a, b| std::hint::black_box(a ^ b))));
        });
        assert!(meter.total() > Duration::ZERO);
    }
}
