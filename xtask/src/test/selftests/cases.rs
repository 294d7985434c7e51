//! Reads what the selftests print: their cases, by name, and how each ended.
//!
//! Most print TAP, under a heading or not; khugepaged and uffd-unit-tests have
//! forms of their own; some say all by their exit status, which is a case of
//! every test.

use regex::Regex;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// Exit status of a selftest that could not be tried.
const KSFT_SKIP: i32 = 4;
/// Exit statuses of timeout(1).
const TIMED_OUT: [i32; 2] = [124, 137];
/// The case that every test has.
pub const EXIT: &str = "exit status";

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Case {
    /// As it should
    Pass,
    /// Not as it should
    Fail(String),
    /// It could not be tried
    Skip,
}

/// A test that ended.
#[derive(Clone, Debug)]
pub struct Test {
    /// Its name in the list
    pub name: String,
    /// Its cases
    pub cases: BTreeMap<String, Case>,
    /// How long it took
    pub seconds: f64,
    /// How many tables were shared meanwhile, by name of the way
    pub shared: BTreeMap<String, u64>,
    /// How often a part of it was tried again
    pub again: usize,
}

impl Test {
    /// The names of the cases that passed.
    pub fn passed(&self) -> impl Iterator<Item = &str> {
        let passed = |(_, case): &(&String, &Case)| **case == Case::Pass;
        self.cases.iter().filter(passed).map(|(name, _)| &**name)
    }
}

/// The tests that ended, from all that run.sh printed.
pub fn tests(text: &str) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut current: Option<(&str, String)> = None;
    let mut again = 0;
    for line in text.lines() {
        let Some(mark) = line.strip_prefix("@@ ") else {
            if let Some((_, output)) = &mut current {
                output.push_str(line);
                output.push('\n');
            }
            continue;
        };
        let words: Vec<&str> = mark.split(' ').collect();
        match words[..] {
            ["begin", name] => (current, again) = (Some((name, String::new())), 0),
            ["again", ..] => again += 1,
            ["end", name, status, seconds, ref shared @ ..] => {
                // An end counts only with its beginning.
                let output = current.take().filter(|(begun, _)| *begun == name);
                if let (Some((_, output)), Ok(status)) = (output, status.parse()) {
                    tests.push(Test {
                        name: name.to_owned(),
                        cases: cases(&output, status),
                        seconds: seconds.parse().unwrap_or_default(),
                        shared: shared.iter().filter_map(|w| count(w)).collect(),
                        again,
                    });
                }
            }
            _ => {}
        }
    }
    tests
}

/// A name and a count, as in `odf=3`.
fn count(word: &str) -> Option<(String, u64)> {
    let (name, count) = word.split_once('=')?;
    Some((name.to_owned(), count.parse().ok()?))
}

static COLOUR: LazyLock<Regex> = LazyLock::new(|| pattern(r"\x1b\[[0-9;]*m"));
static TAP: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(not )?ok \d+ ?(.*?) ?(?:# ?(SKIP|XFAIL|XPASS)\b ?(.*))?$"));
/// What is another one each time: a count of pagemap_ioctl's, and the size at which mrelease_test came in time.
static COUNTS: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"(Extra pages|Success reaping a child with) .*"));
static HEADING: LazyLock<Regex> = LazyLock::new(|| pattern(r"^# \[RUN\] (.*)$"));
static KHUGEPAGED: LazyLock<Regex> = LazyLock::new(|| pattern(r"^Run test: (.*)$"));
static STEP: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(.*?)\.*\s+(OK|Fail|Skip)$"));
static UFFD: LazyLock<Regex> = LazyLock::new(|| pattern(r"^Testing (.*?)\.\.\. ?(.*)$"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a pattern of this file")
}

fn cases(output: &str, status: i32) -> BTreeMap<String, Case> {
    let output = COLOUR.replace_all(output, "");
    let mut found = Found::default();
    let (mut heading, mut last) = (String::new(), String::new());
    let mut khugepaged: Option<(String, Case)> = None;
    let mut uffd: Option<String> = None;
    for line in output.lines() {
        let line = line.trim_end();
        if let Some(name) = uffd.take() {
            // The outcome may come after other output.
            match outcome(line) {
                Some(case) => found.add(name, case),
                None => uffd = Some(name),
            }
        }
        if let Some(words) = UFFD.captures(line) {
            if let Some(name) = uffd.take() {
                found.add(name, Case::Fail("no outcome".into()));
            }
            match outcome(&words[2]) {
                Some(case) => found.add(words[1].to_owned(), case),
                None => uffd = Some(words[1].to_owned()),
            }
        } else if let Some(words) = HEADING.captures(line) {
            heading = format!("{}: ", &words[1]);
        } else if let Some(words) = KHUGEPAGED.captures(line) {
            if let Some((name, case)) = khugepaged.take() {
                found.add(name, case);
            }
            khugepaged = Some((words[1].to_owned(), Case::Fail("no outcome".into())));
        } else if let (Some((_, case)), Some(words)) = (&mut khugepaged, STEP.captures(line)) {
            *case = match (&words[2], &case) {
                // A step that failed decides; a skipped one is no success.
                (_, Case::Fail(why)) if why != "no outcome" => continue,
                ("Fail", _) => Case::Fail(words[1].to_owned()),
                ("Skip", _) | (_, Case::Skip) => Case::Skip,
                _ => Case::Pass,
            };
        } else if let Some(words) = TAP.captures(line) {
            let text = words.get(2).map_or("", |m| m.as_str());
            let more = words.get(4).map_or("", |m| m.as_str());
            let text = if text.is_empty() { more } else { text };
            let text = COUNTS.replace(text.trim_start_matches("- "), "$1");
            let name = format!("{heading}{text}");
            let case = match (words.get(1), words.get(3).map(|m| m.as_str())) {
                (_, Some("SKIP")) => Case::Skip,
                (_, Some("XFAIL")) | (None, _) => Case::Pass,
                _ => Case::Fail(last.clone()),
            };
            found.add(name, case);
        }
        if !line.is_empty() {
            last = line.trim_start_matches("# ").chars().take(200).collect();
        }
    }
    if let Some((name, case)) = khugepaged {
        found.add(name, case);
    }
    if let Some(name) = uffd {
        found.add(name, Case::Fail("no outcome".into()));
    }
    let exit = match status {
        0 => Case::Pass,
        KSFT_SKIP => Case::Skip,
        s if TIMED_OUT.contains(&s) => Case::Fail(format!("timed out after: {last}")),
        s => Case::Fail(format!("{s} after: {last}")),
    };
    found.add(EXIT.into(), exit);
    found.0
}

/// What uffd-unit-tests prints for an outcome.
fn outcome(text: &str) -> Option<Case> {
    match text.split(' ').next()? {
        "done" => Some(Case::Pass),
        "skipped" => Some(Case::Skip),
        "failed" => Some(Case::Fail(text.to_owned())),
        _ => None,
    }
}

#[derive(Default)]
struct Found(BTreeMap<String, Case>);

impl Found {
    /// Adds a case; a name that comes again gets a number.
    fn add(&mut self, name: String, case: Case) {
        let mut unique = name.clone();
        let mut n = 1;
        while self.0.contains_key(&unique) {
            n += 1;
            unique = format!("{name} ({n})");
        }
        self.0.insert(unique, case);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(output: &str, status: i32) -> Vec<(String, Case)> {
        cases(output, status).into_iter().collect()
    }

    fn pair(name: &str, case: Case) -> (String, Case) {
        (name.to_owned(), case)
    }

    #[test]
    fn tap_under_headings() {
        let output = "TAP version 13\n1..4\n# [RUN] a pin\nok 1 held\n# [RUN] a fork\n\
                      # leaked\nnot ok 2 held\nok 3 # SKIP no pages\nok 4 # XFAIL odd\n";
        assert_eq!(
            listed(output, 1),
            [
                pair("a fork: held", Case::Fail("leaked".into())),
                pair("a fork: no pages", Case::Skip),
                pair("a fork: odd", Case::Pass),
                pair("a pin: held", Case::Pass),
                pair(EXIT, Case::Fail("1 after: ok 4 # XFAIL odd".into())),
            ]
        );
    }

    #[test]
    fn tap_twice_the_same() {
        let output = "ok 1 same\nnot ok 2 same\nok 3 t Extra pages 14 (0.0%), more 2.\n";
        assert_eq!(
            listed(output, 0),
            [
                pair(EXIT, Case::Pass),
                pair("same", Case::Pass),
                pair("same (2)", Case::Fail("ok 1 same".into())),
                pair("t Extra pages", Case::Pass),
            ]
        );
    }

    #[test]
    fn khugepaged_steps() {
        let output = "Save settings... \x1b[32mOK\x1b[0m\n\nRun test: full (madvise:shmem)\n\
                      Collapse.... \x1b[32mOK\x1b[0m\n\nRun test: empty (madvise:shmem)\n\
                      Allocate... \x1b[31mFail\x1b[0m\nCollapse... \x1b[32mOK\x1b[0m\n\n\
                      Run test: cut off (madvise:shmem)\n";
        assert_eq!(
            listed(output, 4),
            [
                pair("cut off (madvise:shmem)", Case::Fail("no outcome".into())),
                pair("empty (madvise:shmem)", Case::Fail("Allocate".into())),
                pair(EXIT, Case::Skip),
                pair("full (madvise:shmem)", Case::Pass),
            ]
        );
    }

    #[test]
    fn uffd_lines() {
        let output = "Testing move on anon... done\nTesting wp on shmem... skipped [reason: x]\n\
                      Testing poison on shmem... noise\nfailed [reason: y]\n\
                      Testing events on shmem... ";
        assert_eq!(
            listed(output, 124),
            [
                pair("events on shmem", Case::Fail("no outcome".into())),
                pair(
                    EXIT,
                    Case::Fail("timed out after: Testing events on shmem...".into())
                ),
                pair("move on anon", Case::Pass),
                pair("poison on shmem", Case::Fail("failed [reason: y]".into())),
                pair("wp on shmem", Case::Skip),
            ]
        );
    }

    #[test]
    fn a_test_without_an_end_is_not_there() {
        let text = "@@ begin a\nok 1 x\n@@ again y\n\n@@ end a 0 1.5 odf=7 z\n\
                    @@ begin b\nok 1 y\n";
        let found = tests(text);
        assert_eq!(found.len(), 1);
        let a = &found[0];
        assert_eq!((a.name.as_str(), a.seconds, a.again), ("a", 1.5, 1));
        assert_eq!(a.shared, BTreeMap::from([("odf".to_owned(), 7)]));
        assert_eq!(a.cases.len(), 2);
        assert_eq!(a.passed().count(), 2);
    }
}
