//! Prompt templates: text with named places.
//!
//! The official templates are in the binary under their official names; a path names a file of the user's own. A file
//! holds one template in its first line (the official files repeat one line four times; only the first counts).

use std::path::Path;

use super::{Error, SlotKind};

/// A stretch of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text as it stands.
    Text(String),
    /// `<ItemTitleList>`: the liked titles.
    Titles,
    /// `<TargetItemTitle>`: the title to judge.
    TargetTitle,
    /// `<UserID>` or `<TargetItemID>`.
    Slot(SlotKind),
}

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    name: String,
    text: String,
    pieces: Vec<Piece>,
}

const BUILT_IN: [(&str, &str); 6] = [
    ("tallrec_movie", include_str!("templates/tallrec_movie.txt")),
    ("tallrec_amazon", include_str!("templates/tallrec_amazon.txt")),
    ("collm_movie", include_str!("templates/collm_movie.txt")),
    ("collm_amazon", include_str!("templates/collm_amazon.txt")),
    ("softprompt", include_str!("templates/softprompt.txt")),
    ("softprompt_amazon", include_str!("templates/softprompt_amazon.txt")),
];

const TAGS: [(&str, Piece); 4] = [
    ("<ItemTitleList>", Piece::Titles),
    ("<TargetItemTitle>", Piece::TargetTitle),
    ("<UserID>", Piece::Slot(SlotKind::User)),
    ("<TargetItemID>", Piece::Slot(SlotKind::Item)),
];

impl Template {
    /// A built-in template by its official name, or the file of that path.
    pub fn find(name: &str) -> Result<Self, Error> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(n, _)| *n == name) {
            return Template::parse(name, text);
        }
        let path = Path::new(name);
        if !path.is_file() {
            let names: Vec<&str> = BUILT_IN.iter().map(|(n, _)| *n).collect();
            let what = format!("neither a built-in template ({}) nor a file", names.join(", "));
            return Err(Error::Template { name: name.into(), what });
        }
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Template::parse(name, &text)
    }

    /// Parses a template. Its text is the first line.
    pub fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let error = |what: String| Error::Template { name: name.into(), what };
        let text = text.lines().next().unwrap_or("").to_string();
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let next = TAGS.iter().filter_map(|(tag, piece)| Some((rest.find(tag)?, tag, piece))).min_by_key(|t| t.0);
            let (literal, after) = match next {
                Some((at, tag, _)) => (&rest[..at], &rest[at + tag.len()..]),
                None => (rest, ""),
            };
            if let Some(unknown) = unknown_tag(literal) {
                let tags = TAGS.map(|t| t.0).join(", ");
                return Err(error(format!("{unknown} is not a known place; known: {tags}")));
            }
            if !literal.is_empty() {
                pieces.push(Piece::Text(literal.to_string()));
            }
            pieces.extend(next.map(|n| n.2.clone()));
            rest = after;
        }
        for (tag, piece) in &TAGS {
            let n = pieces.iter().filter(|p| *p == piece).count();
            match piece {
                Piece::TargetTitle if n == 0 => return Err(error(format!("{tag} is missing"))),
                _ if n > 1 => return Err(error(format!("{tag} occurs {n} times; once is allowed"))),
                _ => {}
            }
        }
        if matches!(pieces.last(), Some(Piece::Slot(_))) {
            return Err(error("ends in a slot; the answer is read after text".into()));
        }
        Ok(Template { name: name.into(), text, pieces })
    }

    /// Its name or path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text it was parsed from.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its pieces in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Has it places for collaborative vectors?
    pub fn has_slots(&self) -> bool {
        self.pieces.iter().any(|p| matches!(p, Piece::Slot(_)))
    }
}

/// A `<Word>` in literal text: most likely a misspelt place.
fn unknown_tag(text: &str) -> Option<&str> {
    text.match_indices('<').find_map(|(at, _)| {
        let end = at + text[at..].find('>')?;
        let word = &text[at + 1..end];
        let is_name =
            word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(|c| c.is_ascii_alphanumeric());
        is_name.then(|| &text[at..=end])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_templates_parse_and_keep_the_official_quirks() {
        for (name, _) in BUILT_IN {
            let t = Template::find(name).unwrap();
            assert_eq!(t.has_slots(), !name.starts_with("tallrec"), "{name}");
            // PARITY: backslash and n are two characters, with a space before them.
            assert!(t.text().ends_with(r#"Answer with "Yes" or "No". \n#Answer:"#), "{name}");
        }
    }

    #[test]
    fn misspelt_or_missing_places_are_errors() {
        let e = |t: &str| Template::parse("mine.txt", t).unwrap_err().to_string();
        assert!(e("<TargetItemTitle> <UserId>?").contains("<UserId> is not a known place; known: <ItemTitleList>"));
        assert!(e("hello").contains("<TargetItemTitle> is missing"));
        assert!(e("<TargetItemTitle> <UserID> <UserID>?").contains("<UserID> occurs 2 times"));
        assert!(e("<TargetItemTitle> <UserID>").contains("ends in a slot"));
        assert!(Template::find("nope").unwrap_err().to_string().contains("tallrec_movie"));
        assert!(Template::parse("x", "a < b <TargetItemTitle> <br> c").is_ok());
    }
}
