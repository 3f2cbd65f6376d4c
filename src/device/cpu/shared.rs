//! A mutable slice that several tasks write at disjoint places.

use std::marker::PhantomData;

/// Shares one `&mut [T]` between tasks that each write their own elements (tiles of a matrix, heads of a token).
#[derive(Debug)]
pub(super) struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: every access goes through an unsafe method whose caller promises disjointness.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        SharedMut { data: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The elements from `at` on.
    pub fn from(&self, at: usize) -> Self {
        assert!(at <= self.len, "{at} of {}", self.len);
        // SAFETY: inside the slice.
        SharedMut { data: unsafe { self.data.add(at) }, len: self.len - at, _slice: PhantomData }
    }

    /// A pointer to element `i` (bounds checked in debug builds).
    ///
    /// # Safety
    /// `i` is inside, and no other task touches what is written through the pointer.
    #[inline]
    pub unsafe fn at(&self, i: usize) -> *mut T {
        debug_assert!(i < self.len, "{i} of {}", self.len);
        // SAFETY: promised by the caller.
        unsafe { self.data.add(i) }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other task touches these elements while the slice lives.
    #[inline]
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's promise
    pub unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len, "{at} + {len} of {}", self.len);
        // SAFETY: inside; disjointness promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}
