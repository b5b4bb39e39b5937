//! The dot products in registers, for any instructions.

/// Tokens that share a widened element.
pub(super) const TOGETHER: usize = 4;

/// How an element is widened.
pub(super) const F16: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F32: u8 = 2;

/// The functions of one instruction set.
macro_rules! dots {
    ($name:ident, $some:ident, $widen:ident, $features:literal, $lanes:literal, $vector:ty,
     $zero:ident, $load:ident, $fma:ident, $add:ident, $store:ident) => {
        /// See [`super::dots`].
        ///
        /// # Safety
        /// The processor must have the instructions.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(row: DenseRow, x: &[f32], sums: &mut [f32]) {
            let k = row.len();
            if k == 0 {
                return sums.fill(0.0);
            }
            for (x, sums) in x.chunks(TOGETHER * k).zip(sums.chunks_mut(TOGETHER)) {
                // SAFETY: as many elements as k, and as many tokens of as many as there are sums.
                unsafe {
                    match (row, <&mut [f32; TOGETHER]>::try_from(&mut *sums)) {
                        (DenseRow::F16(w), Ok(sums)) => $some::<F16, TOGETHER>(w.as_ptr().cast(), k, x, sums),
                        (DenseRow::BF16(w), Ok(sums)) => {
                            $some::<BF16, TOGETHER>(w.as_ptr().cast(), k, x, sums)
                        }
                        (DenseRow::F32(w), Ok(sums)) => $some::<F32, TOGETHER>(w.as_ptr().cast(), k, x, sums),
                        (row, Err(_)) => {
                            for (x, sum) in x.chunks(k).zip(sums.iter_mut()) {
                                let sum = std::array::from_mut(sum);
                                match row {
                                    DenseRow::F16(w) => $some::<F16, 1>(w.as_ptr().cast(), k, x, sum),
                                    DenseRow::BF16(w) => $some::<BF16, 1>(w.as_ptr().cast(), k, x, sum),
                                    DenseRow::F32(w) => $some::<F32, 1>(w.as_ptr().cast(), k, x, sum),
                                }
                            }
                        }
                    }
                }
            }
            for i in k - k % (2 * $lanes)..k {
                let weight = row.at(i);
                sums.iter_mut().zip(x.chunks_exact(k)).for_each(|(sum, x)| *sum += weight * x[i]);
            }
        }

        /// The sums over whole pairs of registers.
        ///
        /// # Safety
        /// `w` points to `k` elements of the kind, and x holds `T` tokens of `k`.
        #[target_feature(enable = $features)]
        unsafe fn $some<const KIND: u8, const T: usize>(
            w: *const u8,
            k: usize,
            x: &[f32],
            sums: &mut [f32; T],
        ) {
            assert!(x.len() >= T * k);
            let mut parts = [[$zero(); 2]; T];
            for i in (0..k / (2 * $lanes)).map(|i| i * 2 * $lanes) {
                // SAFETY: both registers end before `k`.
                unsafe {
                    read_ahead(w.wrapping_add(i * if KIND == F32 { 4 } else { 2 }));
                    let weights = [$widen::<KIND>(w, i), $widen::<KIND>(w, i + $lanes)];
                    for t in 0..T {
                        let x = x.as_ptr().add(t * k + i);
                        parts[t][0] = $fma(weights[0], $load(x), parts[t][0]);
                        parts[t][1] = $fma(weights[1], $load(x.add($lanes)), parts[t][1]);
                    }
                }
            }
            for (sum, parts) in sums.iter_mut().zip(&parts) {
                let mut lanes = [0f32; $lanes];
                // SAFETY: as many lanes as a register has.
                unsafe { $store(lanes.as_mut_ptr(), $add(parts[0], parts[1])) };
                *sum = lanes.iter().sum();
            }
        }
    };
}
pub(super) use dots;
