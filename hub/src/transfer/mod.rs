//! The state of one file that is being fetched: which of its pieces are there, under way or still to ask for, and what an
//! answer means for them. Knows no sockets, no files and no threads.

mod answer;
pub(crate) mod partial;

pub(crate) use self::answer::{Step, step};

/// Answers that turned out damaged before a file is given up.
const MOST_DAMAGED: u32 = 3;

/// The pieces of one file.
#[derive(Debug)]
pub(crate) struct Transfer {
    size: u64,
    piece: u64,
    pieces: Vec<Piece>,
    mode: Mode,
    damaged: u32,
    /// Counts beginnings: what a worker brings from before the last one is thrown away.
    round: u32,
}

/// `got` bytes from the piece's start are there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    got: u64,
    flying: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Mode {
    Ranges,
    /// The server ignores ranges: one worker takes the whole stream.
    Stream {
        flying: bool,
    },
}

/// What a worker is to fetch: bytes from one place to before another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub from: u64,
    pub to: u64,
    round: u32,
}

impl Work {
    pub fn is_empty(&self) -> bool {
        self.from >= self.to
    }
}

impl Transfer {
    pub fn new(size: u64, piece: u64) -> Self {
        let count = size.div_ceil(piece).max(1);
        let pieces = vec![Piece { got: 0, flying: false }; count as usize];
        Self { size, piece, pieces, mode: Mode::Ranges, damaged: 0, round: 0 }
    }

    /// A piece that is there from an earlier run.
    pub fn keep(&mut self, index: usize) {
        let length = self.length(index);
        if let Some(piece) = self.pieces.get_mut(index) {
            piece.got = length;
        }
    }

    fn length(&self, index: usize) -> u64 {
        let start = index as u64 * self.piece;
        self.size.saturating_sub(start).min(self.piece)
    }

    fn is_there(&self, index: usize) -> bool {
        self.pieces[index].got == self.length(index)
    }

    /// Bytes that are there.
    pub fn done(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.got).sum()
    }

    /// Bytes that are there without a gap from the start.
    pub fn contiguous(&self) -> u64 {
        let whole = (0..self.pieces.len()).take_while(|index| self.is_there(*index)).count();
        let part = self.pieces.get(whole).map_or(0, |piece| piece.got);
        (whole as u64 * self.piece + part).min(self.size)
    }

    /// An empty file has one piece of no bytes, which is there at once.
    pub fn is_complete(&self) -> bool {
        (0..self.pieces.len()).all(|index| self.is_there(index))
    }

    /// The next thing to fetch; None where all of it is there or under way.
    pub fn next(&mut self) -> Option<Work> {
        let round = self.round;
        match &mut self.mode {
            Mode::Stream { flying: true } => None,
            Mode::Stream { flying } => {
                *flying = true;
                let from = self.contiguous();
                (from < self.size).then_some(Work { from, to: self.size, round })
            }
            Mode::Ranges => {
                let waits = |index: &usize| !self.pieces[*index].flying && !self.is_there(*index);
                let index = (0..self.pieces.len()).find(waits)?;
                self.pieces[index].flying = true;
                let start = index as u64 * self.piece;
                Some(Work { from: start + self.pieces[index].got, to: start + self.length(index), round })
            }
        }
    }

    /// `count` bytes of the work have arrived and are written. Returns the pieces that are whole now, or None where the
    /// worker has to stop, since the file was begun anew.
    pub fn arrived(&mut self, work: &mut Work, count: u64) -> Option<Vec<usize>> {
        if work.round != self.round {
            return None;
        }
        let mut whole = Vec::new();
        let mut left = count.min(work.to - work.from);
        while left > 0 {
            let index = (work.from / self.piece) as usize;
            let end = index as u64 * self.piece + self.length(index);
            let taken = left.min(end - work.from);
            work.from += taken;
            left -= taken;
            let got = work.from - index as u64 * self.piece;
            let length = self.length(index);
            let piece = &mut self.pieces[index];
            if piece.got < length && got == length {
                whole.push(index);
            }
            piece.got = piece.got.max(got);
        }
        Some(whole)
    }

    /// The worker has stopped, whether all of its work is there or not.
    pub fn give_back(&mut self, work: &Work) {
        if work.round != self.round {
            return;
        }
        match &mut self.mode {
            Mode::Stream { flying } => *flying = false,
            Mode::Ranges => {
                // At the end of its piece it stands at the start of the next one.
                let index = (work.to - 1) / self.piece;
                if let Some(piece) = self.pieces.get_mut(index as usize) {
                    piece.flying = false;
                }
            }
        }
    }

    /// The server has sent the whole file instead of a range. The first worker that sees it keeps the stream, from the
    /// first byte that is missing; the others stop.
    pub fn ignored(&mut self, work: &Work) -> Option<Work> {
        if work.round != self.round {
            return None;
        }
        if self.mode != Mode::Ranges {
            // The stream itself, which asked for the rest and got all of it once more.
            return Some(work.clone());
        }
        for piece in &mut self.pieces {
            piece.flying = false;
        }
        // Pieces that others have begun end here: what they bring from now on belongs to another round.
        self.round += 1;
        self.mode = Mode::Stream { flying: true };
        Some(Work { from: self.contiguous(), to: self.size, round: self.round })
    }

    /// All that arrived is worthless. False where it was so too often.
    pub fn begin_anew(&mut self) -> bool {
        self.damaged += 1;
        self.round += 1;
        for piece in &mut self.pieces {
            *piece = Piece { got: 0, flying: false };
        }
        if let Mode::Stream { flying } = &mut self.mode {
            *flying = false;
        }
        self.damaged < MOST_DAMAGED
    }

    pub fn times_damaged(&self) -> u32 {
        self.damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pieces of 10 and one of 5.
    fn transfer() -> Transfer {
        Transfer::new(25, 10)
    }

    fn range(work: &Work) -> (u64, u64) {
        (work.from, work.to)
    }

    fn flying(transfer: &mut Transfer) -> Vec<Work> {
        std::iter::from_fn(|| transfer.next()).collect()
    }

    #[test]
    fn pieces_go_out_once_and_a_broken_one_goes_on_where_it_ended() {
        let mut t = transfer();
        let mut work = flying(&mut t);
        assert_eq!(work.iter().map(range).collect::<Vec<_>>(), [(0, 10), (10, 20), (20, 25)]);
        assert_eq!(t.arrived(&mut work[1], 4), Some(vec![]));
        t.give_back(&work[1]);
        assert_eq!(range(&t.next().unwrap()), (14, 20));
        assert_eq!(t.arrived(&mut work[0], 10), Some(vec![0]));
        t.give_back(&work[0]);
        assert_eq!((t.contiguous(), t.done(), t.next()), (14, 14, None));
    }

    #[test]
    fn a_file_is_complete_when_every_piece_is_whole() {
        let mut t = transfer();
        t.keep(2);
        for mut work in flying(&mut t) {
            assert!(!t.is_complete());
            let length = work.to - work.from;
            assert_eq!(t.arrived(&mut work, length).unwrap().len(), 1);
            t.give_back(&work);
        }
        assert!(t.is_complete() && t.contiguous() == 25);
        assert!(Transfer::new(0, 10).is_complete());
    }

    #[test]
    fn where_ranges_are_ignored_one_stream_goes_on_alone() {
        let mut t = transfer();
        t.keep(0);
        let mut work = flying(&mut t);
        let mut stream = t.ignored(&work[1]).unwrap();
        assert_eq!(range(&stream), (10, 25), "what is there is not asked for again");
        assert_eq!(t.ignored(&work[0]), None, "the second to see it stops");
        assert_eq!(t.arrived(&mut work[0], 5), None, "what others bring belongs to another round");
        assert_eq!(t.next(), None);
        assert_eq!(t.arrived(&mut stream, 12), Some(vec![1]));
        t.give_back(&stream);
        let mut rest = t.next().unwrap();
        assert_eq!(range(&rest), (22, 25));
        assert_eq!(t.arrived(&mut rest, 100), Some(vec![2]), "more than was asked for is not taken");
        assert!(t.is_complete());
    }

    #[test]
    fn damage_begins_anew_twice_and_then_ends() {
        let mut t = transfer();
        let mut old = t.next().unwrap();
        assert!(t.begin_anew());
        assert_eq!(t.arrived(&mut old, 10), None);
        t.give_back(&old);
        assert_eq!(range(&t.next().unwrap()), (0, 10));
        assert!(t.begin_anew());
        assert!(!t.begin_anew());
        assert_eq!(t.times_damaged(), 3);
    }

    /// Numbers without a pattern, the same for a seed.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, most: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 20) % most.max(1)
        }
    }

    #[test]
    fn whatever_workers_and_servers_do_the_pieces_are_the_bytes_that_arrived() {
        for seed in 1..2000 {
            let mut dice = Dice(seed * 0x9e37_79b9_7f4a_7c15);
            let (size, piece) = (dice.below(300), 1 + dice.below(40));
            let mut transfer = Transfer::new(size, piece);
            // The same, kept as plainly as can be.
            let mut there = vec![false; size as usize];
            let mut workers: Vec<Option<Work>> = vec![None; 1 + dice.below(5) as usize];
            let mut steps = 0;
            while !transfer.is_complete() {
                steps += 1;
                assert!(steps < 100_000, "seed {seed}: {transfer:?} never ends");
                let nth = dice.below(workers.len() as u64) as usize;
                let Some(mut work) = workers[nth].take() else {
                    workers[nth] = transfer.next();
                    continue;
                };
                match dice.below(20) {
                    0 => transfer.give_back(&work),
                    1 => workers[nth] = transfer.ignored(&work),
                    2 if dice.below(30) == 0 => {
                        transfer.begin_anew();
                        there.fill(false);
                    }
                    _ => {
                        let (from, count) = (work.from, 1 + dice.below(work.to - work.from));
                        if transfer.arrived(&mut work, count).is_some() {
                            there[from as usize..work.from as usize].fill(true);
                            match work.is_empty() {
                                true => transfer.give_back(&work),
                                false => workers[nth] = Some(work),
                            }
                        }
                    }
                }
                let prefix = there.iter().take_while(|byte| **byte).count() as u64;
                let count = there.iter().filter(|byte| **byte).count() as u64;
                assert_eq!((transfer.done(), transfer.contiguous()), (count, prefix), "seed {seed}");
            }
            assert!(there.iter().all(|byte| *byte), "seed {seed}");
        }
    }
}
