//! What may be seen: the bytes of each read against everything that was done to its page, and the
//! notes and counters of the page server against the pages that are there.
//!
//! An access is an interval of the log. What has ended before a read begins has happened for it;
//! what begins after its end has not; what overlaps it may have. So what one guest does to pages
//! of its own has exactly one right outcome, and concurrent accesses have a few.

use vmd_core::internals::journal::Journal;
use vmd_core::internals::states::State;

use crate::guest::{Access, Round, own_word};
use crate::image::WORDS;
use crate::plan::{Act, GUESTS};

/// All that was done to one page.
#[derive(Default)]
struct History<'a> {
    removals: Vec<&'a Access>,
    writes: [Vec<&'a Access>; GUESTS],
    guests: [bool; GUESTS],
}

impl History<'_> {
    /// Whether the page was removed, or for a guest's word written, after `after` had ended and before
    /// `before` began.
    fn replaced(&self, word: Option<usize>, after: Option<&Access>, before: &Access) -> bool {
        let within =
            |access: &&&Access| after.is_none_or(|after| access.begin > after.end) && access.end < before.begin;
        let writes = word.map_or(&[][..], |guest| &self.writes[guest]);
        self.removals.iter().chain(writes).any(|access| within(&access))
    }

    /// Whether the page can be as it was in the image.
    fn image(&self, word: Option<usize>, read: &Access) -> bool {
        !self.replaced(word, None, read)
    }

    /// Whether the page can be as a removal left it.
    fn zero(&self, word: Option<usize>, read: &Access) -> bool {
        let writes = word.map_or(&[][..], |guest| &self.writes[guest]);
        let lives =
            |removal: &&&Access| !writes.iter().any(|write| write.begin > removal.end && write.end < read.begin);
        self.removals.iter().filter(|removal| removal.begin < read.end).any(|removal| lives(&removal))
    }

    /// Whether a guest's word can be one that it wrote.
    fn written(&self, guest: usize, value: u64, read: &Access) -> bool {
        let found = self.writes[guest].iter().find(|write| write.seen.words[guest] == value);
        found.is_some_and(|write| write.begin < read.end && !self.replaced(Some(guest), Some(write), read))
    }
}

fn histories<'a>(round: &Round, accesses: &'a [Access]) -> Vec<History<'a>> {
    let mut all: Vec<History> = (0..round.plan.pages()).map(|_| History::default()).collect();
    for access in accesses {
        for history in &mut all[access.op.page..access.op.page + access.op.pages] {
            match access.op.act {
                Act::Read => {}
                Act::Write => history.writes[access.guest].push(access),
                Act::Remove => history.removals.push(access),
            }
        }
    }
    for (guest, ops) in round.plan.ops.iter().enumerate() {
        ops.iter().flat_map(|op| op.page..op.page + op.pages).for_each(|page| all[page].guests[guest] = true);
    }
    all
}

/// Judge all reads.
pub fn contents(round: &Round, accesses: &[Access]) -> Result<(), String> {
    let histories = histories(round, accesses);
    for read in accesses.iter().filter(|access| access.op.act == Act::Read) {
        let history = &histories[read.op.page];
        if let Some((word, got)) = wrong_word(round, history, read) {
            let (guest, page, begin, end) = (read.guest, read.op.page, read.begin, read.end);
            let (byte, got, allowed) = (word * 8, round.origin(page, word, got), allowed(history, read));
            return Err(format!(
                "guest {guest} read page {page} (events {begin} to {end}): the word at byte {byte:#x} is {got}; {allowed}"
            ));
        }
    }
    Ok(())
}

fn wrong_word(round: &Round, history: &History, read: &Access) -> Option<(usize, u64)> {
    let page = read.op.page;
    for (guest, &got) in read.seen.words.iter().enumerate() {
        let word = own_word(guest);
        let image = got == round.image_word(page, word) && history.image(Some(guest), read);
        let zero = got == 0 && history.zero(Some(guest), read);
        if !(image || zero || history.written(guest, got, read)) {
            return Some((word, got));
        }
    }
    let (first_not_image, got) = read.seen.not_image;
    let (image, zero) = (history.image(None, read), history.zero(None, read));
    match read.seen.not_zero {
        _ if image && first_not_image == WORDS => None,
        None if zero => None,
        // Removed while it was being read.
        Some((last, _)) if image && zero && last < first_not_image => None,
        Some(wrong) if !image => Some(wrong),
        _ => Some((first_not_image, got)),
    }
}

fn allowed(history: &History, read: &Access) -> String {
    let spans = |accesses: &[&Access]| {
        accesses.iter().map(|access| format!("{}-{}", access.begin, access.end)).collect::<Vec<_>>().join(" ")
    };
    let writes: Vec<String> = history.writes.iter().map(|writes| format!("[{}]", spans(writes))).collect();
    let (image, zero) = (history.image(None, read), history.zero(None, read));
    let removals = spans(&history.removals);
    format!("image allowed: {image}, zeros allowed: {zero}; removals [{removals}], writes {}", writes.join(" "))
}

/// Judge what the page servers noted and counted. `resident`: which pages are there.
pub fn notes(round: &Round, accesses: &[Access], journal: &Journal, resident: &[bool]) -> Result<(), String> {
    let histories = histories(round, accesses);
    for (page, history) in histories.iter().enumerate() {
        let (state, removed) = (journal.states().get(page), !history.removals.is_empty());
        let right = match state {
            State::Installed => resident[page] || removed, // installed again while a removal was not yet over
            State::Absent => !resident[page] && !removed,
            State::Removed => !resident[page] && removed,
            State::Poisoned => false,
        };
        if !right {
            return Err(format!("page {page}: noted as {state:?}; resident: {}, removed: {removed}", resident[page]));
        }
    }
    let installs = journal.live().installs();
    let removed = journal.live().counters.removed.load(std::sync::atomic::Ordering::Relaxed);
    let balance = installs as i64 - removed as i64;
    let resident = resident.iter().filter(|&&there| there).count() as i64;
    let slack = slack(round, &histories);
    if (balance - resident).abs() > slack {
        return Err(format!("{installs} installs - {removed} removed, but {resident} pages are there (slack {slack})"));
    }
    Ok(())
}

/// By how much the counters may be out. A page that is installed while a removal of it has been read and
/// is not yet over in the kernel is lost without a further event. Only pages that somebody else may
/// bring in are: another guest's fault, or the filler, which makes a fault stale that was read already.
fn slack(round: &Round, histories: &[History]) -> i64 {
    let shared = |(page, history): &(usize, &History)| {
        round.plan.filled[*page] || history.guests.iter().filter(|&&touches| touches).count() > 1
    };
    histories.iter().enumerate().filter(shared).map(|(_, history)| history.removals.len() as i64).sum()
}
