//! The matrix unit of AMX: 16 rows of activations against 16 rows of weights, 32 columns of bytes
//! at once, in exact integers.
//!
//! Instructions are assembly because the compiler's intrinsics for them are not stable.
#![cfg(target_arch = "x86_64")]

use std::{arch::asm, sync::OnceLock};

/// Rows of activations, and rows of weights, of a product.
pub(crate) const TILE_LEN: usize = 16;
/// Columns, bytes each, of a product.
pub(crate) const TILE_COLS: usize = 32;
/// Products that may be under way at once.
pub(crate) const N_SLOTS: usize = 4;

/// Proof that the processor has the unit and that the system lets this process use it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

/// Layout of the tile registers, as `ldtilecfg` reads it: palette 1, then bytes of a row and rows
/// of each register. Registers 0..4 are sums, 4..6 activations, 6..8 weights.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static TILE_CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 32, 32, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Amx {
    /// The token, where the unit may be used.
    pub(crate) fn probe() -> Option<Self> {
        static IS_PERMITTED: OnceLock<bool> = OnceLock::new();
        IS_PERMITTED
            .get_or_init(|| has_int8_tiles() && request_permission())
            .then_some(Self(()))
    }

    /// Sets the tile registers of this thread up; until the result is dropped they are in use.
    pub(crate) fn configure(self) -> AmxUnit {
        // SAFETY: `self` proves the instruction; the layout is a valid one and 64 bytes long.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const TILE_CONFIG, options(nostack, readonly));
        }
        AmxUnit(())
    }
}

/// The unit, set up on the thread that holds this.
pub(crate) struct AmxUnit(());

impl AmxUnit {
    /// Starts the product of slot `SLOT`: entry `[t][r]` is the sum over 32 columns of
    /// `rows[32 t + c] * weights[64 (c / 4) + 4 r + c % 4]`, all signed bytes.
    ///
    /// # Safety
    /// 512 bytes are readable at `rows` and at `weights`.
    #[inline(always)]
    pub(crate) unsafe fn multiply<const SLOT: usize>(&self, rows: *const u8, weights: *const u8) {
        const { assert!(SLOT < N_SLOTS, "a slot of the unit") };
        // SAFETY: the registers are set up; the caller promises the bytes.
        unsafe {
            asm!(
                "tilezero tmm{sums}",
                "tileloadd tmm{rows}, [{row} + {row_stride}]",
                "tileloadd tmm{weights}, [{weight} + {weight_stride}]",
                "tdpbssd tmm{sums}, tmm{rows}, tmm{weights}",
                sums = const SLOT,
                rows = const 4 + SLOT % 2,
                weights = const 6 + SLOT % 2,
                row = in(reg) rows,
                row_stride = in(reg) 32usize,
                weight = in(reg) weights,
                weight_stride = in(reg) 64usize,
                options(nostack, readonly, preserves_flags),
            );
        }
    }

    /// Products of whatever the registers hold, `n` in every slot, for the unit's ceiling.
    pub(crate) fn spin(&self, n: usize) {
        for _ in 0..n {
            // SAFETY: the registers are set up; no memory is touched.
            unsafe {
                asm!(
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    options(nostack, nomem, preserves_flags),
                );
            }
        }
    }

    /// Writes the product of slot `SLOT`.
    ///
    /// # Safety
    /// 256 elements are writable.
    #[inline(always)]
    pub(crate) unsafe fn store<const SLOT: usize>(&self, to: *mut i32) {
        const { assert!(SLOT < N_SLOTS, "a slot of the unit") };
        // SAFETY: the registers are set up; the caller promises the elements.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}], tmm{sums}",
                sums = const SLOT,
                to = in(reg) to,
                stride = in(reg) 64usize,
                options(nostack, preserves_flags),
            );
        }
    }
}

impl Drop for AmxUnit {
    fn drop(&mut self) {
        // In its initial state the registers' 8 KiB are not saved when threads change places.
        // SAFETY: the holder had the instruction.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// CPUID leaf 7: AMX-TILE is bit 24 and AMX-INT8 bit 25 of EDX. What the system enabled of it is
/// asked for next.
fn has_int8_tiles() -> bool {
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    std::arch::x86_64::__cpuid(0).eax >= 7 && leaf.edx & (0b11 << 24) == 0b11 << 24
}

/// Linux hands the tile registers' memory out on request only; all threads of the process get it.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` of `asm/prctl.h`.
    const REQUEST: libc::c_int = 0x1023;
    /// `XFEATURE_XTILEDATA` of the kernel's list of register states.
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}
