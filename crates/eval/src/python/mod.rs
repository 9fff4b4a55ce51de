//! Python where the harness's numbers depend on it: its strings, where Rust's standard
//! library answers otherwise, and its random numbers.

mod case;
mod random;

pub(crate) use case::capitalize;
pub(crate) use random::Random;

/// Python's `str.isspace`: Unicode's white space and the separators U+001C to U+001F. A
/// regular expression's `\s` is the same.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Python's `str.lstrip`.
pub(crate) fn strip_start(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// The length of `re.split(r"\s+", text)`: one more than there are runs of white space, so
/// that the empty pieces before a leading run and after a trailing one count too.
pub(crate) fn count_split(text: &str) -> usize {
    let mut runs = 0;
    let mut in_run = false;
    for c in text.chars() {
        let space = is_space(c);
        runs += usize::from(space && !in_run);
        in_run = space;
    }
    runs + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_pythons() {
        assert_eq!(strip("\u{1c}\u{a0} a\u{200b}\u{3000}"), "a\u{200b}");
        assert_eq!(strip_start("\n a "), "a ");
    }

    #[test]
    fn empty_pieces_count() {
        // len(re.split(r"\s+", s)) in CPython.
        for (text, pieces) in [("", 1), ("a b", 2), (" a \n b ", 4), ("\u{1e}", 2), ("a\u{85}b", 2)]
        {
            assert_eq!(count_split(text), pieces, "{text:?}");
        }
    }
}
