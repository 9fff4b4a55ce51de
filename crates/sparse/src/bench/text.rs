//! Text that is read token by token.

use std::sync::Arc;

/// Documents, each of which is decoded from its beginning. Copies share the tokens.
#[derive(Clone, Debug)]
pub struct Text {
    documents: Arc<[Vec<u32>]>,
    before: usize,
}

impl Text {
    /// Of each document, the first `before` tokens go in at once and are not timed. Documents without
    /// two more tokens (one to decode, one to compare with) are left out; `None` where no other is.
    pub fn new(documents: Vec<Vec<u32>>, before: usize) -> Option<Text> {
        let long = |document: &Vec<u32>| document.len() >= before + 2;
        let documents: Arc<[_]> = documents.into_iter().filter(long).collect();
        if documents.is_empty() { None } else { Some(Text { documents, before }) }
    }

    /// The documents.
    pub fn documents(&self) -> &[Vec<u32>] {
        &self.documents
    }

    /// How many tokens of each go in at once.
    pub fn before(&self) -> usize {
        self.before
    }

    /// How many tokens can be decoded before the text begins anew.
    pub fn steps(&self) -> usize {
        self.documents.iter().map(|document| document.len() - self.before - 1).sum()
    }
}

/// A reader's place in a text.
pub(super) struct Cursor {
    text: Text,
    document: usize,
    at: usize,
}

/// What a reader does next.
pub(super) struct Next<'a> {
    /// Another document begins: these tokens go in first, if there are any.
    pub begin: Option<&'a [u32]>,
    /// What is decoded.
    pub token: u32,
    /// What follows it.
    pub follows: u32,
}

impl Cursor {
    pub fn new(text: Text) -> Cursor {
        let at = text.before;
        Cursor { text, document: 0, at }
    }

    /// So many readers side by side, each in another part of the text.
    pub fn side_by_side(text: &Text, batch: usize) -> Vec<Cursor> {
        let first = |n| n * text.documents.len() / batch;
        (0..batch).map(|n| Cursor { document: first(n), ..Cursor::new(text.clone()) }).collect()
    }

    /// The next token. After the last document comes the first again.
    pub fn advance(&mut self) -> Next<'_> {
        let Text { documents, before } = &self.text;
        if self.at + 1 == documents[self.document].len() {
            (self.document, self.at) = ((self.document + 1) % documents.len(), *before);
        }
        let document = &documents[self.document];
        let at = self.at;
        self.at += 1;
        Next {
            begin: (at == *before).then_some(&document[..at]),
            token: document[at],
            follows: document[at + 1],
        }
    }
}

/// The mean over sequences, each with its logits `[vocab]` and the token that follows.
pub(super) fn mean_surprise<'a>(
    logits: impl Iterator<Item = &'a [f32]>,
    follows: &[u32],
) -> Option<f64> {
    let each = logits.zip(follows).map(|(logits, token)| surprise(logits, *token));
    (!follows.is_empty()).then(|| each.sum::<f64>() / follows.len() as f64)
}

/// Minus the logarithm of a token's probability by its logits `[vocab]`.
pub(super) fn surprise(logits: &[f32], token: u32) -> f64 {
    let most = logits.iter().fold(f32::MIN, |most, x| most.max(*x));
    let total: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    total.ln() - f64::from(logits[token as usize] - most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_read_once_and_then_again() {
        let documents = vec![vec![1, 2, 3, 4], vec![5, 6], vec![7, 8, 9]];
        let text = Text::new(documents.clone(), 1).unwrap();
        assert_eq!((text.documents().len(), text.steps()), (2, 3));
        let mut cursor = Cursor::new(text);
        for _ in 0..2 {
            let expected: [(Option<&[u32]>, u32, u32); 3] =
                [(Some(&[1]), 2, 3), (None, 3, 4), (Some(&[7]), 8, 9)];
            for expected in expected {
                let next = cursor.advance();
                assert_eq!((next.begin, next.token, next.follows), expected);
            }
        }
        assert_eq!(Text::new(documents, 0).unwrap().steps(), 6);
        assert!(Text::new(vec![vec![1]], 0).is_none());
    }

    #[test]
    fn readers_begin_at_other_documents() {
        let text = Text::new(vec![vec![1, 2], vec![3, 4], vec![5, 6], vec![7, 8]], 0).unwrap();
        let begins = |batch| -> Vec<u32> {
            let mut cursors = Cursor::side_by_side(&text, batch);
            cursors.iter_mut().map(|cursor| cursor.advance().token).collect()
        };
        assert_eq!((begins(1), begins(2)), (vec![1], vec![1, 5]));
        assert_eq!(begins(4), [1, 3, 5, 7]);
    }

    #[test]
    fn surprise_is_the_logarithm_of_a_probability() {
        let found = surprise(&[1.0, 3.0, 2.0], 2);
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        assert!((found - (total.ln() - 2.0)).abs() < 1e-12);
    }
}
