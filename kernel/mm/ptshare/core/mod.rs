// SPDX-License-Identifier: GPL-2.0

//! The pure part of page-table sharing: no kernel type, no unsafe code, no allocation.
//!
//! It is compiled into the kernel by `mm/ptshare/ptshare.rs` and for the host by the crate
//! `ptshare-core`, which tests it.
//!
//! - [`granule`]: which 2 MiB pieces of a mapping can share a table, and where to put a mapping so
//!   that they can.
//! - [`key`]: what two mappings must have in common to use one table.
//! - [`count`]: the share count's protocol.
//! - [`mode`]: who shares at all, and the checks of `MAP_SHARED_PT`.

pub mod count;
pub mod granule;
pub mod key;
pub mod mode;
