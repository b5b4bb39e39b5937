//! Wildcards for file names, with the meaning that Python's `fnmatch` gives them: `*` also crosses `/`.

/// Whether the whole name fits the pattern of `*`, `?`, `[a-z]` and `[!a-z]`.
pub fn fits(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    // Where to go back to: behind the last `*`, and the character that it swallows next.
    let (mut p, mut n, mut retry) = (0, 0, None);
    loop {
        let step = match pattern.get(p) {
            Some('*') => {
                retry = Some((p + 1, n));
                p += 1;
                continue;
            }
            None if n == name.len() => return true,
            Some(_) if n < name.len() => one(&pattern[p..], name[n]),
            _ => None,
        };
        match (step, retry) {
            (Some(width), _) => (p, n) = (p + width, n + 1),
            (None, Some((behind, swallowed))) if swallowed < name.len() => {
                (p, n, retry) = (behind, swallowed + 1, Some((behind, swallowed + 1)));
            }
            _ => return false,
        }
    }
}

/// The width of the pattern's first element where it fits the character.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern[0] {
        '?' => Some(1),
        '[' => {
            let negated = pattern.get(1) == Some(&'!');
            let start = if negated { 2 } else { 1 };
            // A `]` that comes first is a member.
            let length = pattern.iter().skip(start + 1).position(|c| *c == ']');
            let Some(end) = length.map(|length| start + 1 + length) else {
                return (c == '[').then_some(1);
            };
            (is_member(&pattern[start..end], c) != negated).then_some(end + 1)
        }
        literal => (literal == c).then_some(1),
    }
}

fn is_member(set: &[char], c: char) -> bool {
    let mut i = 0;
    while i < set.len() {
        let range = set.get(i + 1) == Some(&'-') && i + 2 < set.len();
        let (low, high) = (set[i], if range { set[i + 2] } else { set[i] });
        if (low..=high).contains(&c) {
            return true;
        }
        i += if range { 3 } else { 1 };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn patterns_mean_what_they_mean_to_python() {
        // Each verdict is that of `fnmatch.fnmatchcase`.
        for (pattern, name, verdict) in [
            ("*.json", "config.json", true),
            ("*.json", "a/b.json", true),
            ("*.json", "a.jsonl", false),
            ("data/*", "data/x/y", true),
            ("model-0000[1-3]-of-*.safetensors", "model-00002-of-00009.safetensors", true),
            ("model-0000[!1-3]*", "model-00002", false),
            ("*a*b*c", "xxaxxbxxbxc", true),
            ("*a*b*c", "xxaxxbxxbx", false),
            ("", "", true),
            ("", "a", false),
            ("?", "ü", true),
            ("[]a]", "]", true),
            ("[", "[", true),
            ("[a-", "a", false),
            ("README.md", "README.md.bak", false),
        ] {
            assert_eq!(fits(pattern, name), verdict, "{pattern} {name}");
        }
    }
}
