//! See the crate's README section in docs/.
fn main() {}
