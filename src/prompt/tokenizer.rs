//! The LLM's tokenizer (`tokenizer.json`, through the `tokenizers` library).

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::Error;
use crate::files::sha256;

/// A tokenizer, and the ids that CoLLM needs.
///
/// Text is encoded by a form of it that knows no added tokens, so that the text of a special token inside a title is only
/// text. Where added tokens are meant, in templates, [`LlmTokenizer::split_added`] finds them.
pub struct LlmTokenizer {
    path: PathBuf,
    plain: Tokenizer,
    /// Longest first: where two match at one place, the longer is meant.
    added: Vec<Added>,
    fingerprint: String,
    placeholder: u32,
    /// Ids are taken modulo this.
    modulus: Option<u32>,
}

/// An entry of `added_tokens` (its white-space options are not used: templates are written out exactly).
#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// A stretch of a text in which added tokens count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stretch<'a> {
    /// Text without added tokens.
    Text(&'a str),
    /// An added token: its text and id.
    Token(&'a str, u32),
}

impl LlmTokenizer {
    /// Reads `tokenizer.json` of a model directory.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let bad = |what: String| Error::Tokenizer { path: path.clone(), what };
        let mut json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| bad(format!("not a tokenizer file: {e}")))?;
        let object = json.as_object_mut().ok_or_else(|| bad("not a tokenizer file: not an object".into()))?;
        let added = object.insert("added_tokens".into(), serde_json::Value::Array(Vec::new()));
        let mut added: Vec<Added> = match added {
            None | Some(serde_json::Value::Null) => Vec::new(),
            Some(list) => serde_json::from_value(list).map_err(|e| bad(format!("added_tokens: {e}")))?,
        };
        added.retain(|a| !a.content.is_empty());
        added.sort_by_key(|a| std::cmp::Reverse(a.content.len()));
        // No tokens around the text, no cutting, no filling: the prompt is exactly the template's.
        for off in ["post_processor", "truncation", "padding"] {
            object.insert(off.into(), serde_json::Value::Null);
        }
        let plain = Tokenizer::from_bytes(json.to_string().as_bytes())
            .map_err(|e| bad(format!("not a usable tokenizer: {e}")))?;
        let unknown = added.iter().find(|a| a.content == "<unk>").map(|a| a.id).or_else(|| plain.token_to_id("<unk>"));
        let largest = plain.get_vocab(false).into_values().chain(added.iter().map(|a| a.id)).max();
        let placeholder = unknown.or(largest.map_or(Some(0), |id| id.checked_add(1)));
        let placeholder = placeholder.ok_or_else(|| bad("token id 4294967295 is out of range".into()))?;
        Ok(LlmTokenizer { plain, added, fingerprint: sha256(&bytes), placeholder, path, modulus: None })
    }

    /// The same splitting into tokens for a model with a vocabulary of `n`: ids are taken modulo `n`. Tokens mean nothing then;
    /// it is for measuring cost with random weights.
    pub fn folded(mut self, n: u32) -> Self {
        let n = n.max(1);
        self.added.iter_mut().for_each(|a| a.id %= n);
        self.placeholder %= n;
        self.modulus = Some(n);
        self
    }

    /// Identifies the file's contents.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The id that stands at slot positions: `<unk>` where the tokenizer has it, else one past its vocabulary. Never looked up.
    pub fn placeholder_id(&self) -> u32 {
        self.placeholder
    }

    /// Ids of a text in which special tokens are only text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.plain.encode_fast(text, false);
        let encoding =
            encoding.map_err(|e| Error::Tokenizer { path: self.path.clone(), what: format!("{text:?}: {e}") })?;
        let fold = |&id: &u32| self.modulus.map_or(id, |n| id % n);
        Ok(encoding.get_ids().iter().map(fold).collect())
    }

    /// Text and added tokens in turn, as the official call of the tokenizer sees a template.
    pub fn split_added<'t>(&self, text: &'t str) -> Vec<Stretch<'t>> {
        let mut out = Vec::new();
        let (mut start, mut at) = (0, 0);
        while at < text.len() {
            let Some(token) = self.added.iter().find(|a| text[at..].starts_with(&a.content)) else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
                continue;
            };
            let end = at + token.content.len();
            if start < at {
                out.push(Stretch::Text(&text[start..at]));
            }
            out.push(Stretch::Token(&text[at..end], token.id));
            (start, at) = (end, end);
        }
        if start < at {
            out.push(Stretch::Text(&text[start..at]));
        }
        out
    }

    /// Vocabulary ids of the answers "Yes" and "No", each tokenised on its own (reference, section 2.2).
    pub fn answer_ids(&self) -> Result<(u32, u32), Error> {
        let one = |word: &str| match self.encode(word)?[..] {
            [id] => Ok(id),
            ref ids => Err(Error::Tokenizer {
                path: self.path.clone(),
                what: format!("{word:?} is {} tokens; the score is the logit of one", ids.len()),
            }),
        };
        Ok((one("Yes")?, one("No")?))
    }
}
