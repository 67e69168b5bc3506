//! The pager's own arguments; `vmd.pager` and a pager's spawning of its standby are the only ones to write them.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// What pager and standby are told alike.
#[derive(Clone, Debug)]
pub struct Options {
    pub listener: RawFd,
    /// Where each VM has a directory with a journal in it.
    pub runs: PathBuf,
    /// End when there has been nothing to serve for so long; None: stay.
    pub idle: Option<Duration>,
    /// Of a standby.
    pub inherited: Option<Inherited>,
    words: Vec<String>,
}

/// What a standby has from its pager: a connection, and its pidfd.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    pub socket: RawFd,
    pub pager: RawFd,
}

impl Options {
    /// `--listener FD --runs DIR --idle MS [--standby FD,FD]`; 0 ms is for ever.
    pub fn parse(words: Vec<String>) -> Result<Self, String> {
        let (mut listener, mut runs, mut idle, mut inherited) = (None, None, None, None);
        for pair in words.chunks(2) {
            let [option, value] = pair else { return Err(format!("{} without a value", pair[0])) };
            match option.as_str() {
                "--listener" => listener = Some(number(value)? as RawFd),
                "--runs" => runs = Some(PathBuf::from(value)),
                "--idle" => idle = Some(Duration::from_millis(number(value)?)),
                "--standby" => {
                    let (socket, pager) = value.split_once(',').ok_or("--standby: expected two descriptors")?;
                    inherited = Some(Inherited { socket: number(socket)? as RawFd, pager: number(pager)? as RawFd });
                }
                _ => return Err(format!("there is no option {option}")),
            }
        }
        let idle = idle.filter(|idle| !idle.is_zero());
        Ok(Self { listener: listener.ok_or("no --listener")?, runs: runs.ok_or("no --runs")?, idle, inherited, words })
    }

    /// The command line of a standby: ours, with what it inherits.
    pub fn command(&self, listener: RawFd, inherited: &Inherited) -> io::Result<Vec<String>> {
        let line = fs::read("/proc/self/cmdline")?;
        let mut words: Vec<String> =
            line.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        words.pop(); // behind the last zero
        words.truncate(words.len().saturating_sub(self.words.len()));
        let runs = self.runs.to_string_lossy().into_owned();
        let idle = self.idle.unwrap_or_default().as_millis();
        let (socket, pager) = (inherited.socket, inherited.pager);
        let named = [("--listener", listener.to_string()), ("--runs", runs), ("--idle", idle.to_string())];
        words.extend(named.into_iter().flat_map(|(option, value)| [option.to_string(), value]));
        words.extend(["--standby".to_string(), format!("{socket},{pager}")]);
        Ok(words)
    }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("expected a number, got {word}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split(' ').map(str::to_string).collect())
    }

    #[test]
    fn options_are_words_in_pairs() {
        let options = parse("--listener 3 --runs /run/vmd --idle 500 --standby 4,5").unwrap();
        assert_eq!((options.listener, options.idle), (3, Some(Duration::from_millis(500))));
        assert_eq!(options.inherited.map(|fds| (fds.socket, fds.pager)), Some((4, 5)));
        assert_eq!(parse("--listener 3 --runs /run/vmd --idle 0").unwrap().idle, None);
        assert!(parse("--listener 3").unwrap_err().contains("--runs"));
        assert!(parse("--listener three --runs x").unwrap_err().contains("three"));
        assert!(parse("--listener").is_err());
    }
}
