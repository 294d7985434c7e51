//! The usual scene: several processes that map one file and share its tables.

use crate::harness::{Ctx, Res};
use crate::kernel;
use crate::oracle::{pages, Model};
use crate::peer::Peer;
use crate::sys::{self, GRANULE_PAGES, PAGE, RW};
use std::os::fd::{AsRawFd, OwnedFd};

/// One process and where it maps the file.
pub struct Member {
    /// The process.
    pub peer: Peer,
    /// Where page 0 of the file is.
    pub addr: u64,
}

/// Processes sharing one file, with the model of its content.
pub struct Team {
    sharing: bool,
    /// The file.
    pub fd: OwnedFd,
    /// What it must contain.
    pub model: Model,
    /// The processes.
    pub members: Vec<Member>,
    /// Size of the file and of each mapping.
    pub granules: u64,
}

impl Team {
    /// `n` processes that map a full memfd readable and writable, have touched every page, and
    /// (unless `--stock`) are seen to share.
    pub fn new(ctx: &Ctx, n: usize, granules: u64) -> Res<Team> {
        Team::on(ctx, sys::memfd(0)?, n, granules)
    }

    /// The same over any file, which is given its size and content here.
    pub fn on(ctx: &Ctx, fd: OwnedFd, n: usize, granules: u64) -> Res<Team> {
        ctx.opt_in()?;
        let mut t = Team::untouched(ctx, fd, n, granules)?;
        t.model.fill(&t.fd, 0..pages(granules))?;
        t.touch_all()?;
        t.expect_all(granules)?;
        Ok(t)
    }

    /// The same, before anybody has written to the file or touched the mappings.
    pub fn untouched(ctx: &Ctx, fd: OwnedFd, n: usize, granules: u64) -> Res<Team> {
        sys::ftruncate(&fd, pages(granules) * PAGE)?;
        let mut t = Team {
            sharing: ctx.sharing,
            fd,
            model: Model::new(ctx.seed, pages(granules)),
            members: vec![],
            granules,
        };
        for _ in 0..n {
            t.join()?;
        }
        Ok(t)
    }

    /// Adds a process that maps the whole file.
    pub fn join(&mut self) -> Res {
        let peer = Peer::spawn()?;
        let addr = peer.map(&self.fd, 0, pages(self.granules) * PAGE, RW)?;
        self.members.push(Member { peer, addr });
        Ok(())
    }

    /// The process of member `i`.
    pub fn peer(&self, i: usize) -> &Peer {
        &self.members[i].peer
    }

    /// The address of a page in member `i`.
    pub fn at(&self, i: usize, page: u64) -> u64 {
        self.members[i].addr + page * PAGE
    }

    /// The address of a granule in member `i`.
    pub fn granule(&self, i: usize, granule: u64) -> u64 {
        self.at(i, granule * GRANULE_PAGES)
    }

    /// Every member loads from every page.
    pub fn touch_all(&self) -> Res {
        self.members
            .iter()
            .try_for_each(|m| m.peer.touch(m.addr, pages(self.granules)))
    }

    /// Member `i` links exactly `tables` shared tables. Nothing when `--stock`.
    pub fn expect(&self, i: usize, tables: u64) -> Res {
        if self.sharing {
            let got = kernel::tables_of(self.peer(i).pid)?;
            crate::ensure_eq!(got, tables, "shared tables of member {i}");
        }
        Ok(())
    }

    /// Every member links exactly `tables` shared tables.
    pub fn expect_all(&self, tables: u64) -> Res {
        (0..self.members.len()).try_for_each(|i| self.expect(i, tables))
    }

    /// Member `first` links `tables`, all the others all of theirs.
    pub fn expect_left(&self, first: u64) -> Res {
        self.expect(0, self.granules - first)?;
        (1..self.members.len()).try_for_each(|i| self.expect(i, self.granules))
    }

    /// Member `i` writes a page through its mapping.
    pub fn store(&mut self, i: usize, page: u64) -> Res {
        let addr = self.at(i, page);
        self.model.store(&self.members[i].peer, addr, page)
    }

    /// Member `i` sees what the model says.
    pub fn verify(&self, i: usize, range: std::ops::Range<u64>) -> Res {
        self.model
            .verify_mapped(self.peer(i), self.at(i, range.start), range)
    }

    /// Every member sees what the model says, on every page, and so does the descriptor.
    pub fn verify_all(&self) -> Res {
        (0..self.members.len()).try_for_each(|i| self.verify(i, 0..pages(self.granules)))?;
        self.model.verify_file(&self.fd)
    }

    /// Each member writes a page of each granule; then everybody must see all of it.
    pub fn coherent(&mut self) -> Res {
        for i in 0..self.members.len() {
            for g in 0..self.granules {
                self.store(i, g * GRANULE_PAGES + 7 * i as u64)?;
            }
        }
        self.verify_all()
    }

    /// The file's descriptor number, which the members have too.
    pub fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// A process links exactly `tables` shared tables. Nothing when `--stock`.
pub fn expect_tables(ctx: &Ctx, peer: &Peer, tables: u64) -> Res {
    if ctx.sharing {
        crate::ensure_eq!(
            kernel::tables_of(peer.pid)?,
            tables,
            "shared tables of process {}",
            peer.pid
        );
    }
    Ok(())
}
