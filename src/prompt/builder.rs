//! A history and a target become a prompt: text for people, ids and slots for the model.

use serde::{Deserialize, Serialize};

use super::tokenizer::Stretch;
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
    parts: Vec<Part>,
    /// Answered examples before the prompt.
    examples: Vec<u32>,
}

/// An answered prompt: liked titles, oldest first; the title to judge; whether it was liked.
pub type Example<'t> = (Vec<&'t str>, &'t str, bool);

/// A stretch of a template. Its own text may hold special tokens (`<s>`, chat marks); titles never do.
enum Part {
    Fixed(Filled),
    Titles,
    TargetTitle,
}

/// A stretch of a filled template.
#[derive(Clone)]
enum Filled {
    Text(String),
    Token(String, u32),
    Slot(SlotKind, u8),
}

impl<'a> PromptBuilder<'a> {
    /// Puts the three together.
    pub fn new(tokenizer: &'a LlmTokenizer, template: &'a Template, style: &'a PromptStyle) -> Self {
        Self::beginning(&style.begin, tokenizer, template, style)
    }

    /// Token ids of examples in the form of the template, each with its answer and a line break, beginning as a prompt does.
    pub fn encode_examples(&self, examples: &[Example]) -> Result<Vec<u32>, Error> {
        let (yes, no) = self.tokenizer.answer_ids()?;
        let following = Self::beginning("", self.tokenizer, self.template, self.style);
        let mut ids = Vec::new();
        for (i, (history, target, liked)) in examples.iter().enumerate() {
            let builder = if i == 0 { self } else { &following };
            ids.extend(builder.encode(history, target)?.0);
            ids.push(if *liked { yes } else { no });
            ids.extend(self.tokenizer.encode("\n")?);
        }
        Ok(ids)
    }

    /// Prompts that come after what [`Self::encode_examples`] gave, if that is not empty.
    pub fn after(self, examples: &[u32]) -> Self {
        if examples.is_empty() {
            return self;
        }
        let prompts = Self::beginning("", self.tokenizer, self.template, self.style);
        PromptBuilder { examples: examples.to_vec(), ..prompts }
    }

    fn beginning(begin: &str, tokenizer: &'a LlmTokenizer, template: &'a Template, style: &'a PromptStyle) -> Self {
        let mut parts = Vec::new();
        let fixed = |text: &str, parts: &mut Vec<Part>| {
            parts.extend(tokenizer.split_added(text).into_iter().map(|s| {
                Part::Fixed(match s {
                    Stretch::Text(t) => Filled::Text(t.into()),
                    Stretch::Token(t, id) => Filled::Token(t.into(), id),
                })
            }));
        };
        fixed(begin, &mut parts);
        for piece in template.pieces() {
            match piece {
                Piece::Text(t) if style.literal_newline => fixed(t, &mut parts),
                Piece::Text(t) => fixed(&t.replace("\\n", "\n"), &mut parts),
                Piece::Titles => parts.push(Part::Titles),
                Piece::TargetTitle => parts.push(Part::TargetTitle),
                Piece::Slot(kind) => {
                    for part in 0..style.tokens_per_vector {
                        if part > 0 {
                            parts.push(Part::Fixed(Filled::Text(".".into())));
                        }
                        parts.push(Part::Fixed(Filled::Slot(*kind, part as u8)));
                    }
                }
            }
        }
        PromptBuilder { tokenizer, template, style, parts, examples: Vec::new() }
    }

    /// The template.
    pub fn template(&self) -> &Template {
        self.template
    }

    /// Ids before the prompt.
    pub fn examples(&self) -> &[u32] {
        &self.examples
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
        let filled = self.fill(self.recent(history), target);
        let text = |f: &Filled| match f {
            Filled::Text(t) | Filled::Token(t, _) => t.clone(),
            Filled::Slot(..) => "<unk>".into(),
        };
        filled.iter().map(text).collect()
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
        for part in &self.parts {
            let next = match part {
                Part::Fixed(f) => f.clone(),
                Part::Titles if history.is_empty() => Filled::Text(self.style.empty_history.clone()),
                Part::Titles => Filled::Text(history.iter().map(|t| quoted(t)).collect::<Vec<_>>().join(", ")),
                Part::TargetTitle => Filled::Text(quoted(target.trim())),
            };
            // Adjoining text is one text to the tokenizer: its merges reach across the quotes.
            match (out.last_mut(), next) {
                (Some(Filled::Text(last)), Filled::Text(t)) => last.push_str(&t),
                (_, next) => out.push(next),
            }
        }
        out
    }

    /// Each stretch of text is tokenised on its own, as a tokenizer does around special tokens.
    fn encode_filled(&self, filled: Vec<Filled>) -> Result<(Vec<u32>, Vec<Slot>), Error> {
        let (mut ids, mut slots) = (self.examples.clone(), Vec::new());
        for piece in filled {
            match piece {
                Filled::Text(text) => ids.extend(self.tokenizer.encode(&text)?),
                Filled::Token(_, id) => ids.push(id),
                Filled::Slot(kind, part) => {
                    slots.push(Slot { position: ids.len() as u32, kind, part });
                    ids.push(self.tokenizer.placeholder_id());
                }
            }
        }
        Ok((ids, slots))
    }
}
