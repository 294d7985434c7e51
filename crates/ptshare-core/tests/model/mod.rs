// SPDX-License-Identifier: GPL-2.0-only

//! What the models of the share count have in common: its counter over loom's atomics, plain memory
//! that loom watches, and threads.

use loom::cell::Cell;
use loom::sync::atomic::{AtomicI32, Ordering};
use loom::thread;
use ptshare_core::count::Counter;

/// A rule of the protocol that a model breaks, or none.
pub trait Breaks {
    /// Looks an exchange at the count and then sets it, in two steps?
    fn tears_exchange(&self) -> bool;
}

/// The kernel's counter: atomic_read_acquire, atomic_cmpxchg, atomic_dec_return. Nothing is ordered
/// that does not have to be, so that loom sees at least what the hardware may do.
pub struct Count<B> {
    /// The count.
    pub value: AtomicI32,
    /// What the model breaks.
    pub bug: B,
}

impl<B> Count<B> {
    /// A counter that starts with `value`.
    pub fn new(value: i32, bug: B) -> Self {
        let value = AtomicI32::new(value);
        Count { value, bug }
    }

    /// The newest value, which a load need not see.
    pub fn now(&self) -> i32 {
        self.value.fetch_add(0, Ordering::AcqRel)
    }
}

impl<B: Breaks> Counter for Count<B> {
    fn load(&self) -> i32 {
        self.value.load(Ordering::Acquire)
    }

    fn compare_exchange(&self, old: i32, new: i32) -> i32 {
        if self.bug.tears_exchange() {
            let was = self.value.load(Ordering::Acquire);
            if was == old {
                self.value.store(new, Ordering::Release);
            }
            return was;
        }
        match self
            .value
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
        {
            Ok(was) | Err(was) => was,
        }
    }

    fn decrement(&self) -> i32 {
        self.value.fetch_sub(1, Ordering::AcqRel) - 1
    }
}

/// Plain memory. Loom panics unless its accesses are ordered by what the model synchronizes with.
pub struct Tracked<T>(Cell<T>);

// SAFETY: loom runs one thread of a model at a time, and ends the model at the first access to the
// cell that no synchronization orders.
unsafe impl<T: Send> Sync for Tracked<T> {}

impl<T: Copy> Tracked<T> {
    /// Memory that holds it.
    pub fn new(value: T) -> Self {
        Tracked(Cell::new(value))
    }

    /// Reads it.
    pub fn get(&self) -> T {
        self.0.get()
    }

    /// Writes it.
    pub fn set(&self, value: T) {
        self.0.set(value);
    }
}

/// Runs a model in all interleavings with at most that many preemptions.
pub fn check(preemptions: impl Into<Option<usize>>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions.into();
    builder.check(model);
}

/// Runs each on a thread of its own, and returns what they return.
pub fn race<T: 'static>(threads: Vec<Box<dyn FnOnce() -> T + Send>>) -> Vec<T> {
    let threads: Vec<_> = threads.into_iter().map(thread::spawn).collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

/// A boxed closure over clones of what it uses.
#[macro_export]
macro_rules! thread {
    ($($shared:ident),*; $body:expr) => {{
        $(let $shared = $shared.clone();)*
        Box::new(move || $body) as Box<dyn FnOnce() -> _ + Send>
    }};
}
