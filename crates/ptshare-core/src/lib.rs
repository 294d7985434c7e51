// SPDX-License-Identifier: GPL-2.0-only

//! The pure part of the kernel engine, built for the host.
//!
//! The source is the kernel's own, `kernel/mm/ptshare/core/`: this crate includes it by its path and
//! copies nothing, so what its tests hold is what runs in the kernel. What the kernel's code may not
//! do here, the crate attributes forbid: it knows no standard library and has no unsafe code.
//!
//! The tests are in `tests/`: arithmetic against models that count page by page, the contract's
//! tables, and a model check of the share count's protocol in every interleaving.

#![no_std]
#![forbid(unsafe_code)]

#[path = "../../../kernel/mm/ptshare/core/mod.rs"]
mod core_logic;

pub use core_logic::*;
