//! Memory that several threads write disjoint parts of, and the checks in front of it.

use std::{
    marker::PhantomData,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A pointer into an output buffer that several threads write disjoint parts of.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedOut<'a, T: Copy = f32> {
    first: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: threads write disjoint elements; every write goes through an unsafe method that says so.
unsafe impl<T: Copy + Send> Send for SharedOut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Copy + Send> Sync for SharedOut<'_, T> {}

impl<'a, T: Copy> SharedOut<'a, T> {
    pub(super) fn new(out: &'a mut [T]) -> Self {
        Self {
            first: out.as_mut_ptr(),
            len: out.len(),
            owner: PhantomData,
        }
    }

    /// # Safety
    /// `at` is inside, and no other thread touches that element.
    pub(super) unsafe fn write(self, at: usize, value: T) {
        debug_assert!(at < self.len, "output {at} of {}", self.len);
        // SAFETY: promised by the caller.
        unsafe { self.first.add(at).write(value) };
    }

    /// Where element `at` is or would be, to be named but not to be read.
    pub(super) fn place(self, at: usize) -> *const T {
        self.first.wrapping_add(at)
    }

    /// # Safety
    /// `at` is inside.
    pub(super) unsafe fn at(self, at: usize) -> *mut T {
        debug_assert!(at < self.len, "output {at} of {}", self.len);
        // SAFETY: promised by the caller.
        unsafe { self.first.add(at) }
    }
}

/// Elements of `factors[0] x factors[1] x ..`, checked: sizes guard raw pointers, and a product that
/// wrapped around would guard nothing.
pub(super) fn area(factors: &[usize]) -> usize {
    let product = factors
        .iter()
        .try_fold(1usize, |area, factor| area.checked_mul(*factor));
    assert!(product.is_some(), "{factors:?} elements are addressable");
    product.unwrap_or(0)
}

/// Bytes that several threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct SharedBytes(pub(super) *mut u8);

// SAFETY: threads write disjoint bytes; the methods are unsafe and say so.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// # Safety
    /// `at` is inside.
    pub(super) unsafe fn at(self, at: usize) -> *mut u8 {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(at) }
    }

    /// # Safety
    /// The range is inside, and no other thread touches it.
    pub(super) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [u8] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
