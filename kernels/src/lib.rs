//! Arithmetic on tensors: weight formats, the scalar reference, and the backends that run models.
//!
//! Knows no file, no network, no clock and no configuration; a model is a sequence of calls on
//! [`backend::Backend`].
//!
//! Kernel letters: `m` rows of activations (tokens), `n` rows of a weight matrix (outputs),
//! `k` columns of a weight matrix (inputs), `h` attention heads, `d` head dimension,
//! `e` experts, `t` positions of a sequence.
//!
//! Invariant: an output element is computed by one thread in one fixed order of additions, which
//! does not depend on the number of rows in the call, the number of threads, or anything else in
//! the batch.
#![deny(unsafe_code)]

pub mod dtype;
pub mod matrix;
pub mod panel;
/// Decoding of every weight format, one file each.
pub mod quant;
pub mod backend;
/// Plain scalar f32 versions of every operation: what the others are compared with.
pub mod reference;
/// The CPU backend: threads and SIMD.
#[expect(
    unsafe_code,
    reason = "SIMD loads and stores, and the work hand-over of the thread pool"
)]
pub mod cpu;
pub mod cases;
