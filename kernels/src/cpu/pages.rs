//! Memory in large pages.

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// What a large page of most systems has.
const LARGE: usize = 2 << 20;

/// Values that are written once and then read again and again, zeros at first. Many of them lie in large pages where the system
/// has such (transparent huge pages on Linux), so that the processor looks up fewer addresses.
pub(crate) enum LongLived<T> {
    /// Less than a large page.
    Few(Vec<T>),
    /// Memory of their own.
    Many {
        pages: MmapMut,
        /// Bytes before the first large page.
        first: usize,
        /// Bytes from there on.
        length: usize,
        values: PhantomData<T>,
    },
}

impl<T: Pod> LongLived<T> {
    /// `count` zeros; ends the program where there is no memory, as a vector does.
    pub fn zeros(count: usize) -> Self {
        let length = count * size_of::<T>();
        if length < LARGE {
            return Self::Few(vec![T::zeroed(); count]);
        }
        let failed = |_| handle_alloc_error(Layout::array::<T>(count).unwrap_or(Layout::new::<T>()));
        // New memory, since pages that exist stay as they are; room to begin with a large one.
        let pages = MmapMut::map_anon(length + LARGE).unwrap_or_else(failed);
        // The system need not do as asked: nothing but the time depends on it.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        let first = pages.as_ptr().align_offset(LARGE);
        Self::Many { pages, first, length, values: PhantomData }
    }
}

impl<T: Pod> Deref for LongLived<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Few(values) => values,
            Self::Many { pages, first, length, .. } => bytemuck::cast_slice(&pages[*first..][..*length]),
        }
    }
}

impl<T: Pod> DerefMut for LongLived<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Few(values) => values,
            Self::Many { pages, first, length, .. } => {
                bytemuck::cast_slice_mut(&mut pages[*first..][..*length])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_values_are_zeros_that_can_be_written() {
        for count in [0, 3, LARGE / 8, LARGE + 5] {
            let mut values = LongLived::<u64>::zeros(count);
            assert_eq!((values.len(), values.iter().copied().max().unwrap_or(0)), (count, 0));
            values.iter_mut().enumerate().for_each(|(i, value)| *value = i as u64);
            assert!(values.iter().enumerate().all(|(i, value)| *value == i as u64));
        }
    }
}
