//! Python's `str.capitalize`: the first character in title case, the rest in lower case.

/// Python's `str.capitalize`.
pub(crate) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    // In lower case a sigma's form depends on its neighbours, so the text is lowered whole.
    let lower = text.to_lowercase();
    let first_lower: usize = first.to_lowercase().map(char::len_utf8).sum();
    title(first) + &lower[first_lower..]
}

/// A character in title case, by Unicode's SpecialCasing and UnicodeData: its upper case
/// with all but the first character lowered again, and the scripts where that is not so.
fn title(c: char) -> String {
    match c {
        // Letters of two: their own title case, between the upper and the lower.
        '\u{1c4}'..='\u{1c6}' => "\u{1c5}".into(),
        '\u{1c7}'..='\u{1c9}' => "\u{1c8}".into(),
        '\u{1ca}'..='\u{1cc}' => "\u{1cb}".into(),
        '\u{1f1}'..='\u{1f3}' => "\u{1f2}".into(),
        '\u{149}' => c.to_uppercase().collect(),
        // Georgian has capitals only for words written all in capitals.
        '\u{10d0}'..='\u{10ff}' => c.into(),
        // Greek with an iota beneath: it stays beneath.
        '\u{1f80}'..='\u{1faf}' => char::from_u32(c as u32 | 8).unwrap_or(c).into(),
        '\u{1fb3}' | '\u{1fbc}' => "\u{1fbc}".into(),
        '\u{1fc3}' | '\u{1fcc}' => "\u{1fcc}".into(),
        '\u{1ff3}' | '\u{1ffc}' => "\u{1ffc}".into(),
        '\u{1fb2}'..='\u{1ff7}' => lower_tail(c).replace('\u{3b9}', "\u{345}"),
        _ => lower_tail(c),
    }
}

/// Upper case, of which only the first character stays.
fn lower_tail(c: char) -> String {
    let mut upper = c.to_uppercase();
    upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_cpython_does_it() {
        for (text, capitalized) in [
            ("", ""),
            ("he SAYS Hi", "He says hi"),
            ("ßS", "Sss"),
            ("ﬃX", "Ffix"),
            ("ŉ", "ʼN"),
            ("ǆA", "ǅa"),
            ("ქართული", "ქართული"),
            ("ᾳΑ", "ᾼα"),
            ("ᾲ", "Ὰ\u{345}"),
            ("İI", "İi"),
            // Sigma at the end of a word, and elsewhere.
            ("ΟΔΟΣ ΣΟΣ", "Οδος σος"),
            ("ΣΣ", "Σς"),
            ("1st Place", "1st place"),
        ] {
            assert_eq!(capitalize(text), capitalized, "{text}");
        }
    }
}
