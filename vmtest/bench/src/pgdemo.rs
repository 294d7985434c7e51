// SPDX-License-Identifier: MIT OR Apache-2.0
//! PostgreSQL as the user of shared page tables: starts an unmodified server over a prepared data directory,
//! lets one backend after the other scan a table that fills its shared buffers, and watches what that costs.
//!
//! Prints JSON lines with an `event` each: `setting` once, `backend` for each backend that has scanned,
//! `sample` for the machine at that moment, `done` at the end. A result that differs between backends, or a
//! backend that did not go through every buffer, is an error.

mod server;

use crate::{proc, progress};
use anyhow::{bail, ensure, Context, Result};
use postgres::Client;
use serde_json::json;
use server::{Server, Settings};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The table that fills the shared buffers; pgbench made it.
const TABLE: &str = "pgbench_accounts";

/// Reads every row once. Neither the sum nor the exclusive or depends on the order of the rows.
pub const SCAN: &str = "SELECT concat_ws('/', count(*), sum(abalance), \
     to_hex(bit_xor(hashint8extended((aid::int8 << 32) # abalance, bid)))) FROM pgbench_accounts";

/// What to run.
struct Options {
    settings: Settings,
    backends: usize,
    workers: usize,
    every: usize,
    ptshare: Option<String>,
}

/// Runs the demonstration's part inside the machine.
pub fn run(args: &[String]) -> Result<()> {
    let options = parse(args)?;
    if let Some(mode) = &options.ptshare {
        proc::write("/proc/sys/vm/ptshare", mode)?;
    }
    let server = Server::start(&options.settings)?;
    let done = drive(&server, &options);
    // The server's own words come after ours when something went wrong.
    let stopped = server.stop(done.is_err());
    done?;
    stopped
}

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options {
        settings: Settings::default(),
        backends: 100,
        workers: 2,
        every: 1,
        ptshare: None,
    };
    for pair in args.chunks(2) {
        let [name, value] = pair else {
            bail!("{} needs a value", pair[0])
        };
        match name.as_str() {
            "--bin" => options.settings.bin = PathBuf::from(value),
            "--data" => options.settings.data = PathBuf::from(value),
            "--disk" => options.settings.disk = Some(value.clone()),
            "--shared-buffers-mb" => options.settings.shared_buffers_mb = value.parse()?,
            "--backends" => options.backends = value.parse()?,
            "--workers" => options.workers = value.parse()?,
            "--every" => options.every = value.parse()?,
            "--ptshare" => options.ptshare = Some(value.clone()),
            _ => bail!("no option {name}"),
        }
    }
    ensure!(
        options.backends > 0 && options.workers > 0 && options.every > 0,
        "zero makes no sense"
    );
    options.settings.connections = options.backends + 10;
    Ok(options)
}

/// One backend that has scanned, still connected.
struct Scanned {
    _client: Client,
    checksum: String,
    faults: u64,
}

fn drive(server: &Server, options: &Options) -> Result<()> {
    let blocks = prepare(server)?;
    let hits_before = table_traffic(server)?;
    // The backends that have been at work so far are gone when the first figures are taken.
    std::thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    sample(0, start)?;
    let scanned = Mutex::new(Vec::with_capacity(options.backends));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let worker = || -> Result<()> {
            while next.fetch_add(1, Ordering::Relaxed) < options.backends {
                let backend = scan(server)?;
                // Sampling under the lock: the number of backends is exact but for those that scan just now.
                let mut scanned = scanned.lock().expect("no worker panics");
                scanned.push(backend);
                let n = scanned.len();
                if n % options.every == 0 || n == options.backends {
                    let [tables, _] = sample(n, start)?;
                    progress!(
                        "{n} backends have scanned, page tables {tables} kB, {:.0} s",
                        start.elapsed().as_secs_f64()
                    );
                }
            }
            Ok(())
        };
        let workers: Vec<_> = (0..options.workers).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().expect("no worker panics"))
    })?;
    let seconds = start.elapsed().as_secs_f64();

    let scanned = scanned.into_inner().expect("no worker panics");
    let checksum = scanned[0].checksum.clone();
    ensure!(
        scanned.iter().all(|s| s.checksum == checksum),
        "the backends disagree about the table's contents"
    );
    let mut faults: Vec<u64> = scanned.iter().map(|s| s.faults).collect();
    faults.sort_unstable();
    let [page_tables, shmem] = proc::meminfo(["PageTables", "Shmem"])?;
    let hits = table_traffic(server)?;
    let (hit, read) = (hits.0 - hits_before.0, hits.1 - hits_before.1);
    ensure!(
        hit >= blocks * scanned.len() as i64 && read == 0,
        "{} backends took {hit} of {blocks} blocks each from the shared buffers, and {read} from elsewhere",
        scanned.len()
    );
    println!(
        "{}",
        json!({
            "event": "done", "backends": scanned.len(), "seconds": seconds, "checksum": checksum,
            "page_tables_kb": page_tables, "shmem_kb": shmem,
            "minor_faults": { "min": faults[0], "median": faults[faults.len() / 2], "max": faults[faults.len() - 1] },
            "blocks_hit": hit,
        })
    );
    Ok(())
}

/// Brings the whole table into the shared buffers, and says what was set up. Returns the table's blocks.
fn prepare(server: &Server) -> Result<i64> {
    let mut client = server.connect()?;
    progress!("reading the table into the shared buffers");
    let start = Instant::now();
    let loaded: i64 = client
        .query_one("SELECT pg_prewarm($1::text::regclass)", &[&TABLE])?
        .get(0);
    progress!(
        "{loaded} blocks read into the shared buffers in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    let setting = |client: &mut Client, name: &str| -> Result<String> {
        Ok(client
            .query_one("SELECT current_setting($1)", &[&name])?
            .get(0))
    };
    let resident: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_buffercache WHERE relfilenode = pg_relation_filenode($1::text::regclass) \
             AND relforknumber = 0",
            &[&TABLE],
        )?
        .get(0);
    ensure!(
        resident == loaded,
        "{resident} of {loaded} blocks stayed in the shared buffers"
    );
    flush_statistics(&mut client)?;
    println!(
        "{}",
        json!({
            "event": "setting", "kernel": proc::read("/proc/sys/kernel/osrelease")?.trim(),
            "ptshare": proc::read("/proc/sys/vm/ptshare").ok().map(|s| s.trim().to_owned()),
            "server_version": setting(&mut client, "server_version")?,
            "shared_buffers": setting(&mut client, "shared_buffers")?,
            "huge_pages": setting(&mut client, "huge_pages")?,
            "table_bytes": loaded * 8192,
        })
    );
    Ok(loaded)
}

/// Has a backend report at once which blocks it has used, which it does after a while otherwise.
fn flush_statistics(client: &mut Client) -> Result<()> {
    client.execute("SELECT pg_stat_force_next_flush()", &[])?;
    Ok(())
}

/// Blocks of the table that were found in, and read into, the shared buffers since the server's start.
fn table_traffic(server: &Server) -> Result<(i64, i64)> {
    let row = server.connect()?.query_one(
        "SELECT coalesce(heap_blks_hit, 0), coalesce(heap_blks_read, 0) FROM pg_statio_user_tables \
         WHERE relid = $1::text::regclass",
        &[&TABLE],
    )?;
    Ok((row.get(0), row.get(1)))
}

/// Connects, scans, and reports the backend.
fn scan(server: &Server) -> Result<Scanned> {
    let mut client = server.connect()?;
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[])?.get(0);
    let pid = pid as u32;
    let before = proc::minor_faults_of(pid)?;
    let checksum: String = client.query_one(SCAN, &[])?.get(0);
    let faults = proc::minor_faults_of(pid)? - before;
    flush_statistics(&mut client)?;
    let status = proc::read(&format!("/proc/{pid}/status"))?;
    println!(
        "{}",
        json!({
            "event": "backend", "pid": pid, "minor_faults": faults, "checksum": checksum,
            "vm_pte_kb": proc::find(&status, "VmPTE"), "pt_shared_kb": proc::find(&status, "PtShared"),
        })
    );
    Ok(Scanned {
        _client: client,
        checksum,
        faults,
    })
}

/// Prints the machine's state: `n` backends have scanned.
fn sample(n: usize, start: Instant) -> Result<[u64; 2]> {
    let [page_tables, shmem] = proc::meminfo(["PageTables", "Shmem"]).context("sampling")?;
    println!(
        "{}",
        json!({
            "event": "sample", "backends": n, "page_tables_kb": page_tables, "shmem_kb": shmem,
            "seconds": start.elapsed().as_secs_f64(),
        })
    );
    Ok([page_tables, shmem])
}
