//! Which word was probably meant.

/// The candidate that the fewest slips of the finger turn into this word, if they are few.
pub(super) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    /// One slip for each so many letters, but at least one.
    const LETTERS_PER_SLIP: usize = 3;
    let few = (word.chars().count() / LETTERS_PER_SLIP).max(1);
    candidates
        .iter()
        .map(|candidate| (slips(word, candidate), *candidate))
        .filter(|(distance, _)| *distance <= few)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters to add, leave out, change, or swap with their neighbour (optimal string alignment).
fn slips(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut two_above: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for i in 0..from.len() {
        let mut row = vec![i + 1];
        for j in 0..to.len() {
            let change = above[j] + usize::from(from[i] != to[j]);
            let mut least = change.min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from[i] == to[j - 1] && from[i - 1] == to[j] {
                least = least.min(two_above[j - 1] + 1);
            }
            row.push(least);
        }
        two_above = std::mem::replace(&mut above, row);
    }
    above[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_is_one_slip_and_a_strange_word_is_near_nothing() {
        assert_eq!(slips("sokcet", "socket"), 1);
        assert_eq!(slips("", "tap"), 3);
        assert_eq!(slips("tap", "tap"), 0);
        assert_eq!(nearest("sokcet", &["tap", "socket", "socket_mode"]), Some("socket"));
        assert_eq!(nearest("tpa", &["mac", "tap"]), Some("tap"));
        assert_eq!(nearest("colour", &["mac", "tap"]), None);
        assert_eq!(nearest("mtu", &[]), None);
    }
}
