//! What the answer to a request for a part of a file means.

/// What to do with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The body is what was asked for.
    Take,
    /// The body is the whole file, from its first byte.
    Whole,
    /// The server has another file there.
    Changed,
    /// Not the range that was asked for.
    Misplaced,
    /// To be judged by its status.
    Refused,
}

/// `asked` is the range that was asked for, None for the whole file. Sizes come from the tree: what a redirect or a
/// compressed body says of its length is another thing.
pub(crate) fn step(
    asked: Option<(u64, u64)>,
    size: u64,
    status: u16,
    content_range: Option<&str>,
    content_length: Option<u64>,
) -> Step {
    match (status, asked) {
        (206, Some(asked)) => match content_range.and_then(parse) {
            Some((_, _, Some(total))) if total != size => Step::Changed,
            Some((from, last, _)) if from == asked.0 && last < asked.1 => Step::Take,
            _ => Step::Misplaced,
        },
        (206, None) => Step::Misplaced,
        (200, _) if content_length.is_some_and(|length| length != size) => Step::Changed,
        (200, None) => Step::Take,
        (200, Some(_)) => Step::Whole,
        (416, _) => Step::Changed,
        _ => Step::Refused,
    }
}

/// `bytes 0-9/100`; the total may be `*`.
fn parse(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (from, last) = range.split_once('-')?;
    let (from, last) = (from.trim().parse().ok()?, last.trim().parse().ok()?);
    (from <= last).then_some((from, last, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_range_that_was_asked_for_counts_as_one() {
        let ranged = |content_range| step(Some((10, 20)), 100, 206, Some(content_range), Some(10));
        assert_eq!(ranged("bytes 10-19/100"), Step::Take);
        assert_eq!(ranged("bytes 10-14/100"), Step::Take, "a server may send less");
        assert_eq!(ranged("bytes 10-19/*"), Step::Take);
        assert_eq!(ranged("bytes 0-9/100"), Step::Misplaced);
        assert_eq!(ranged("bytes 10-99/100"), Step::Misplaced);
        assert_eq!(ranged("bytes 10-19/99"), Step::Changed);
        assert_eq!(ranged("nonsense"), Step::Misplaced);
        assert_eq!(step(Some((10, 20)), 100, 206, None, None), Step::Misplaced);
        assert_eq!(step(None, 100, 206, Some("bytes 0-99/100"), None), Step::Misplaced);
    }

    #[test]
    fn a_whole_file_is_never_appended_to_a_part() {
        assert_eq!(step(Some((10, 20)), 100, 200, None, Some(100)), Step::Whole);
        assert_eq!(step(Some((10, 20)), 100, 200, None, None), Step::Whole);
        assert_eq!(step(None, 100, 200, None, Some(100)), Step::Take);
        assert_eq!(step(None, 100, 200, None, Some(99)), Step::Changed, "an error page, or another file");
        assert_eq!(step(Some((10, 20)), 100, 416, Some("bytes */5"), None), Step::Changed);
        for status in [302, 401, 403, 404, 429, 500, 503] {
            assert_eq!(step(None, 100, status, None, Some(100)), Step::Refused);
        }
    }
}
