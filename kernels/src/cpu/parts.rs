//! A slice that several threads write, each its own part.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use bytemuck::Zeroable;

use super::team;

/// Elements that are worth the meeting of two threads: some microseconds of simple work.
const WORTHWHILE: usize = 16 << 10;

/// The elements of a slice, for threads that share them out among themselves.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    length: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: handing out parts is unsafe, and what is handed out is a `&mut [T]`.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn of(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), _slice: PhantomData }
    }

    /// Where element `first` lies, which has `length` elements from itself on.
    pub fn place(&self, first: usize, length: usize) -> *mut T {
        assert!(first + length <= self.length, "a part beyond the end");
        // SAFETY: within the slice.
        unsafe { self.start.add(first) }
    }

    /// `length` elements from `first` on.
    ///
    /// # Safety
    /// As long as the part is in use, no other part that overlaps it may exist.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, first: usize, length: usize) -> &mut [T] {
        // SAFETY: within the slice, which is borrowed for as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.place(first, length), length) }
    }
}

/// `work(i, row i)` for every row of `y`, whose rows have `width` elements; short work is done by the caller alone.
pub(crate) fn each_row<T: Send>(y: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let width = width.max(1);
    let rows = y.len() / width;
    let together = (WORTHWHILE / width).clamp(1, rows.max(1));
    let parts = Parts::of(y);
    team::for_each(rows.div_ceil(together), |i| {
        let rows = i * together..((i + 1) * together).min(rows);
        // SAFETY: the ranges of rows are disjoint.
        let part = unsafe { parts.part(rows.start * width, rows.len() * width) };
        rows.zip(part.chunks_exact_mut(width)).for_each(|(row, y)| work(row, y));
    });
}

/// `rows` rows of `width` elements, made as [`each_row`] does of zeros.
pub(crate) fn new_rows<T: Zeroable + Send>(
    rows: usize,
    width: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut y = Vec::with_capacity(rows * width);
    each_row(&mut y.spare_capacity_mut()[..rows * width], width, |row, y| work(row, zeroed(y)));
    // SAFETY: `zeroed` was called for every row.
    unsafe { y.set_len(rows * width) };
    y
}

/// Fills new memory with zeros: in the thread that goes on with it, and not before in one for all.
pub(crate) fn zeroed<T: Zeroable>(memory: &mut [MaybeUninit<T>]) -> &mut [T] {
    memory.iter_mut().for_each(|element| *element = MaybeUninit::zeroed());
    // SAFETY: zeros are a value of the type.
    unsafe { &mut *(std::ptr::from_mut(memory) as *mut [T]) }
}

/// `work(i)` of every `i` below `count`, in their order; each is worth a thread.
pub(crate) fn map<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
    let parts = Parts::of(&mut results);
    // SAFETY: every result is written once, by the thread that made it.
    team::for_each(count, |i| unsafe { parts.part(i, 1) }[0] = Some(work(i)));
    results.into_iter().flatten().collect()
}
