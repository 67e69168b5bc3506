//! VMs that nobody serves, found by the journals in their run directories.

use std::fs;
use std::path::Path;

use super::hold::Hold;
use super::log;
use crate::adopt;

/// The name of a journal in a VM's run directory (`vmd.pager.handed`).
const JOURNAL: &str = "pages.journal";

/// All of them. One that cannot be adopted though its VMM lives is killed, with the reason: never left hanging.
pub fn all(runs: &Path) -> Vec<Hold> {
    let Ok(entries) = fs::read_dir(runs) else { return Vec::new() };
    let mut holds = Vec::new();
    for entry in entries.flatten() {
        let (journal, name) = (entry.path().join(JOURNAL), entry.file_name().to_string_lossy().into_owned());
        if !journal.exists() {
            continue;
        }
        match adopt::find(&journal, None) {
            Ok(found) => holds.extend(Hold::found(name, found).filter(|hold| !hold.is_given_up())),
            Err(refused) if refused.served => {}
            Err(refused) => {
                let why = refused.why.clone();
                let end = if refused.give_up() { "killed" } else { "passed by" };
                log::line(&format!("{name}: {end}: {why}"));
            }
        }
    }
    holds
}
