//! Says which of the crate's tests can run on this machine.

fn main() {
    gptq_present::tell();
}
