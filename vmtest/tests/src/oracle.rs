//! What every page must contain.
//!
//! A page's bytes are a function of (seed, page index, generation); generation 0 is a hole, all
//! zeros. Whoever writes a page writes all of it, as a new generation, so that any page seen from
//! anywhere says which write it came from, and a page of another file or another index is told apart.

use crate::harness::Res;
use crate::peer::{Peer, Remote};
use crate::sys::{self, GRANULE_PAGES, PAGE};
use std::ops::Range;
use std::os::fd::AsRawFd;

const WORDS: u64 = PAGE / 8;

/// The first word of a page; the others follow by addition.
pub fn first_word(seed: u64, page: u64, generation: u32) -> u64 {
    if generation == 0 {
        return 0;
    }
    let mut z = seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(generation) << 40);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) | 1
}

/// Word `i` of a page.
pub fn word_at(seed: u64, page: u64, generation: u32, i: u64) -> u64 {
    match first_word(seed, page, generation) {
        0 => 0,
        w => w.wrapping_add(i.wrapping_mul(0x0101_0101_0101_0101)),
    }
}

/// The whole page.
pub fn page_bytes(seed: u64, page: u64, generation: u32) -> Vec<u8> {
    (0..WORDS)
        .flat_map(|i| word_at(seed, page, generation, i).to_ne_bytes())
        .collect()
}

/// Says what differs between a page's bytes and what they should be.
pub fn diagnose(seed: u64, page: u64, generation: u32, got: &[u8]) -> Option<String> {
    for (i, c) in got.chunks_exact(8).enumerate() {
        let have = u64::from_ne_bytes(c.try_into().unwrap_or_default());
        let want = word_at(seed, page, generation, i as u64);
        if have != want {
            let guess = (0..=generation.saturating_add(4))
                .find(|g| have == word_at(seed, page, *g, i as u64))
                .map_or("nothing this page ever held".to_string(), |g| {
                    format!("generation {g}")
                });
            return Some(format!("page {page} word {i}: expected {want:#x} (generation {generation}), got {have:#x} ({guess})"));
        }
    }
    None
}

/// The model of one file: which generation each page holds.
#[derive(Clone)]
pub struct Model {
    /// Tells files apart.
    pub seed: u64,
    /// Generation of each page; its length is the file's size.
    pub pages: Vec<u32>,
    last: u32,
}

impl Model {
    /// A file of `pages` holes.
    pub fn new(seed: u64, pages: u64) -> Model {
        Model {
            seed,
            pages: vec![0; pages as usize],
            last: 0,
        }
    }

    /// A generation never used before in this file.
    pub fn next(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// Gives a page new content through the file descriptor.
    pub fn pwrite(&mut self, fd: &impl AsRawFd, page: u64) -> Res {
        let g = self.next();
        self.pages[page as usize] = g;
        sys::pwrite(fd, &page_bytes(self.seed, page, g), page * PAGE)?;
        Ok(())
    }

    /// Gives a range of pages new content through the file descriptor.
    pub fn fill(&mut self, fd: &impl AsRawFd, range: Range<u64>) -> Res {
        range.into_iter().try_for_each(|p| self.pwrite(fd, p))
    }

    /// Punches a hole.
    pub fn punch(&mut self, fd: &impl AsRawFd, range: Range<u64>) -> Res {
        sys::punch(fd, range.start * PAGE, (range.end - range.start) * PAGE)?;
        self.pages[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }

    /// Changes the file's size.
    pub fn truncate(&mut self, fd: &impl AsRawFd, pages: u64) -> Res {
        sys::ftruncate(fd, pages * PAGE)?;
        self.pages.resize(pages as usize, 0);
        Ok(())
    }

    /// Compares the file, read through its descriptor, with the model.
    pub fn verify_file(&self, fd: &impl AsRawFd) -> Res {
        let mut buf = vec![0u8; PAGE as usize];
        for (i, g) in self.pages.iter().enumerate() {
            sys::pread(fd, &mut buf, i as u64 * PAGE)?;
            if let Some(why) = diagnose(self.seed, i as u64, *g, &buf) {
                crate::fail!("read through the descriptor: {why}");
            }
        }
        Ok(())
    }

    /// Makes a peer compare pages it maps, the first at `addr`, with the model.
    pub fn verify_mapped(&self, peer: &Peer, addr: u64, range: Range<u64>) -> Res {
        let gens: Vec<u8> = self.pages[range.start as usize..range.end as usize]
            .iter()
            .flat_map(|g| g.to_ne_bytes())
            .collect();
        let (bad, why) = peer.call(verify_here, &[addr, range.start, self.seed], &gens)?;
        crate::ensure!(
            bad == 0,
            "process {} at {addr:#x}: {}",
            peer.pid,
            String::from_utf8_lossy(&why)
        );
        Ok(())
    }

    /// Gives a page new content through a peer's mapping at `addr`.
    pub fn store(&mut self, peer: &Peer, addr: u64, page: u64) -> Res {
        let g = self.next();
        let (r, d) = peer.call(store_page, &[addr, self.seed, page, u64::from(g)], &[])?;
        if let Err(f) = crate::peer::unpack(r, &d) {
            crate::fail!("process {}: store to page {page}: {f:?}", peer.pid);
        }
        self.pages[page as usize] = g;
        Ok(())
    }
}

/// In a peer: writes one whole page. Arguments: address, seed, page, generation.
pub const STORE_PAGE: Remote = store_page;

fn store_page(a: &[u64], _: &[u8]) -> (i64, Vec<u8>) {
    let bytes = page_bytes(a[1], a[2], a[3] as u32);
    crate::peer::access(sys::copy(a[0], bytes.as_ptr() as u64, PAGE).map(|()| 0))
}

fn verify_here(a: &[u64], gens: &[u8]) -> (i64, Vec<u8>) {
    let (addr, first, seed) = (a[0], a[1], a[2]);
    let mut buf = vec![0u8; PAGE as usize];
    for (i, g) in gens.chunks_exact(4).enumerate() {
        let g = u32::from_ne_bytes(g.try_into().unwrap_or_default());
        let page = first + i as u64;
        if let Err(f) = sys::copy(buf.as_mut_ptr() as u64, addr + i as u64 * PAGE, PAGE) {
            return (1, format!("page {page}: {f:?}").into_bytes());
        }
        if let Some(why) = diagnose(seed, page, g, &buf) {
            return (1, why.into_bytes());
        }
    }
    (0, vec![])
}

/// Pages of `granules` granules.
pub fn pages(granules: u64) -> u64 {
    granules * GRANULE_PAGES
}
