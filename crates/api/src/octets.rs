//! Bytes in JSON: text where they are UTF-8, else base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::openapi::{RefOr, schema::Schema};
use utoipa::{PartialSchema, ToSchema};

/// Bytes: a string, or `{"base64": "…"}` for those that are not UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Octets(pub Vec<u8>);

#[derive(Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
enum Written {
    Text(String),
    Base64 { base64: String },
}

impl PartialSchema for Octets {
    fn schema() -> RefOr<Schema> {
        Written::schema()
    }
}

impl ToSchema for Octets {}

impl From<Octets> for Written {
    fn from(Octets(bytes): Octets) -> Self {
        match String::from_utf8(bytes) {
            Ok(text) => Self::Text(text),
            Err(error) => Self::Base64 {
                base64: STANDARD.encode(error.as_bytes()),
            },
        }
    }
}

impl TryFrom<Written> for Octets {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Text(text) => Ok(Self(text.into_bytes())),
            Written::Base64 { base64 } => {
                let bytes = STANDARD.decode(base64);
                bytes
                    .map(Self)
                    .map_err(|error| format!("no base64: {error}"))
            }
        }
    }
}

impl From<&str> for Octets {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<Vec<u8>> for Octets {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// Base64 (RFC 4648 §4).
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// What base64 stands for; `None` if it is none.
#[must_use]
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// A result's two fields for some bytes: the text, or else the base64.
pub(crate) fn text_or_base64(bytes: Vec<u8>) -> (Option<String>, Option<String>) {
    match String::from_utf8(bytes) {
        Ok(text) => (Some(text), None),
        Err(error) => (None, Some(STANDARD.encode(error.as_bytes()))),
    }
}

/// The bytes of such fields; `None` if the base64 is none.
pub(crate) fn bytes_of(text: Option<&String>, base64: Option<&String>) -> Option<Vec<u8>> {
    match (text, base64) {
        (_, Some(base64)) => STANDARD.decode(base64).ok(),
        (Some(text), None) => Some(text.as_bytes().to_vec()),
        (None, None) => Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_readable_and_other_bytes_survive() {
        let json = |bytes: &[u8]| serde_json::to_string(&Octets(bytes.to_vec())).unwrap();
        assert_eq!(json("é\n".as_bytes()), r#""é\n""#);
        assert_eq!(json(&[0xff, 0]), r#"{"base64":"/wA="}"#);
        for bytes in [&b"text"[..], &[0xff, 0], b""] {
            let back: Octets = serde_json::from_str(&json(bytes)).unwrap();
            assert_eq!(back.0, bytes);
        }
        let error = serde_json::from_str::<Octets>(r#"{"base64":"?"}"#).unwrap_err();
        assert!(error.to_string().contains("base64"));
    }
}
