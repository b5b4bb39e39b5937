//! One sequence's choices: its parameters and what it has said so far, as what a device draws by.

use std::collections::HashMap;

use gptq_kernels::{Change, RowSampling};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::{Adjustments, SamplingParams};
use crate::Result;

/// Says how tokens of one sequence are drawn; equal seeds give equal tokens, each by its place in the sequence alone.
pub struct Sampler {
    params: SamplingParams,
    adjustments: Adjustments,
    rng: ChaCha12Rng,
    /// Biases and penalties so far: a token changes one of them.
    changes: Vec<Change>,
    places: HashMap<u32, Place>,
    /// Tokens of the sequence that are counted in `changes`.
    counted: usize,
    /// Ids that are not drawn before a place.
    forbidden: Vec<u32>,
    allowed_from: usize,
}

/// Where an id stands in the changes.
struct Place {
    at: usize,
    bias: f32,
    /// How often it was generated.
    times: usize,
}

impl Sampler {
    pub fn new(params: SamplingParams) -> Result<Self> {
        Self::adjusted(params, Adjustments::default())
    }

    pub fn adjusted(params: SamplingParams, adjustments: Adjustments) -> Result<Self> {
        params.check()?;
        adjustments.check()?;
        let rng = ChaCha12Rng::seed_from_u64(params.seed);
        let (changes, places, forbidden) = (Vec::new(), HashMap::new(), Vec::new());
        let mut sampler =
            Self { rng, params, adjustments, changes, places, counted: 0, forbidden, allowed_from: 0 };
        for (id, bias) in sampler.adjustments.logit_bias.clone() {
            let at = sampler.place(id);
            sampler.changes[at].added += bias;
            if let Some(place) = sampler.places.get_mut(&id) {
                place.bias += bias;
            }
        }
        Ok(sampler)
    }

    /// From now on none of these ids is drawn at a place before `place`. What cannot be drawn at all may stay out.
    pub fn forbid_before(&mut self, place: usize, ids: &[u32]) {
        self.forbidden = ids.to_vec();
        self.forbidden.sort_unstable();
        self.forbidden.dedup();
        self.allowed_from = place;
    }

    /// Whether a token depends on those before it by more than the scores.
    pub fn remembers(&self) -> bool {
        self.params.repetition_penalty != 1.0 || self.penalises()
    }

    fn penalises(&self) -> bool {
        self.adjustments.frequency_penalty != 0.0 || self.adjustments.presence_penalty != 0.0
    }

    /// How the token after `ids` is drawn, of which the first `prompt` were not generated. `ids` must begin with those of
    /// the call before.
    pub fn next_row(&mut self, ids: &[u32], prompt: usize) -> RowSampling {
        if self.remembers() {
            for (place, id) in ids.iter().enumerate().skip(self.counted) {
                self.see(*id, place >= prompt);
            }
            self.counted = ids.len();
        }
        self.row_at(ids.len())
    }

    /// How the token at a place is drawn, without its log-probability, whatever came before it where [`Self::remembers`] is
    /// false.
    pub fn row_at(&mut self, place: usize) -> RowSampling {
        let SamplingParams { temperature, top_k, top_p, .. } = self.params;
        let Adjustments { min_p, typical_p, .. } = self.adjustments;
        let (random, changes) = (self.random(place), self.changes_at(place));
        RowSampling { temperature, top_k, top_p, min_p, typical_p, random, changes, logprob: false }
    }

    fn changes_at(&self, place: usize) -> Vec<Change> {
        let mut changes = self.changes.clone();
        let forbidden = if place < self.allowed_from { &self.forbidden[..] } else { &[] };
        for id in forbidden {
            match self.places.get(id) {
                Some(known) => changes[known.at].added = f32::NEG_INFINITY,
                None => changes.push(Change { id: *id, added: f32::NEG_INFINITY, repeated: 1.0 }),
            }
        }
        changes
    }

    /// The random number of a place.
    fn random(&mut self, place: usize) -> u64 {
        // Two words each.
        self.rng.set_word_pos(2 * place as u128);
        self.rng.next_u64()
    }

    /// Counts a token of the sequence.
    fn see(&mut self, id: u32, generated: bool) {
        let repeated = self.params.repetition_penalty;
        if repeated == 1.0 && !generated {
            return;
        }
        let at = self.place(id);
        self.changes[at].repeated = repeated;
        if let Some(place) = self.places.get_mut(&id).filter(|_| generated) {
            place.times += 1;
            self.changes[at].added = place.bias - self.adjustments.taken_off(place.times);
        }
    }

    /// Where an id stands in the changes from now on.
    fn place(&mut self, id: u32) -> usize {
        let place = self.places.entry(id).or_insert_with(|| {
            self.changes.push(Change { id, added: 0.0, repeated: 1.0 });
            Place { at: self.changes.len() - 1, bias: 0.0, times: 0 }
        });
        place.at
    }
}

#[cfg(test)]
mod tests {
    use gptq_kernels::{Cpu, Device, Sample};

    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 1 }
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..params() }
    }

    fn next(sampler: &mut Sampler, logits: Vec<f32>, ids: &[u32], prompt: usize) -> u32 {
        let (cpu, vocab) = (Cpu::new(), logits.len());
        let logits = cpu.tensor(logits, (1, vocab)).unwrap();
        let sampled = cpu.sample(&logits, &[sampler.next_row(ids, prompt)]).unwrap();
        cpu.sampled_tokens(&sampled).unwrap()[0].unwrap().id
    }

    #[test]
    fn a_repeated_token_is_penalised_once() {
        let penalty = SamplingParams { repetition_penalty: 2.0, ..greedy() };
        let next = |logits: [f32; 2], ids: &[u32]| {
            next(&mut Sampler::new(penalty.clone()).unwrap(), logits.to_vec(), ids, 0)
        };
        assert_eq!(next([3.0, 2.0], &[0, 0, 0]), 1);
        assert_eq!(next([3.0, 1.0], &[0, 0]), 0);
    }

    #[test]
    fn generated_tokens_are_penalised_by_count_and_prompt_tokens_are_not() {
        let adjustments = Adjustments { frequency_penalty: 1.0, presence_penalty: 0.5, ..Default::default() };
        let next = |logits: [f32; 2], prompt| {
            let mut sampler = Sampler::adjusted(greedy(), adjustments.clone()).unwrap();
            next(&mut sampler, logits.to_vec(), &[0, 0, 0], prompt)
        };
        assert_eq!(next([3.0, 2.0], 3), 0);
        assert_eq!(next([3.4, 2.0], 2), 1, "one of three was generated");
        assert_eq!(next([3.6, 2.0], 2), 0);
    }

    #[test]
    fn what_was_counted_is_not_counted_again_and_biases_add_up() {
        let adjustments = Adjustments {
            frequency_penalty: 1.0,
            logit_bias: vec![(0, 0.25), (3, 0.5)],
            ..Default::default()
        };
        let both = SamplingParams { repetition_penalty: 2.0, ..greedy() };
        let mut sampler = Sampler::adjusted(both, adjustments).unwrap();
        sampler.next_row(&[1, 0], 1);
        let changes = sampler.next_row(&[1, 0, 0, 2], 1).changes;
        let change = |id, added, repeated| Change { id, added, repeated };
        let expected =
            [change(0, -1.75, 2.0), change(3, 0.5, 1.0), change(1, 0.0, 2.0), change(2, -1.0, 2.0)];
        assert_eq!(changes, expected);
    }

    #[test]
    fn a_forbidden_token_is_drawn_from_its_place_on_whatever_its_bias() {
        let adjustments = Adjustments { logit_bias: vec![(1, 5.0)], ..Default::default() };
        let mut sampler = Sampler::adjusted(greedy(), adjustments).unwrap();
        sampler.forbid_before(3, &[1, 2, 1]);
        let mut next = |ids: &[u32]| next(&mut sampler, vec![0.0, 1.0, 2.0], ids, 1);
        assert_eq!([next(&[0]), next(&[0, 0]), next(&[0, 0, 0])], [0, 0, 1]);
    }

    #[test]
    fn equal_seeds_give_equal_tokens_at_every_place() {
        let sampling = |seed| -> Vec<u64> {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params() }).unwrap();
            (0..50).map(|place| sampler.next_row(&vec![0; place], 0).random).collect()
        };
        assert_eq!(sampling(3), sampling(3));
        assert_ne!(sampling(3), sampling(4));
        let mut sampler = Sampler::new(SamplingParams { seed: 3, ..params() }).unwrap();
        assert_eq!(
            sampler.row_at(17).random,
            sampling(3)[17],
            "also where those before were token elsewhere"
        );
        let mut different = sampling(3);
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), 50);
    }

    #[test]
    fn meaningless_parameters_are_refused() {
        assert!(SamplingParams { temperature: -1.0, ..params() }.check().is_err());
        assert!(SamplingParams { temperature: f32::NAN, ..params() }.check().is_err());
        assert!(SamplingParams { top_p: 0.0, ..params() }.check().is_err());
        assert!(SamplingParams { repetition_penalty: 0.0, ..params() }.check().is_err());
        assert!(Adjustments { min_p: 1.1, ..Default::default() }.check().is_err());
        assert!(Adjustments { min_p: f32::NAN, ..Default::default() }.check().is_err());
    }
}
