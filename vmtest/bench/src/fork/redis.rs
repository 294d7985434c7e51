// SPDX-License-Identifier: MIT OR Apache-2.0
//! Redis with a gigabyte of data: what its fork takes when it saves, and whether the dump is the data as of
//! that moment, while a client goes on writing.

mod server;

use super::sharing;
use crate::figure::{emit, Samples};
use crate::progress;
use anyhow::{ensure, Context, Result};
use redis::{cmd, Connection, Pipeline, Value};
use server::Server;
use std::collections::HashMap;
use std::time::Duration;

/// A power of two, so that multiplying with an odd number visits all keys.
const KEYS: u64 = 1 << 20;
/// With these a gigabyte of data.
const VALUE: usize = 1 << 10;
/// Saves that only their fork is of interest of, before the one that is gone through with.
const FORKS: usize = 4;
const WRITES_BEFORE: u64 = 1000;
/// Keys in one request.
const BATCH: u64 = 256;

/// Prints the figures.
pub fn run(ask: bool) -> Result<()> {
    let mut server = Server::start(ask)?;
    let mut connection = server.connect()?;
    let size = VALUE.to_string();
    () = cmd("DEBUG")
        .arg(&["POPULATE", &KEYS.to_string(), "key", &size])
        .query(&mut connection)
        .context("DEBUG POPULATE")?;
    let used = info(&mut connection, "memory", "used_memory_rss")?;
    progress!("Redis has {KEYS} keys in {} MB", used / 1_000_000);
    emit("redis_memory", "MB", used as f64 / 1e6);
    ensure!(used > 1_000_000_000, "that is less than a gigabyte");

    let mut data = Data::default();
    let mut forks = Samples::default();
    sharing(ask, 400 * FORKS as u64, || {
        for _ in 0..FORKS {
            data.write(&mut connection, WRITES_BEFORE)?;
            forks.push(save(&mut connection)?);
            server.kill_children()?;
            while saving(&mut connection)? {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    })?;

    data.write(&mut connection, WRITES_BEFORE)?;
    // The same connection, so no write is on its way: this is what the dump must contain.
    let snapshot = data.clone();
    forks.push(save(&mut connection)?);
    let mut during = 0;
    while saving(&mut connection)? {
        data.write(&mut connection, 10)?;
        during += 10;
        std::thread::sleep(Duration::from_millis(2));
    }
    let info_text: String = cmd("INFO").arg("persistence").query(&mut connection)?;
    ensure!(
        info_text.contains("rdb_last_bgsave_status:ok"),
        "the save failed: {info_text}"
    );
    progress!("saved, with {during} writes meanwhile");
    ensure!(during >= 1000, "too few for a test");
    data.check(&mut connection).context("the server's data")?;
    progress!("the server has what was written");
    drop(connection);
    server.stop()?;

    let server = Server::start(false)?;
    let mut connection = server.connect()?;
    snapshot
        .check(&mut connection)
        .context("the data of the dump")?;
    progress!("the dump has what was there at the time of the fork");
    drop(connection);
    server.stop()?;
    forks.emit("redis_fork", "us");
    emit("redis_writes", "writes", during as f64);
    Ok(())
}

/// Starts a save in the background; returns the microseconds that Redis has measured for its fork.
fn save(connection: &mut Connection) -> Result<f64> {
    let _: String = cmd("BGSAVE").query(connection).context("BGSAVE")?;
    let took = info(connection, "stats", "latest_fork_usec")?;
    progress!("fork took {took} us");
    Ok(took as f64)
}

fn saving(connection: &mut Connection) -> Result<bool> {
    Ok(info(connection, "persistence", "rdb_bgsave_in_progress")? != 0)
}

fn info(connection: &mut Connection, section: &str, name: &str) -> Result<u64> {
    let text: String = cmd("INFO").arg(section).query(connection)?;
    field(&text, name).with_context(|| format!("INFO has no {name}: {text}"))
}

/// The number of the line `name:number`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
        .parse()
        .ok()
}

/// What is in the database: all that was written, in order.
#[derive(Clone, Default)]
struct Data {
    writes: u64,
    changed: HashMap<u64, Changes>,
}

/// What has been done to a key since it was made.
#[derive(Clone, Default)]
struct Changes {
    /// The last write that replaced it
    set: Option<u64>,
    /// Those after that which changed a part of it
    ranges: Vec<u64>,
}

/// Does this write replace the value?
fn replaces(write: u64) -> bool {
    write & 7 == 0
}

/// Where the others write their number.
fn place(write: u64) -> usize {
    (write * 37) as usize % (VALUE - 20)
}

fn number(write: u64) -> String {
    format!("<{write:014}>")
}

/// What a write that replaces a value puts there.
fn replacement(write: u64) -> Vec<u8> {
    let mut value = number(write).repeat(VALUE / 16).into_bytes();
    value.resize(VALUE, b'.');
    value
}

impl Data {
    /// Writes `count` times, to keys all over the memory.
    fn write(&mut self, connection: &mut Connection, count: u64) -> Result<()> {
        let mut pipe = Pipeline::new();
        for _ in 0..count {
            self.writes += 1;
            let write = self.writes;
            let key = write.wrapping_mul(0x9e37_79b1) % KEYS;
            let changes = self.changed.entry(key).or_default();
            if replaces(write) {
                *changes = Changes {
                    set: Some(write),
                    ranges: Vec::new(),
                };
                pipe.cmd("SET").arg(name(key)).arg(replacement(write));
            } else {
                changes.ranges.push(write);
                pipe.cmd("SETRANGE").arg(name(key));
                pipe.arg(place(write)).arg(number(write));
            }
            pipe.ignore();
        }
        () = pipe.query(connection).context("writing")?;
        Ok(())
    }

    /// What a key must have.
    fn value(&self, key: u64) -> Vec<u8> {
        let none = Changes::default();
        let changes = self.changed.get(&key).unwrap_or(&none);
        let mut value = match changes.set {
            Some(write) => replacement(write),
            None => {
                let mut made = format!("value:{key}").into_bytes();
                made.resize(VALUE, 0);
                made
            }
        };
        for &write in &changes.ranges {
            let at = place(write);
            value[at..at + 16].copy_from_slice(number(write).as_bytes());
        }
        value
    }

    /// Fails when the server has other keys, or other values.
    fn check(&self, connection: &mut Connection) -> Result<()> {
        let keys: u64 = cmd("DBSIZE").query(connection)?;
        ensure!(keys == KEYS, "{keys} keys, {KEYS} were written");
        for first in (0..KEYS).step_by(BATCH as usize) {
            let mut get = cmd("MGET");
            for key in first..first + BATCH {
                get.arg(name(key));
            }
            let values: Vec<Value> = get.query(connection)?;
            ensure!(values.len() as u64 == BATCH, "{} values", values.len());
            for (key, value) in (first..).zip(values) {
                let Value::BulkString(bytes) = value else {
                    anyhow::bail!("key {key} has no value: {value:?}");
                };
                let expected = self.value(key);
                ensure!(
                    bytes == expected,
                    "key {key} has {:?}, it should have {:?}, after {} writes",
                    String::from_utf8_lossy(&bytes),
                    String::from_utf8_lossy(&expected),
                    self.writes
                );
            }
        }
        Ok(())
    }
}

fn name(key: u64) -> String {
    format!("key:{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_info_is_found() {
        let text = "# Stats\r\ntotal_forks:1\r\nlatest_fork_usec:314\r\n";
        assert_eq!(field(text, "latest_fork_usec"), Some(314));
        assert_eq!(field(text, "fork_usec"), None);
    }

    #[test]
    fn values_are_what_the_writes_left() {
        let mut data = Data::default();
        assert!(data.value(7).starts_with(b"value:7\0"));
        data.changed.entry(7).or_default().ranges.push(3);
        let value = data.value(7);
        assert_eq!(&value[place(3)..place(3) + 16], b"<00000000000003>");
        assert!(value.starts_with(b"value:7\0"));
        data.changed.insert(
            7,
            Changes {
                set: Some(8),
                ranges: vec![9],
            },
        );
        let value = data.value(7);
        assert!(value.starts_with(b"<00000000000008>"));
        assert_eq!(value.len(), VALUE);
        assert_ne!(value, replacement(8));
    }
}
