//! Text up to the first stop string, given out as early as can be.

/// Looks for stop strings in text that comes in pieces.
#[derive(Debug)]
pub struct Stops {
    strings: Vec<String>,
    /// What may be the beginning of a stop string.
    held: String,
}

impl Stops {
    /// Text ends in front of the first of these; none is empty.
    pub fn new(strings: Vec<String>) -> Stops {
        Stops { strings, held: String::new() }
    }

    /// The text that can be shown once `piece` has come, and whether it ends there.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(end) = self.strings.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        let safe =
            self.held.len() - self.strings.iter().map(|stop| self.begun(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(safe);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, once no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// How many bytes at the end of the text are the beginning of a stop string.
    fn begun(&self, stop: &str) -> usize {
        let starts = stop.char_indices().map(|(at, _)| at).rev();
        starts.into_iter().find(|len| self.held.ends_with(&stop[..*len])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of a text that comes in such pieces, and whether a stop string ended it.
    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut stops = Stops::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, ended) = stops.push(piece);
            shown.push(text);
            if ended {
                return (shown, true);
            }
        }
        shown.push(stops.finish());
        (shown, false)
    }

    #[test]
    fn text_ends_in_front_of_the_first_stop_string() {
        assert_eq!(shown(&["\n"], &["ab", "c\nd"]), (vec!["ab".into(), "c".into()], true));
        // The earliest counts, not the one that is asked first.
        assert_eq!(shown(&["d", "b"], &["abcd"]), (vec!["a".into()], true));
        assert_eq!(shown(&["b", "abc"], &["xa", "bc"]), (vec!["x".into(), "".into()], true));
        assert_eq!(shown(&[], &["ab", ""]), (vec!["ab".into(), "".into(), "".into()], false));
    }

    #[test]
    fn a_beginning_is_held_until_it_is_none() {
        let (pieces, ended) = shown(&["\n\nUser:"], &["Hi\n", "\nUs", "er", "s: x"]);
        assert_eq!((pieces.concat().as_str(), ended), ("Hi\n\nUsers: x", false));
        assert_eq!(pieces[..3], ["Hi", "", ""]);
        let (pieces, ended) = shown(&["aab"], &["a", "a", "a", "b"]);
        assert_eq!((pieces.concat().as_str(), ended), ("a", true));
        // Characters are whole, and what is held comes out at the end.
        let (pieces, ended) = shown(&["éa"], &["ü", "é"]);
        assert_eq!((pieces, ended), (vec!["ü".into(), "".into(), "é".into()], false));
    }
}
