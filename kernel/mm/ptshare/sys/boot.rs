// SPDX-License-Identifier: GPL-2.0

//! The boot parameters `ptshare=` and `odf=`, the sysctls `vm.ptshare` and `vm.odf_default`, and `/sys/kernel/mm/ptshare/`.

use super::Shared;
use crate::core_logic::granule::GRANULE;
use core::mem::MaybeUninit;
use core::ptr;
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::{c_char, c_int};
use kernel::prelude::*;

/// The kernel's `struct obs_kernel_param`, of which there are no bindings.
#[repr(C)]
struct ObsKernelParam {
    name: *const c_char,
    setup: extern "C" fn(*mut c_char) -> c_int,
    early: c_int,
}

/// `ptshare=` on the kernel's command line.
#[link_section = ".init.setup"]
#[used]
static SETUP: Shared<ObsKernelParam> = Shared::new(ObsKernelParam {
    name: c"ptshare=".as_ptr().cast(),
    setup,
    early: 0,
});

extern "C" fn setup(value: *mut c_char) -> c_int {
    if !number(value).is_some_and(|number| crate::set_mode_at_boot(number).is_ok()) {
        pr_warn!("ptshare: the boot parameter takes 0, 1 or 2\n");
    }
    1
}

/// `odf=` on the kernel's command line.
#[cfg(CONFIG_COW_PTE)]
#[link_section = ".init.setup"]
#[used]
static SETUP_ODF: Shared<ObsKernelParam> = Shared::new(ObsKernelParam {
    name: c"odf=".as_ptr().cast(),
    setup: setup_odf,
    early: 0,
});

#[cfg(CONFIG_COW_PTE)]
extern "C" fn setup_odf(value: *mut c_char) -> c_int {
    match number(value) {
        Some(wanted @ 0..=1) => crate::fork::set_default(wanted == 1),
        _ => pr_warn!("ptshare: the boot parameter odf takes 0 or 1\n"),
    }
    1
}

/// The number that a boot parameter has been given.
fn number(value: *mut c_char) -> Option<i32> {
    let mut number = 0;
    // SAFETY: the kernel passes what follows the parameter's name, a C string.
    let error = unsafe { bindings::kstrtoint(value.cast(), 0, &mut number) };
    (error == 0).then_some(number)
}

/// The tables of the sysctls, one each. Filled in by [`init`]; the kernel keeps pointers to them.
static MODE: Shared<MaybeUninit<bindings::ctl_table>> = Shared::new(MaybeUninit::zeroed());
#[cfg(CONFIG_COW_PTE)]
static ODF: Shared<MaybeUninit<bindings::ctl_table>> = Shared::new(MaybeUninit::zeroed());
static ATTRIBUTE: Shared<MaybeUninit<bindings::kobj_attribute>> =
    Shared::new(MaybeUninit::zeroed());

/// A call of the kernel to read or write a sysctl.
struct Access {
    table: *const bindings::ctl_table,
    write: c_int,
    buffer: *mut kernel::ffi::c_void,
    length: *mut usize,
    position: *mut bindings::loff_t,
}

impl Access {
    /// Answers it with `now`, or calls `set` with a new value up to `most`: the value goes through
    /// the kernel's own handler, with limits. Returns 0 or a negative error number.
    fn answer(self, now: i32, most: i32, set: impl FnOnce(i32)) -> c_int {
        let (mut number, mut least, mut most) = (now, 0, most);
        // SAFETY: the kernel passes our table; the copy's pointers are to locals that outlive the
        // call.
        let error = unsafe {
            let mut copy = ptr::read(self.table);
            copy.data = (&raw mut number).cast();
            copy.extra1 = (&raw mut least).cast();
            copy.extra2 = (&raw mut most).cast();
            bindings::proc_dointvec_minmax(
                &copy,
                self.write,
                self.buffer,
                self.length,
                self.position,
            )
        };
        if error == 0 && self.write != 0 {
            set(number);
        }
        error
    }
}

/// Reading and writing `vm.ptshare`.
///
/// # Safety
///
/// Called as a sysctl's handler alone, with what the sysctl code passes.
unsafe extern "C" fn handle_mode(
    table: *const bindings::ctl_table,
    write: c_int,
    buffer: *mut kernel::ffi::c_void,
    length: *mut usize,
    position: *mut bindings::loff_t,
) -> c_int {
    let access = Access { table, write, buffer, length, position };
    access.answer(crate::mode() as i32, 2, crate::set_mode)
}

/// Reading and writing `vm.odf_default`.
///
/// # Safety
///
/// Called as a sysctl's handler alone, with what the sysctl code passes.
#[cfg(CONFIG_COW_PTE)]
unsafe extern "C" fn handle_odf(
    table: *const bindings::ctl_table,
    write: c_int,
    buffer: *mut kernel::ffi::c_void,
    length: *mut usize,
    position: *mut bindings::loff_t,
) -> c_int {
    let access = Access { table, write, buffer, length, position };
    access.answer(crate::fork::default() as i32, 1, |wanted| {
        crate::fork::set_default(wanted == 1)
    })
}

/// Makes a sysctl of the directory `vm`.
///
/// # Safety
///
/// `place` is used for this sysctl alone, once.
unsafe fn sysctl(
    place: &'static Shared<MaybeUninit<bindings::ctl_table>>,
    name: &'static core::ffi::CStr,
    handler: bindings::proc_handler,
) -> Result {
    // SAFETY: nothing reads the static yet; all zeroes is a valid value, and what is set here lives
    // as long as the kernel.
    unsafe {
        let table = place.get().cast::<bindings::ctl_table>();
        (*table).procname = name.as_ptr().cast();
        (*table).maxlen = core::mem::size_of::<c_int>() as _;
        (*table).mode = 0o644;
        (*table).proc_handler = handler;
        if bindings::register_sysctl_sz(c"vm".as_ptr().cast(), table, 1).is_null() {
            return Err(ENOMEM);
        }
    }
    Ok(())
}

/// Shows the granule, in bytes.
///
/// # Safety
///
/// `buffer` is a page to write to, as sysfs passes it.
unsafe extern "C" fn show(
    _object: *mut bindings::kobject,
    _attribute: *mut bindings::kobj_attribute,
    buffer: *mut c_char,
) -> isize {
    // SAFETY: as the caller promises.
    unsafe { bindings::sysfs_emit(buffer.cast(), c"%lu\n".as_ptr().cast(), GRANULE) as isize }
}

/// Makes the sysctls and the sysfs file.
pub(crate) fn init() -> Result {
    // SAFETY: called once, and each place is for one sysctl.
    unsafe {
        sysctl(&MODE, c"ptshare", Some(handle_mode))?;
        #[cfg(CONFIG_COW_PTE)]
        sysctl(&ODF, c"odf_default", Some(handle_odf))?;
    }
    // SAFETY: called once, before anything reads the static; all zeroes is a valid value, and what
    // is set here lives as long as the kernel.
    unsafe {
        let attribute = ATTRIBUTE.get().cast::<bindings::kobj_attribute>();
        (*attribute).attr.name = c"granule".as_ptr().cast();
        (*attribute).attr.mode = 0o444;
        (*attribute).show = Some(show);
        let directory =
            bindings::kobject_create_and_add(c"ptshare".as_ptr().cast(), bindings::mm_kobj);
        if directory.is_null() {
            return Err(ENOMEM);
        }
        to_result(bindings::sysfs_create_file_ns(
            directory,
            &(*attribute).attr,
            ptr::null(),
        ))
    }
}
