//! Memory that was freed, back to the system.

/// Gives back the free pages of all heaps. Takes milliseconds and locks each heap in turn: for the
/// end of rare work that took hundreds of megabytes, which the allocator would keep per thread.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> core::ffi::c_int;
        }
        // SAFETY: glibc's function of this signature; it may be called at any time by any thread
        // and moves nothing that is in use.
        unsafe { malloc_trim(0) };
    }
}
