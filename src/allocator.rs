//! How the system's allocator treats what is freed.

/// Activations are made and freed by the megabyte, and glibc would hand each back to the system and have the next one
/// filled with zeros page by page: half of the processor's time. Up to a gigabyte stays with the program instead.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: sets two numbers of the allocator, while there is one thread.
    unsafe {
        // The largest that it takes.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}
