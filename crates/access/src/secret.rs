//! A key as its owner has it, `zyg_ID_SECRET`, and as it is kept: without the secret.

use blake3::Hash;
use std::fmt;

/// How keys begin, so that whoever finds one knows what it is.
const PREFIX: &str = "zyg_";
/// Of the id: two of a million keys rarely have the same, which is seen when one is made.
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;
/// Keys are hashed for this, and nothing else is.
const CONTEXT: &str = "zygote 2026-11-28 keys of the API";

/// A key's words. 256 random bits need no slow hash: nobody tries them all.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    id: String,
    secret: String,
}

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn draw() -> std::io::Result<Self> {
        Ok(Self {
            id: hex(&random::<ID_BYTES>()?),
            secret: hex(&random::<SECRET_BYTES>()?),
        })
    }

    /// What somebody shows; `None` if it is no key of ours.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let is_hex = |text: &str, bytes| {
            let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            text.len() == 2 * bytes && text.bytes().all(is_digit)
        };
        (is_hex(id, ID_BYTES) && is_hex(secret, SECRET_BYTES)).then(|| Self {
            id: id.to_owned(),
            secret: secret.to_owned(),
        })
    }

    /// What it is called, in lists and logs.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What is kept of it. Comparing two takes the same time wherever they differ.
    #[must_use]
    pub fn hash(&self) -> Hash {
        let text = format!("{}_{}", self.id, self.secret);
        Hash::from_bytes(blake3::derive_key(CONTEXT, text.as_bytes()))
    }

    /// All of it, for the one time that it is shown.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}_{}", self.id, self.secret)
    }
}

/// Without the secret: what is printed for debugging ends in logs.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}_…", self.id)
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_comes_back_from_its_words_and_tells_nobody_its_secret() {
        let (one, two) = (Secret::draw().unwrap(), Secret::draw().unwrap());
        let text = one.reveal();
        assert_eq!(text.len(), 4 + 12 + 1 + 64);
        assert_eq!(Secret::parse(&text), Some(one.clone()));
        assert!(one.id() != two.id() && one.hash() != two.hash());
        let shown = format!("{one:?}");
        assert!(shown.contains(one.id()) && !shown.contains(&one.secret));
        // The id is part of what is hashed.
        let other = Secret {
            id: two.id.clone(),
            ..one.clone()
        };
        assert_ne!(other.hash(), one.hash());
    }

    proptest! {
        #[test]
        fn what_is_no_key_is_none(text in "\\PC{0,90}") {
            prop_assume!(!text.starts_with(PREFIX));
            prop_assert_eq!(Secret::parse(&text), None);
        }

        #[test]
        fn a_key_with_another_letter_is_another_one_or_none(at in 0_usize..81, letter in 0_u8..=255) {
            let key = Secret::draw().unwrap();
            let mut bytes = key.reveal().into_bytes();
            prop_assume!(bytes[at] != letter);
            bytes[at] = letter;
            let text = String::from_utf8_lossy(&bytes);
            if let Some(other) = Secret::parse(&text) {
                prop_assert_ne!(other.hash(), key.hash());
            }
        }
    }
}
