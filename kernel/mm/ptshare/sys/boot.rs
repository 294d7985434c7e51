// SPDX-License-Identifier: GPL-2.0

//! The boot parameter `ptshare=`, the sysctl `vm.ptshare` and `/sys/kernel/mm/ptshare/`.

use super::Shared;
use crate::core_logic::granule::GRANULE;
use core::mem::MaybeUninit;
use core::ptr;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;

/// The kernel's `struct obs_kernel_param`, of which there are no bindings.
#[repr(C)]
struct ObsKernelParam {
    name: *const kernel::ffi::c_char,
    setup: extern "C" fn(*mut kernel::ffi::c_char) -> kernel::ffi::c_int,
    early: kernel::ffi::c_int,
}

/// `ptshare=` on the kernel's command line.
#[link_section = ".init.setup"]
#[used]
static SETUP: Shared<ObsKernelParam> = Shared::new(ObsKernelParam {
    name: c"ptshare=".as_ptr().cast(),
    setup,
    early: 0,
});

extern "C" fn setup(value: *mut kernel::ffi::c_char) -> kernel::ffi::c_int {
    let mut number = 0;
    // SAFETY: the kernel passes what follows the parameter's name, a C string.
    let error = unsafe { bindings::kstrtoint(value.cast(), 0, &mut number) };
    if error != 0 || crate::set_mode_at_boot(number).is_err() {
        pr_warn!("ptshare: the boot parameter takes 0, 1 or 2\n");
    }
    1
}

/// The table of one sysctl. Filled in by [`init`]; the kernel keeps a pointer to it.
static TABLE: Shared<MaybeUninit<bindings::ctl_table>> = Shared::new(MaybeUninit::zeroed());
static ATTRIBUTE: Shared<MaybeUninit<bindings::kobj_attribute>> =
    Shared::new(MaybeUninit::zeroed());

/// Reading and writing `vm.ptshare`: the value goes through the kernel's own handler, with limits.
unsafe extern "C" fn handle(
    table: *const bindings::ctl_table,
    write: kernel::ffi::c_int,
    buffer: *mut kernel::ffi::c_void,
    length: *mut usize,
    position: *mut bindings::loff_t,
) -> kernel::ffi::c_int {
    let mut number: kernel::ffi::c_int = crate::mode() as kernel::ffi::c_int;
    let (mut least, mut most) = (0 as kernel::ffi::c_int, 2 as kernel::ffi::c_int);
    // SAFETY: the kernel passes our table; the copy's pointers are to locals that outlive the call.
    let error = unsafe {
        let mut copy = ptr::read(table);
        copy.data = (&raw mut number).cast();
        copy.extra1 = (&raw mut least).cast();
        copy.extra2 = (&raw mut most).cast();
        bindings::proc_dointvec_minmax(&copy, write, buffer, length, position)
    };
    if error == 0 && write != 0 {
        crate::set_mode(number);
    }
    error
}

/// Shows the granule, in bytes.
unsafe extern "C" fn show(
    _object: *mut bindings::kobject,
    _attribute: *mut bindings::kobj_attribute,
    buffer: *mut kernel::ffi::c_char,
) -> isize {
    // SAFETY: sysfs passes a page to write to.
    unsafe { bindings::sysfs_emit(buffer.cast(), c"%lu\n".as_ptr().cast(), GRANULE) as isize }
}

/// Makes the sysctl and the sysfs file.
pub(crate) fn init() -> Result {
    // SAFETY: called once, before anything reads the statics; all zeroes is a valid value of both
    // structures, and what is set here lives as long as the kernel.
    unsafe {
        let table = TABLE.get().cast::<bindings::ctl_table>();
        (*table).procname = c"ptshare".as_ptr().cast();
        (*table).maxlen = core::mem::size_of::<kernel::ffi::c_int>() as _;
        (*table).mode = 0o644;
        (*table).proc_handler = Some(handle);
        if bindings::register_sysctl_sz(c"vm".as_ptr().cast(), table, 1).is_null() {
            return Err(ENOMEM);
        }

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
