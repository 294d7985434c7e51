//! `vmtest/selftests/list.txt`: which of the kernel's tests are run, and why
//! the others are not.

use super::Way;
use crate::test::table;
use anyhow::{bail, ensure, Context, Result};

const LIST: &str = include_str!("../../../../vmtest/selftests/list.txt");

/// The list.
pub struct List<'a> {
    /// What is run, in order
    pub tests: Vec<Entry<'a>>,
    left_out: Vec<&'a str>,
}

/// A test of the list.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// Its name
    pub name: &'a str,
    /// How many of its cases pass on stock, at least
    pub cases: usize,
    command: &'a str,
    seconds: u32,
    short: Words<'a>,
    shares: Words<'a>,
}

/// Names of [`Way`]s with commas between, or "-" for none.
#[derive(Clone, Copy, Debug)]
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let known = |w| Way::ALL.iter().any(|way| way.name == w);
        ensure!(text == "-" || text.split(',').all(known), "{text}?");
        Ok(Self(text))
    }

    fn has(self, way: &Way) -> bool {
        self.0.split(',').any(|w| w == way.name)
    }
}

impl Entry<'_> {
    /// What the guest is told: name, seconds, command; `patience` times the seconds that the list has.
    pub fn line(&self, patience: u32) -> String {
        let seconds = self.seconds * patience;
        format!("{}\t{seconds}\t{}", self.name, self.command)
    }

    /// Whether it is run in this way without --long.
    pub fn short(&self, way: &Way) -> bool {
        self.short.has(way)
    }

    /// Whether it makes processes share tables in this way.
    pub fn shares(&self, way: &Way) -> bool {
        self.shares.has(way)
    }
}

impl List<'static> {
    /// The list of the repository.
    pub fn read() -> Result<Self> {
        List::parse(LIST)
    }
}

impl<'a> List<'a> {
    /// Reads a list.
    pub fn parse(text: &'a str) -> Result<Self> {
        let mut list = List {
            tests: Vec::new(),
            left_out: Vec::new(),
        };
        for line in table(text) {
            list.add(line)
                .with_context(|| format!("list.txt: {line}"))?;
        }
        Ok(list)
    }

    fn add(&mut self, line: &'a str) -> Result<()> {
        let columns: Vec<&str> = line.split('\t').collect();
        if let [name, "no", reason] = columns[..] {
            ensure!(!reason.trim().is_empty(), "no reason");
            self.left_out.push(name);
            return Ok(());
        }
        let [name, short, shares, cases, seconds, command] = columns[..] else {
            bail!("not a line of six columns");
        };
        ensure!(
            self.tests.iter().all(|t| t.name != name),
            "it is there twice"
        );
        let entry = Entry {
            name,
            cases: cases.parse().context("how many cases?")?,
            command,
            seconds: seconds.parse().context("how many seconds?")?,
            short: Words::parse(short)?,
            shares: Words::parse(shares)?,
        };
        ensure!(entry.cases > 0, "a test without a case");
        self.tests.push(entry);
        Ok(())
    }

    /// Whether the list says anything of a program.
    pub fn knows(&self, program: &str) -> bool {
        let in_word = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        self.left_out.contains(&program)
            || self.tests.iter().any(|t| {
                t.name == program || t.command.split(|c| !in_word(c)).any(|w| w == program)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_well_formed() {
        let list = List::read().unwrap();
        for way in &Way::ALL {
            assert!(list.tests.iter().any(|t| t.short(way) && t.shares(way)));
            assert!(list.tests.iter().any(|t| !t.short(way)));
        }
    }

    #[test]
    fn a_line_says_all_of_it() {
        let text = "# x\na\tptshare,odf\todf\t3\t9\tb -c; d.sh\ne\tno\tbad\n";
        let list = List::parse(text).unwrap();
        let a = &list.tests[0];
        assert_eq!(
            (a.name, a.cases, a.line(1).as_str()),
            ("a", 3, "a\t9\tb -c; d.sh")
        );
        let [ptshare, odf] = &Way::ALL;
        assert!(a.short(ptshare) && a.short(odf));
        assert!(!a.shares(ptshare) && a.shares(odf));
        for (program, known) in [
            ("a", true),
            ("b", true),
            ("d.sh", true),
            ("e", true),
            ("d", false),
        ] {
            assert_eq!(list.knows(program), known, "{program}");
        }
        for bad in [
            "a\tnow\t-\t3\t9\tb",
            "a\t-\t-\t0\t9\tb",
            "a\t-\t3\t9\tb",
            "a\t-\t-\t3\t9\tb\na\t-\t-\t3\t9\tb",
            "a\tno\t",
        ] {
            assert!(List::parse(bad).is_err(), "{bad}");
        }
    }
}
