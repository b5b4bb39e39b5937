//! The target of a sweep, against the equation that it solves.

use super::*;

/// `rough` is how near losses come, which a GPU computes with 11 bits.
pub(super) fn the_target_solves_its_equation<B: Backend>(backend: &B, rough: f64) {
    let case = Case::new(19, 70);
    let grouping = case.grouping(70);
    let h = case.hessian(backend);
    let (u, damped) = (
        backend.inverse_cholesky(&h, &grouping.order, DAMP).unwrap(),
        backend.damped(&h, &grouping.order, DAMP).unwrap(),
    );
    let sweep = case.start(backend, &grouping, &spec(4, true));
    let weights = backend.sweep_weights(&sweep).unwrap();
    let other = random(11, TOKENS * case.columns);
    let shifted: Vec<f32> = case.x.iter().zip(&other).map(|(x, d)| x + 0.1 * d).collect();
    let hidden = random(12, TOKENS * case.rows);
    let tensor = |values: &[f32], width: usize| backend.tensor(values.to_vec(), (TOKENS, width)).unwrap();
    let x = tensor(&case.x, case.columns);
    let mut shift = backend.products(case.columns, case.columns).unwrap();
    let moved = backend.difference(&tensor(&shifted, case.columns), &x).unwrap();
    backend.accumulate_products(&mut shift, &moved, &x).unwrap();
    // What the stage makes of the other inputs.
    let weight = |n: usize, i: usize| case.weights[n * case.columns + i] as f64;
    let made = |t: usize, n: usize| -> f64 {
        (0..case.columns).map(|i| weight(n, i) * shifted[t * case.columns + i] as f64).sum()
    };
    let y: Vec<f32> = (0..TOKENS * case.rows)
        .map(|i| (made(i / case.rows, i % case.rows) + hidden[i] as f64) as f32)
        .collect();
    let mut outputs = backend.products(case.rows, case.columns).unwrap();
    backend.accumulate_products(&mut outputs, &tensor(&y, case.rows), &x).unwrap();
    // From the tokens themselves: sum (W (x_f - x) + h) x^T.
    let expected_with = |hidden: &[f32]| {
        let mut expected = vec![0.0; case.rows * case.columns];
        for (t, n) in (0..TOKENS).flat_map(|t| (0..case.rows).map(move |n| (t, n))) {
            let x = &case.x[t * case.columns..][..case.columns];
            let difference = |i: usize| (shifted[t * case.columns + i] - x[i]) as f64;
            let moved: f64 = (0..case.columns).map(|i| weight(n, i) * difference(i)).sum();
            let moved = moved + hidden[t * case.rows + n] as f64;
            for (place, feature) in grouping.order.iter().enumerate() {
                expected[n * case.columns + place] += moved * x[*feature as usize] as f64;
            }
        }
        expected
    };
    let pull = backend.sweep_pull(&weights, &grouping.order, Wanted::OfInputs(&shift)).unwrap();
    let expected = expected_with(&vec![0.0; hidden.len()]);
    assert_close("pull of inputs", &backend.matrix_to_vec(&pull).unwrap(), &expected, 1e-9);
    let pull = backend.sweep_pull(&weights, &grouping.order, Wanted::Outputs(&outputs, &h)).unwrap();
    let expected = expected_with(&hidden);
    assert_close("pull of outputs", &backend.matrix_to_vec(&pull).unwrap(), &expected, 1e-9);
    assert!(backend.sweep_pull(&weights, &grouping.order, Wanted::OfInputs(&outputs)).is_err());
    let moved = |share: f32| {
        let mut moved = backend.sweep_copy(&sweep).unwrap();
        backend.sweep_toward(&mut moved, &pull, &u, share).unwrap();
        moved
    };
    let change_of = |sweep: &B::Sweep| {
        difference(
            &wide(backend.matrix_to_vec(&backend.sweep_weights(sweep).unwrap()).unwrap()),
            &wide(backend.matrix_to_vec(&weights).unwrap()),
        )
    };
    let part: Vec<f32> = change_of(&moved(0.25)).iter().map(|change| *change as f32).collect();
    let sweep = moved(1.0);
    let change = change_of(&sweep);
    let quarter: Vec<f64> = change.iter().map(|change| 0.25 * change).collect();
    assert_close("a quarter of the way", &part, &quarter, 1e-8);
    let h = wide(backend.matrix_to_vec(&damped).unwrap());
    let back = |i: usize| -> f32 {
        let (n, j) = (i / case.columns, i % case.columns);
        (0..case.columns).map(|k| change[n * case.columns + k] * h[k * case.columns + j]).sum::<f64>() as f32
    };
    let back: Vec<f32> = (0..expected.len()).map(back).collect();
    assert_close("(W* - W) (H + damp)", &back, &expected, 1e-8);
    // Losses see the same: with the pull, what is nearer to the target costs less.
    let undamped = backend.damped(&case.hessian(backend), &grouping.order, 0.0).unwrap();
    let got = backend.sweep_losses(&sweep, &weights, &undamped, Some(&pull)).unwrap();
    let e: Vec<f64> = change.iter().map(|c| -c).collect();
    let h = wide(backend.matrix_to_vec(&undamped).unwrap());
    let plain = losses(&e, &h, &expected, case.columns);
    assert_close("losses", &got, &plain, rough);
    assert!(got.iter().all(|loss| *loss < 0.0), "every row is better than the weights as they were");
}

#[test]
fn the_target_is_the_least_squares_solution() {
    the_target_solves_its_equation(&Cpu::new(), 1e-8);
}
