//! The LLM's tokenizer (`tokenizer.json`, through the `tokenizers` library).

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::Error;
use crate::files::sha256;

/// A tokenizer, and the ids that CoLLM needs.
///
/// Two forms of the same tokenizer: one knows the special tokens (for the text before the prompt, such as `<s>`), one does
/// not (for everything else, so that a special token's text inside a title is only text).
pub struct LlmTokenizer {
    path: PathBuf,
    with_special: Tokenizer,
    plain: Tokenizer,
    fingerprint: String,
    placeholder: u32,
}

impl LlmTokenizer {
    /// Reads `tokenizer.json` of a model directory.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let bad = |what: String| Error::Tokenizer { path: path.clone(), what };
        let mut json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| bad(format!("not a tokenizer file: {e}")))?;
        let load = |json: &serde_json::Value| {
            Tokenizer::from_bytes(json.to_string().as_bytes()).map_err(|e| bad(format!("not a usable tokenizer: {e}")))
        };
        let with_special = load(&json)?;
        if let Some(object) = json.as_object_mut() {
            object.insert("added_tokens".into(), serde_json::Value::Array(Vec::new()));
            object.insert("post_processor".into(), serde_json::Value::Null);
        }
        let plain = load(&json)?;
        let size = with_special.get_vocab_size(true) as u32;
        let placeholder = with_special.token_to_id("<unk>").unwrap_or(size);
        Ok(LlmTokenizer { with_special, plain, fingerprint: sha256(&bytes), placeholder, path })
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
        Ok(encoding.get_ids().to_vec())
    }

    /// Is this text, as a whole, one special token?
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.with_special.get_added_vocabulary().get_vocab().get(text).copied()
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
