//! Says which of the crate's tests can run on this machine.

#[path = "../build/present.rs"]
mod present;

fn main() {
    present::tell();
}
