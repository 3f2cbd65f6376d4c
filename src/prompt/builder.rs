//! A history and a target become a prompt: text for people, ids and slots for the model.

use serde::{Deserialize, Serialize};

use super::{Error, LlmTokenizer, Piece, Slot, SlotKind, Template};

/// How the places of a template are filled. Defaults are the official behaviour (reference, section 2.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PromptStyle {
    /// Most recent liked titles used.
    pub max_history: usize,
    /// What stands for an empty history. PARITY: `unkow`, sic.
    pub empty_history: String,
    /// PARITY: `\n` in a template stays backslash and n. `false` makes it a line break.
    pub literal_newline: bool,
    /// Text put before the template. PARITY: `<s>`; one token where the tokenizer has it as a special token, else text.
    pub begin: String,
    /// Longest prompt, in tokens. Longer ones lose their oldest titles, never a slot.
    pub max_tokens: usize,
    /// Token embeddings per collaborative vector (`proj_token_num`); placeholders are joined by `.` as officially.
    pub tokens_per_vector: usize,
}

impl Default for PromptStyle {
    fn default() -> Self {
        PromptStyle {
            max_history: 10,
            empty_history: "unkow".into(),
            literal_newline: true,
            begin: "<s>".into(),
            max_tokens: 1024,
            tokens_per_vector: 1,
        }
    }
}

/// A template with its style and tokenizer.
pub struct PromptBuilder<'a> {
    tokenizer: &'a LlmTokenizer,
    template: &'a Template,
    style: &'a PromptStyle,
    begin: Begin,
}

/// What `style.begin` is for this tokenizer.
enum Begin {
    Special(u32),
    Text(String),
}

/// A stretch of a filled template: text to tokenise, or a slot.
enum Filled {
    Text(String),
    Slot(SlotKind, u8),
}

impl<'a> PromptBuilder<'a> {
    /// Puts the three together.
    pub fn new(tokenizer: &'a LlmTokenizer, template: &'a Template, style: &'a PromptStyle) -> Self {
        let begin = match tokenizer.special_id(&style.begin) {
            Some(id) => Begin::Special(id),
            None => Begin::Text(style.begin.clone()),
        };
        PromptBuilder { tokenizer, template, style, begin }
    }

    /// The template.
    pub fn template(&self) -> &Template {
        self.template
    }

    /// The style.
    pub fn style(&self) -> &PromptStyle {
        self.style
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &LlmTokenizer {
        self.tokenizer
    }

    /// The prompt as the official code would write it, `<unk>` at the slots. `history`: liked titles, oldest first.
    pub fn text(&self, history: &[&str], target: &str) -> String {
        let pieces = self.fill(self.recent(history), target);
        let body: String = pieces
            .iter()
            .map(|p| match p {
                Filled::Text(t) => t.as_str(),
                Filled::Slot(..) => "<unk>",
            })
            .collect();
        format!("{}{body}", self.style.begin)
    }

    /// Token ids and slots. Titles are dropped, oldest first, until the prompt fits `max_tokens`.
    pub fn encode(&self, history: &[&str], target: &str) -> Result<(Vec<u32>, Vec<Slot>), Error> {
        let mut history = self.recent(history);
        loop {
            let (ids, slots) = self.encode_filled(self.fill(history, target))?;
            if ids.len() <= self.style.max_tokens {
                return Ok((ids, slots));
            }
            if history.is_empty() {
                let (tokens, limit) = (ids.len(), self.style.max_tokens);
                return Err(Error::TooLong { tokens, limit, title: target.into() });
            }
            history = &history[1..];
        }
    }

    fn recent<'h, 't>(&self, history: &'h [&'t str]) -> &'h [&'t str] {
        &history[history.len().saturating_sub(self.style.max_history)..]
    }

    fn fill(&self, history: &[&str], target: &str) -> Vec<Filled> {
        let quoted = |title: &str| format!("\"{title}\"");
        let mut out: Vec<Filled> = Vec::new();
        for piece in self.template.pieces() {
            let text = match piece {
                Piece::Text(t) if self.style.literal_newline => t.clone(),
                Piece::Text(t) => t.replace("\\n", "\n"),
                Piece::Titles if history.is_empty() => self.style.empty_history.clone(),
                Piece::Titles => history.iter().map(|t| quoted(t)).collect::<Vec<_>>().join(", "),
                Piece::TargetTitle => quoted(target.trim()),
                Piece::Slot(kind) => {
                    for part in 0..self.style.tokens_per_vector {
                        if part > 0 {
                            out.push(Filled::Text(".".into()));
                        }
                        out.push(Filled::Slot(*kind, part as u8));
                    }
                    continue;
                }
            };
            match out.last_mut() {
                Some(Filled::Text(last)) => last.push_str(&text),
                _ => out.push(Filled::Text(text)),
            }
        }
        out
    }

    /// Each stretch of text is tokenised on its own, as a tokenizer does around special tokens.
    fn encode_filled(&self, filled: Vec<Filled>) -> Result<(Vec<u32>, Vec<Slot>), Error> {
        let (mut ids, mut slots) = (Vec::new(), Vec::new());
        let mut prefix = match &self.begin {
            Begin::Special(id) => {
                ids.push(*id);
                String::new()
            }
            Begin::Text(text) => text.clone(),
        };
        for piece in filled {
            match piece {
                Filled::Text(text) => {
                    let text = std::mem::take(&mut prefix) + &text;
                    ids.extend(self.tokenizer.encode(&text)?);
                }
                Filled::Slot(kind, part) => {
                    if !prefix.is_empty() {
                        ids.extend(self.tokenizer.encode(&std::mem::take(&mut prefix))?);
                    }
                    slots.push(Slot { position: ids.len() as u32, kind, part });
                    ids.push(self.tokenizer.placeholder_id());
                }
            }
        }
        Ok((ids, slots))
    }
}
