//! The name that somebody may have meant.

/// The nearest of `known` names to `word`, if one is near: one slip of the fingers for each three letters.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = (word.chars().count() / 3).max(1);
    let distances = known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), name));
    let near = distances.filter(|(distance, _)| *distance <= most);
    near.min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_seen_through_and_other_names_are_not() {
        let known = ["run", "python", "template"];
        assert_eq!(nearest("rnu", known), Some("run"));
        assert_eq!(nearest("pyhton", known), Some("python"));
        assert_eq!(nearest("ruby", known), None);
        assert_eq!(nearest("x", []), None);
    }
}
