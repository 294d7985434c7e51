//! `./x vm`: one command in the VM, its output here, its exit status ours.

use crate::kernel::Flavor;
use crate::vm::{self, Vm};
use anyhow::Result;
use std::path::PathBuf;
use std::time::Duration;

/// Exit status: the command's (128 + N when signal N killed it), or
/// 70 the kernel complained (WARNING, BUG, lockdep, leak ...), 71 the VM ended
/// without a result, 72 the console log is not to be trusted, 124 time ran
/// out, 125 the lab itself failed.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Which kernel; it is built when it is not there
    #[arg(long, default_value = "release")]
    flavor: Flavor,
    /// Memory of the VM
    #[arg(long, default_value = "4G")]
    mem: String,
    /// Processors of the VM
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Let the clock count instructions, on one CPU: figures repeat
    #[arg(long)]
    icount: bool,
    /// QEMU's accelerator, such as "tcg" or "kvm"; never chosen by itself
    #[arg(long, default_value = "tcg", conflicts_with = "icount")]
    accel: String,
    /// Kill the VM after so many seconds
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Add to the kernel's command line
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Give the VM this raw image as a disk (/dev/vda, /dev/vdb ...)
    #[arg(long)]
    drive: Vec<PathBuf>,
    /// Let the VM write into this directory, as /run/share/TAG: DIR:TAG
    #[arg(long, value_name = "DIR:TAG")]
    share: Vec<String>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs the command and returns the exit status of `./x vm`.
pub fn run(args: &Args) -> Result<u8> {
    let mut vm = Vm::new(args.flavor)
        .mem(&args.mem)
        .smp(args.smp)
        .icount(args.icount)
        .accel(&args.accel)
        .append(&args.append)
        .timeout(Duration::from_secs(args.timeout))
        .forward(true);
    for drive in &args.drive {
        vm = vm.drive(drive);
    }
    for share in &args.share {
        let (dir, tag) = share
            .rsplit_once(':')
            .ok_or_else(|| anyhow::anyhow!("--share wants DIR:TAG, not {share}"))?;
        vm = vm.share(dir, tag);
    }
    let outcome = vm.run(&args.command)?;
    if outcome.verdict() != vm::Verdict::Ended {
        eprint!("{}", outcome.complaint());
    }
    Ok(outcome.status())
}
