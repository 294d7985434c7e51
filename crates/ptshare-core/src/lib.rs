//! The pure part of the kernel engine, built for the host.
//!
//! The sources live in `kernel/mm/ptshare/core/`; this crate only gives them a place to be tested.
