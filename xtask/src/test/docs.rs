//! What the documents say of tests: what they name is there, and every test
//! stands where one looks for it.

use super::mutations;
use crate::paths;
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use walkdir::WalkDir;

fn read(path: &str) -> String {
    fs::read_to_string(paths::in_root(path)).unwrap()
}

/// The guest's tests, as `group::name`, from the lists of their modules.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for file in WalkDir::new(paths::in_root("vmtest/tests/src")) {
        let path = file.unwrap().into_path();
        if path.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for group in text.split("\ngroup!(\"").skip(1) {
            let (group, list) = group.split_once("\";").unwrap();
            let (list, _) = list.split_once("\n);").unwrap();
            for name in list.split(',') {
                let name = name.split('(').next().unwrap_or(name).trim();
                if !name.is_empty() {
                    tests.insert(format!("{group}::{name}"));
                }
            }
        }
    }
    assert!(tests.len() > 400, "{tests:?}");
    tests
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Names, with `*` for anything.
struct Names(Vec<Regex>);

impl Names {
    /// Of each there must be a test.
    fn new(names: impl Iterator<Item = String>, tests: &BTreeSet<String>) -> Self {
        let names = names.map(|name| {
            let pattern = regex::escape(&name).replace(r"\*", ".*");
            let pattern = Regex::new(&format!("^{pattern}$")).unwrap();
            let known = tests.iter().any(|t| pattern.is_match(t));
            assert!(known, "no test {name}");
            pattern
        });
        Self(names.collect())
    }

    fn have(&self, test: &str) -> bool {
        self.0.iter().any(|n| n.is_match(test))
    }
}

/// The table of docs/on-demand-fork.md names every test of on-demand fork, and none that is not there.
#[test]
fn tests_of_on_demand_fork_are_documented() {
    let tests = tests();
    let doc = read("docs/on-demand-fork.md");
    let (_, table) = doc.split_once("\n## Tests\n").unwrap();
    // The second column, where all that is quoted is a test, or the beginning of some.
    let cells = table.lines().filter_map(|l| l.split('|').nth(2));
    let names = cells.flat_map(quoted).filter(|n| !n.contains(' '));
    let names = Names::new(names.map(|n| format!("odf::{n}")), &tests);
    for test in tests.iter().filter(|t| t.starts_with("odf::")) {
        assert!(names.have(test), "{test} is not in the table");
    }
}

/// Each argument of docs/on-demand-fork.md names tests, and with a mutation one that must notice it. All these
/// names are of something that is there: a guest test, a mutation, or a test of the model.
#[test]
fn arguments_for_on_demand_fork_name_their_tests() {
    let tests = tests();
    let list = mutations::list(mutations::LIST).unwrap();
    let taken_out: BTreeMap<_, _> = list.into_iter().map(|m| (m.name, m.tests)).collect();
    let model = read("crates/ptshare-core/tests/fork.rs");
    let doc = read("docs/on-demand-fork.md");
    let (arguments, _) = doc.split_once("\n## Tests\n").unwrap();
    let sections: Vec<&str> = arguments.split("\n## ").skip(1).collect();
    assert!(sections.len() > 7, "{} sections", sections.len());
    for section in sections {
        let title = section.lines().next().unwrap();
        let Some((_, last)) = section.split_once("\nTests: ") else {
            panic!("{title}: no paragraph that begins with \"Tests: \"");
        };
        let named: BTreeSet<String> = quoted(last).map(|n| format!("odf::{n}")).collect();
        assert!(named.iter().any(|n| tests.contains(n)), "{title}: no test");
        for name in &named {
            let bare = name.trim_start_matches("odf::");
            let modelled = model.contains(&format!("\nfn {bare}()"));
            let Some(by) = taken_out.get(bare) else {
                let there = modelled || tests.contains(name);
                assert!(there, "{title}: there is no {bare}");
                continue;
            };
            let with_it = by.iter().any(|test| named.contains(test));
            assert!(with_it, "{title}: {bare} without {}", by.join(" or "));
        }
    }
}

/// Each guest test is in a row of docs/kernel-paths.md, but those of on-demand fork, which the table above has;
/// and no row names one that is not there.
#[test]
fn each_test_stands_with_its_path() {
    let tests = tests();
    let doc = read("docs/kernel-paths.md");
    let rows = doc.lines().filter(|l| l.starts_with("| "));
    let names = rows.flat_map(quoted).filter(|n| n.contains("::"));
    let names = Names::new(names.map(str::to_owned), &tests);
    for test in tests.iter().filter(|t| !t.starts_with("odf::")) {
        assert!(names.have(test), "{test} is in no row of kernel-paths.md");
    }
}
