// SPDX-License-Identifier: MIT OR Apache-2.0
//! The price of the feature for those who do not use it: the paths that the kernel's hooks lie on, in
//! instructions each. Nobody asks for sharing here; the setting stays at the kernel's default.

use crate::figure::Samples;
use crate::progress;
use crate::sys::{self, Kind, Map, Program, GRANULE, PAGE};
use anyhow::{Context, Result};
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

/// Samples that only warm up, then samples that count.
const WARM_UP: usize = 5;
const SAMPLES: usize = 101;
/// The file and the memory that faults are taken in: two page tables of each.
const AREA: usize = 2 * GRANULE;
/// The kernel maps the pages around a read fault too, this many bytes of them.
const FAULT_AROUND: usize = 16 * PAGE;
/// Repetitions of a short call in one sample. All of them together take a fraction of the 4 million
/// instructions between two ticks of the timer, so that the median is of samples without one.
const CALLS: usize = 100;
/// The same for munmap, which takes longer.
const UNMAP_CALLS: usize = 25;
/// Processes that end in one sample. One by one they are of several kinds, with 2.5 % between them, and the
/// median is of whichever is more frequent.
const EXITS: usize = 10;
const RAMFS: &str = "/tmp/guest-bench-ramfs";

/// Prints all figures.
pub fn run() -> Result<()> {
    fs::create_dir_all(RAMFS)?;
    sys::mount("none", RAMFS, "ramfs", "").context("mounting ramfs")?;
    let shmem = sys::memfd("unused", AREA, 0)?;
    sys::allocate(&shmem, AREA)?;
    let ramfs = page_cache_file()?;

    processes(&shmem)?;
    progress!("fork, exec, exit measured");
    mappings(&shmem, &ramfs)?;
    progress!("mmap, munmap, mprotect measured");
    faults(&shmem, &ramfs)?;
    progress!("faults measured");
    Ok(())
}

/// Samples `measure`, which answers instructions per operation.
fn sample(figure: &str, mut measure: impl FnMut() -> Result<f64>) -> Result<()> {
    let mut samples = Samples::default();
    for round in 0..WARM_UP + SAMPLES {
        sys::settle();
        let value = measure().with_context(|| figure.to_owned())?;
        if round >= WARM_UP {
            samples.push(value);
        }
    }
    samples.emit(figure, "instructions");
    Ok(())
}

/// Instructions of one run of `op`, which comprises `count` operations.
#[inline(always)]
fn time(count: usize, op: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = sys::now();
    op()?;
    Ok((sys::now() - start) as f64 / count as f64)
}

/// A file of a filesystem that has nothing but the page cache.
fn page_cache_file() -> Result<File> {
    let path = format!("{RAMFS}/file");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.write_all(&vec![7; AREA])?;
    Ok(file)
}

/// fork with little memory, with much of it, and over a shared mapping; the end of such processes; execve.
fn processes(shmem: &File) -> Result<()> {
    let clock = Map::new(None, PAGE, Kind::Shared)?;
    let fork = || {
        let start = sys::now();
        let child = sys::fork(|| Ok(()))?;
        let took = sys::now() - start;
        child.wait()?;
        Ok(took as f64)
    };
    let exit = || {
        sys::fork(|| {
            clock.set_word(sys::now());
            Ok(())
        })?
        .wait()?;
        Ok((sys::now() - clock.word()) as f64)
    };
    sample("unused_fork", fork)?;
    sample("unused_exit", || {
        let ends = (0..EXITS).map(|_| exit()).sum::<Result<f64>>()?;
        Ok(ends / EXITS as f64)
    })?;

    let memory = Map::aligned(None, 4 * AREA, Kind::Private)?;
    memory.advise(libc::MADV_NOHUGEPAGE)?;
    memory.write_every(PAGE);
    sample("unused_fork_of_16_MiB_anon", fork)?;
    sample("unused_exit_of_16_MiB_anon", exit)?;
    memory.unmap()?;

    let shared = Map::aligned(Some(shmem), AREA, Kind::Shared)?;
    shared.read_every(PAGE);
    sample("unused_fork_of_4_MiB_shmem", fork)?;
    shared.unmap()?;
    sample("unused_exit_of_4_MiB_shmem", || {
        sys::fork(|| {
            let map = Map::aligned(Some(shmem), AREA, Kind::Shared)?;
            map.read_every(PAGE);
            clock.set_word(sys::now());
            sys::leave(0)
        })?
        .wait()?;
        Ok((sys::now() - clock.word()) as f64)
    })?;
    exec()
}

fn exec() -> Result<()> {
    let (mut results, tell) = sys::pipe()?;
    let fd = sys::keep_over_exec(&tell)?;
    let path = format!("{RAMFS}/tiny");
    fs::write(&path, tiny_program(fd as u32))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let program = Program::new(&path)?;
    let clock = Map::new(None, PAGE, Kind::Shared)?;
    sample("unused_exec", || {
        sys::fork(|| {
            clock.set_word(sys::now());
            Err(program.exec().into())
        })?
        .wait()?;
        let mut end = [0; 8];
        results.read_exact(&mut end)?;
        Ok((u64::from_ne_bytes(end) - clock.word()) as f64)
    })
}

/// An ELF executable that writes its first time stamp, 8 bytes, to descriptor `fd` and ends.
fn tiny_program(fd: u32) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code = vec![0x0f, 0x31]; // rdtsc
    code.extend([0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0]); // shl rdx, 32; or rax, rdx
    code.extend([0x50, 0x48, 0x89, 0xe6]); // push rax; mov rsi, rsp
    code.push(0xbf); // mov edi, fd
    code.extend(fd.to_le_bytes());
    code.extend([0xba, 8, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0x0f, 0x05]); // write(edi, rsi, 8)
    code.extend([0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05]); // exit(0)

    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // x86-64
    elf.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, no section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(5u32.to_le_bytes()); // readable, executable
    for word in [0, BASE, BASE, size, size, PAGE as u64] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Making and removing mappings, and changing their protection.
fn mappings(shmem: &File, ramfs: &File) -> Result<()> {
    for (name, file, kind) in [
        ("anon", None, Kind::Private),
        ("shmem", Some(shmem), Kind::Shared),
        ("file", Some(ramfs), Kind::Private),
    ] {
        let mut maps: Vec<Map> = Vec::with_capacity(CALLS);
        sample(&format!("unused_mmap_{name}"), || {
            let took = time(CALLS, || {
                for _ in 0..CALLS {
                    maps.push(Map::new(file, AREA, kind)?);
                }
                Ok(())
            });
            maps.clear();
            took
        })?;
        sample(&format!("unused_munmap_{name}"), || {
            for _ in 0..UNMAP_CALLS {
                let map = Map::new(file, AREA, kind)?;
                map.read_every(GRANULE);
                maps.push(map);
            }
            time(UNMAP_CALLS, || {
                for map in maps.drain(..) {
                    map.unmap()?;
                }
                Ok(())
            })
        })?;
        sample(&format!("unused_munmap_of_1024_pages_{name}"), || {
            let map = Map::aligned(file, AREA, kind)?;
            map.advise(libc::MADV_NOHUGEPAGE)?;
            map.read_every(PAGE);
            time(1, || Ok(map.unmap()?))
        })?;
        let map = Map::aligned(file, AREA, kind)?;
        map.advise(libc::MADV_NOHUGEPAGE)?;
        map.write_every(PAGE);
        sample(&format!("unused_mprotect_of_1024_pages_{name}"), || {
            time(2, || {
                map.protect(false)?;
                Ok(map.protect(true)?)
            })
        })?;
        black_box(map.word());

        let page = Map::aligned(file, PAGE, kind)?;
        page.write_every(PAGE);
        sample(&format!("unused_mprotect_{name}"), || {
            time(2 * CALLS, || {
                for _ in 0..CALLS {
                    page.protect(false)?;
                    page.protect(true)?;
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Instructions of a fault, from touching a fresh mapping of `file` (or of nothing) all over.
fn touch(file: Option<&File>, kind: Kind, write: bool) -> Result<f64> {
    let map = Map::aligned(file, AREA, kind)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    let step = if write { PAGE } else { FAULT_AROUND };
    time(AREA / step, || {
        if write {
            map.write_every(step);
        } else {
            map.read_every(step);
        }
        Ok(())
    })
}

/// First touches of memory of each kind.
fn faults(shmem: &File, ramfs: &File) -> Result<()> {
    sample("unused_fault_anon", || touch(None, Kind::Private, true))?;
    for (name, file) in [("shmem", Some(shmem)), ("file", Some(ramfs))] {
        sample(&format!("unused_fault_{name}_shared_read"), || {
            touch(file, Kind::Shared, false)
        })?;
        sample(&format!("unused_fault_{name}_shared_write"), || {
            touch(file, Kind::Shared, true)
        })?;
        sample(&format!("unused_fault_{name}_private_read"), || {
            touch(file, Kind::Private, false)
        })?;
        sample(&format!("unused_fault_{name}_private_write"), || {
            touch(file, Kind::Private, true)
        })?;
    }
    // Pages that the fault itself allocates.
    sample("unused_fault_shmem_new", || {
        let file = sys::memfd("new", AREA, 0)?;
        touch(Some(&file), Kind::Shared, true)
    })
}
